"""The net that is to be cut: one of ours where it can be, else followed as its own class."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_dn.base import limits
from prune_dn.base.files import parse_json
from prune_dn.base.sound import check_sound
from prune_dn.data.batches import read_batches, rows_of
from prune_dn.errors import ConfigError, PruningError
from prune_dn.graph import Graph, trace
from prune_dn.models.answers import computed_weights, path_of, peculiarities
from prune_dn.models.convert import as_ours, check_not_wrapped
from prune_dn.models.examples import example_image
from prune_dn.models.families import NetConfig, known_family
from prune_dn.models.probe import describe, make
from prune_dn.models.shapes import own_tensors
from prune_dn.models.sizes import ImageSize
from prune_dn.models.weights import shorten
from prune_dn.pruning.config import KINDS, Kind
from prune_dn.pruning.patches import Convolution, Transposed
from prune_dn.pruning.units import Units


@dataclass(frozen=True)
class NetShape:
    """What a net without a config looks like: its class, the shapes of its tensors, and an example.

    `groups` are the kind and the number of the channels of each group of units; `inputs` describes what
    the net was followed on (see `probe.describe`).
    """

    model: str
    tensors: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[Kind, int]]
    inputs: Any

    @staticmethod
    def of(model: nn.Module, table: Units, inputs: Any) -> NetShape:
        """The shape of a net that was followed on inputs as described."""
        groups = {group.name: (group.kind, group.channels) for group in table.groups}
        return NetShape(path_of(type(model)), shapes_of(model), groups, inputs)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> NetShape:
        """Rebuild a shape. Raises PruningError for anything that `to_json` did not write."""
        try:
            data = parse_json(text)
            if data.keys() != {"model", "tensors", "groups", "inputs"}:
                raise ValueError(f"it holds {', '.join(data)}")
            if not isinstance(data["model"], str):
                raise ValueError("it does not name a model")
            make(data["inputs"])
            for name, (kind, size) in data["groups"].items():
                if kind not in KINDS or type(size) is not int or not 0 < size <= limits.CHANNELS:
                    raise ValueError(f"{name} has {size!r:.100} units of kind {kind!r:.100}")
            for name, sizes in data["tensors"].items():
                if not isinstance(sizes, list) or not all(type(s) is int for s in sizes):
                    raise ValueError(f"the shape of {name} is {sizes!r:.100}")
            tensors = {name: tuple(sizes) for name, sizes in data["tensors"].items()}
            groups = {name: (kind, size) for name, (kind, size) in data["groups"].items()}
            return NetShape(data["model"], tensors, groups, data["inputs"])
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise PruningError(f"not the shape of a net: {error}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers that are saved."""
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}


Config = NetConfig | NetShape


@dataclass(frozen=True)
class Subject:
    """A net, its description, its channels, and the example on which it was followed.

    `inputs` is None for a net of ours, whose config tells everything.
    """

    model: nn.Module
    config: Config
    graph: Graph
    inputs: Any

    @property
    def has_branches(self) -> bool:
        """Whether some layers run only in training mode."""
        uses = self.graph.uses()
        return any(reader.layer not in uses for reader in self.graph.readers)


def subject(
    model: nn.Module,
    input_size: ImageSize | None = None,
    example_inputs: Any = None,
    calibration: Iterable[object] | None = None,
) -> Subject:
    """The net as ours where its family is one of ours, else followed on an example.

    The example is `example_inputs`, an image of `input_size`, or one of `calibration`. A variant of
    torchvision's or timm's DenseNet that is not ours is followed, too.

    Raises PruningError for what is no CNN, for weights that are computed or not finite, where no channels
    can go, and where the example is missing; ConversionError for wrappers and for a net of ours that was
    changed.
    """
    check_not_wrapped(model)
    check_cnn(model)
    check_sound(model)
    if (ours := as_ours(model, share=True)) is not None:
        return own_subject(ours, input_size, example_inputs)
    for problem in computed_weights(model):
        raise PruningError(
            f"this {type(model).__name__} has weights that are not its own: {problem}"
        )
    inputs = example_inputs
    if inputs is None and input_size is None and calibration is not None:
        first = read_batches(itertools.islice(calibration, 1)).inputs[0]
        inputs = tree_map(_plain, rows_of(first, slice(0, 1)))
    if inputs is None and input_size is None:
        raise PruningError(
            f"the size of images is needed for a {type(model).__name__}: give input_size in pixels, "
            "such as 224 or (height, width), or example_inputs"
        )
    inputs = example_image(model, input_size) if inputs is None else inputs
    graph = trace(model, inputs)
    _check_reached(model, graph)
    return Subject(model, NetShape.of(model, Units(graph), describe(inputs)), graph, inputs)


def own_subject(
    model: nn.Module, input_size: ImageSize | None = None, example_inputs: Any = None
) -> Subject:
    """A net of a family of ours as it is, without a look at its weights, which may be on the meta device.

    Raises PruningError for a size that it does not take, and for an example.
    """
    config: Any = model.config
    family = known_family(config)
    if example_inputs is not None:
        raise PruningError(
            f"example_inputs have no effect on a {family.title}, which takes images of "
            f"{'one' if family.one_size else 'any'} size: leave them out, or give input_size"
        )
    try:
        return Subject(model, config, config.graph(family.side(config, input_size)), None)
    except ConfigError as error:
        raise PruningError(f"input_size: {error}") from error


def _plain(x: Any) -> Any:
    """On the CPU, in float32 where it is floating point."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().float().cpu() if x.is_floating_point() else x.detach().cpu()


def check_cnn(model: nn.Module) -> None:
    """Raise PruningError for what is no CNN."""
    kind = type(model).__name__
    if not any(isinstance(module, Convolution | Transposed) for module in model.modules()):
        raise PruningError(f"this {kind} has no convolution: only CNNs can be pruned")
    layer_norms = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for name, module in model.named_modules():
        part = type(module).__name__
        if isinstance(module, nn.MultiheadAttention) or (layer_norms and "Attention" in part):
            raise PruningError(
                f"this {kind} is a transformer ({name} is a {part}): only CNNs can be pruned; "
                "torch-pruning's own pruners cut transformers"
            )


def _check_reached(model: nn.Module, graph: Graph) -> None:
    """Raise PruningError where the graph does not reach some weights, or nothing can go, with reasons."""
    kind = type(model).__name__
    if graph.unreached:
        why = "" if graph.why_unreached is None else f" (in training mode {graph.why_unreached})"
        odd = shorten(list(peculiarities(model)), 2)
        raise PruningError(
            f"what {shorten(list(graph.unreached))} reads cannot be followed: no forward of a copy of "
            f"this {kind} on the example reaches it{why}{odd and f' ({odd})'}, so it might no longer "
            "fit the pruned net; where the net never uses it, put nn.Identity() in its place first, else "
            "switch its use off (as aux_logits=False does) or give an example that it takes in training"
        )
    reasons = {p.layer: graph.why_fixed(p.layer) for p in graph.producers}
    if None not in reasons.values():
        found = [f"{layer} stays: {why}" for layer, why in reasons.items()]
        raise PruningError(
            f"no channels of this {kind} can be cut: "
            f"{shorten(found, 3) or 'no layer with weights is reached'}"
        )
