"""`DenseNetConfig`: a frozen, JSON-able description that rebuilds any (pruned) DenseNet exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any, Literal

from prune_dn.base import limits
from prune_dn.base.files import parse_json
from prune_dn.errors import ConfigError, listed
from prune_dn.graph.types import Graph
from prune_dn.models.mfm import MFM_KINDS
from prune_dn.models.sizes import ImageSize

Stem = Literal["cifar", "imagenet"]
Indices = tuple[int, ...] | None
_TUPLES = (
    "input_indices",
    "rival_indices",
    "mfm_alone",
    "classifier_indices",
    "classifier_rivals",
)


@dataclass(frozen=True)
class LayerConfig:
    """One dense layer.

    `out_channels` counts the maps that join the stream, after MFM. `bottleneck` is the width of
    the 1x1 conv, or None for a basic layer (norm1 + 3x3 conv1). `input_indices` are the stream
    positions that the layer reads, rising; None = all. `name` stays the same when other layers go.

    `rival_indices` let what is read compete: rival i is the position whose maximum with
    `input_indices[i]` is read, or that position again where it stands alone; None = nobody competes.
    `mfm_alone` are the units of a 2/1 MFM that have one filter left, rising.
    """

    name: str
    out_channels: int
    bottleneck: int | None = None
    input_indices: Indices = None
    mfm: str | None = None
    rival_indices: Indices = None
    mfm_alone: tuple[int, ...] = ()

    @property
    def filters(self) -> int:
        """How many filters the last conv of the layer has, before MFM."""
        return filters_before_mfm(self.out_channels, self.mfm) - len(self.mfm_alone)


@dataclass(frozen=True)
class TransitionConfig:
    """Norm, ReLU, 1x1 conv (then MFM), 2x2 average pooling between two blocks.

    The fields are those of `LayerConfig`.
    """

    out_channels: int
    input_indices: Indices = None
    mfm: str | None = None
    rival_indices: Indices = None
    mfm_alone: tuple[int, ...] = ()

    @property
    def filters(self) -> int:
        """How many filters the conv has, before MFM."""
        return filters_before_mfm(self.out_channels, self.mfm) - len(self.mfm_alone)


@dataclass(frozen=True)
class DenseNetConfig:
    """Everything that a DenseNet is, but its weights.

    `stem` is `"cifar"` (3x3 conv) or `"imagenet"` (7x7 stride 2 conv, norm, ReLU, 3x3 max pooling);
    `classifier_indices` are the stream positions that the last norm and the classifier read, and
    `classifier_rivals` who competes with them (as `rival_indices` of a layer).

    >>> from prune_dn.models import densenet40
    >>> config = densenet40().config
    >>> config == DenseNetConfig.from_json(config.to_json())
    True
    """

    num_init_features: int
    blocks: tuple[tuple[LayerConfig, ...], ...]
    transitions: tuple[TransitionConfig, ...]
    num_classes: int = 1000
    in_channels: int = 3
    stem: Stem = "imagenet"
    classifier_indices: Indices = None
    drop_rate: float = 0.0
    norm_eps: float = 1e-5
    classifier_rivals: Indices = None

    def __post_init__(self) -> None:
        problems = listed(_problems(self))
        if problems:
            raise ConfigError(f"this DenseNetConfig cannot be built:\n{indent(problems, '  ')}")

    def graph(self, image_size: ImageSize | None = None) -> Graph:
        """The channels of the net, who makes and who reads them; `image_size` as in `prune_dn.count`."""
        from prune_dn.models.dense_net_graph import dense_net_graph

        return dense_net_graph(self, image_size)

    def after(self, kept: Mapping[str, Sequence[int]]) -> DenseNetConfig:
        """The config of what is left: `kept` as `Plan.keep_indices`, absent = all."""
        from prune_dn.models.dense_net_graph import dense_net_after

        return dense_net_after(self, kept)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives back an equal config."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> DenseNetConfig:
        """Rebuild a config. Raises ConfigError for anything that `to_json` did not write."""
        try:
            data = parse_json(text)
            blocks = tuple(tuple(LayerConfig(**_indices(x)) for x in b) for b in data.pop("blocks"))
            transitions = tuple(TransitionConfig(**_indices(x)) for x in data.pop("transitions"))
            return DenseNetConfig(blocks=blocks, transitions=transitions, **_indices(data))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"not a DenseNetConfig in JSON: {error}") from error


def pair_up(read: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Let what a reader reads compete by halves: (leads, rivals).

    Of r positions number c competes with number c + ceil(r / 2); the last lead of an odd count
    stands alone.

    >>> pair_up((0, 1, 2, 3, 4))
    ((0, 1, 2), (3, 4, 2))
    """
    half = -(-len(read) // 2)
    leads = read[:half]
    return leads, read[half:] + leads[len(read) - half :]


def filters_before_mfm(out_channels: int, mfm: str | None) -> int:
    """The number of conv filters that give `out_channels` maps after MFM `mfm`."""
    if mfm is None:
        return out_channels
    siblings, survivors = MFM_KINDS[mfm]
    return out_channels // survivors * siblings


def _indices(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if key in _TUPLES and value is not None else value
        for key, value in data.items()
    }


def _problems(config: DenseNetConfig) -> Any:
    too_large = _excess(config)
    if too_large:
        yield too_large
        return
    if config.stem not in ("cifar", "imagenet"):
        yield f"stem is {config.stem!r}; choose 'cifar' or 'imagenet'"
    for field in ("num_init_features", "num_classes", "in_channels"):
        if not _is_width(getattr(config, field)):
            yield f"{field} is {getattr(config, field)!r}; it must be an integer of at least 1"
    if not _is_number(config.drop_rate) or not 0.0 <= config.drop_rate < 1.0:
        yield f"drop_rate is {config.drop_rate!r}; it must lie in [0, 1)"
    if not _is_number(config.norm_eps) or not 0.0 < config.norm_eps <= sys.float_info.max:
        yield f"norm_eps is {config.norm_eps!r}; it must be a number above 0"
    if not config.blocks:
        yield "there are no blocks; a DenseNet has at least one"
    if len(config.transitions) != max(len(config.blocks) - 1, 0):
        yield f"{len(config.blocks)} blocks need {len(config.blocks) - 1} transitions, not {len(config.transitions)}"
        return
    width = config.num_init_features
    for b, block in enumerate(config.blocks, start=1):
        names = Counter(layer.name for layer in block)
        for name in sorted(n for n, times in names.items() if times > 1):
            yield f"block {b} has two layers named {name!r}"
        for layer in block:
            if re.fullmatch(r"denselayer\d+", str(layer.name)) is None:
                yield f"block {b} has a layer named {layer.name!r}; names are denselayer1, ..."
            where = f"block {b}, {layer.name}"
            yield from _part_problems(where, layer, width)
            if layer.bottleneck is not None and not _is_width(layer.bottleneck):
                yield f"{where}: bottleneck is {layer.bottleneck!r}; it must be None or at least 1"
            width += _counted(layer.out_channels)
        if b <= len(config.transitions):
            transition = config.transitions[b - 1]
            yield from _part_problems(f"transition {b}", transition, width)
            width = _counted(transition.out_channels)
    indices, rivals = config.classifier_indices, config.classifier_rivals
    yield from _index_problems("classifier_indices", indices, width)
    yield from _rival_problems("classifier_rivals", indices, rivals, width)


def _excess(config: DenseNetConfig) -> str | None:
    """What there is too much of to be a net."""
    layers = sum(map(len, config.blocks)) + len(config.transitions)
    width = made = _counted(config.num_init_features)
    made += _counted(config.num_classes) + _counted(config.in_channels)
    readings = 0
    for block, transition in itertools.zip_longest(config.blocks, config.transitions):
        for layer in block or ():
            readings += width if layer.input_indices is None else len(layer.input_indices)
            made += _counted(layer.out_channels) + _counted(layer.bottleneck)
            width += _counted(layer.out_channels)
        width = _counted(transition.out_channels) if transition else 0
        made += width
    for what, found, most in (
        ("layers", layers, limits.LAYERS),
        ("channels", made, limits.CHANNELS),
        ("channels to be read", readings, limits.READINGS),
    ):
        if found > most:
            return f"it has {found:,} {what}; nets have at most {most:,}"
    return None


def _counted(width: Any) -> int:
    return width if _is_width(width) else 0


def _part_problems(where: str, part: LayerConfig | TransitionConfig, width: int) -> Any:
    if not _is_width(part.out_channels):
        yield f"{where}: out_channels is {part.out_channels!r}; it must be an integer of at least 1"
    elif part.mfm is not None:
        if part.mfm not in MFM_KINDS:
            yield f"{where}: mfm is {part.mfm!r}; choose one of {', '.join(MFM_KINDS)} or None"
        elif part.out_channels % MFM_KINDS[part.mfm][1]:
            yield (
                f"{where}: mfm {part.mfm} gives {MFM_KINDS[part.mfm][1]} maps per unit, "
                f"so out_channels={part.out_channels} is not possible"
            )
    if part.mfm_alone != () and _is_width(part.out_channels):
        yield from _alone_problems(f"{where}: mfm_alone", part)
    indices, rivals = part.input_indices, part.rival_indices
    yield from _index_problems(f"{where}: input_indices", indices, width)
    yield from _rival_problems(f"{where}: rival_indices", indices, rivals, width)


def _alone_problems(where: str, part: LayerConfig | TransitionConfig) -> Any:
    alone = part.mfm_alone
    if part.mfm != "2/1":
        yield f"{where} is {alone!r}; siblings of mfm {part.mfm} cannot be cut alone, only of 2/1"
    elif not _is_rising(alone) or not 0 <= alone[0] <= alone[-1] < part.out_channels:
        yield f"{where} must be rising numbers of the {part.out_channels} units"
    elif len(alone) == part.out_channels:
        yield f"{where} has all {part.out_channels} units: nobody competes, so mfm must be None"


def _index_problems(where: str, indices: Indices, width: int) -> Any:
    if indices is None:
        return
    if not all(map(_is_index, indices)):
        yield f"{where} must be integers"
        return
    if not indices or not _is_rising(indices) or indices[0] < 0 or indices[-1] >= width:
        yield f"{where} must be rising positions in a stream of {width} channels, at least one"


def _rival_problems(where: str, leads: Indices, rivals: Indices, width: int) -> Any:
    if rivals is None:
        return
    if leads is None or len(leads) != len(rivals):
        count = "None" if leads is None else len(leads)
        yield f"{where}: {len(rivals)} rivals need as many positions to compete with, not {count}"
    elif not all(_is_index(i) and lead <= i < width for lead, i in zip(leads, rivals, strict=True)):
        yield (
            f"{where} must be positions in a stream of {width} channels, none before the one that it "
            "competes with"
        )
    else:
        pairs = [i for lead, i in zip(leads, rivals, strict=True) if i != lead]
        if not pairs:
            yield f"{where} has nobody who competes with another; it must be None"
        elif len({*leads, *pairs}) < len(leads) + len(pairs):
            yield f"{where} has a position that is read twice"


def _is_rising(values: tuple[int, ...]) -> bool:
    return all(map(_is_index, values)) and all(a < b for a, b in itertools.pairwise(values))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_width(value: Any) -> bool:
    return _is_index(value) and value >= 1
