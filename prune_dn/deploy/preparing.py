"""What exporters share: a copy of the net and its inputs, and the comparison of a file's answers with the net's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.deploy.concatenations import take_from_sources_
from prune_dn.errors import ExportError
from prune_dn.graph.inference import arguments, call
from prune_dn.models.as_built import as_built
from prune_dn.models.examples import batch_size, batched, by_name, in_batch, inference_copy
from prune_dn.models.examples import in_channels as channels_of
from prune_dn.models.families import config_of, shares_memory
from prune_dn.models.sizes import ImageSize, sides

BATCHES = (1, 7)
EXAMPLE_BATCH = 2  # the exporters take a batch of 1 for a constant
LONGEST = 2_000  # characters of another library's error
Inputs = Callable[[int], Any]  # the inputs of a batch of this size


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, and how far its answers are from the model's on random or given inputs."""

    path: Path
    size_bytes: int
    max_abs_error: float
    batches: tuple[int, ...] = BATCHES


def prepare(
    model: nn.Module, image_size: ImageSize | None, example_inputs: Any, in_channels: int | None
) -> tuple[nn.Module, Inputs]:
    """A float32 copy in eval mode on the CPU, and its inputs of any batch size."""
    net = inference_copy(model if config_of(model) is None else as_built(model))
    net.requires_grad_(False)  # what recomputes maps for gradients then does not
    if shares_memory(net):
        net.memory_efficient = False  # type: ignore[assignment]
    if example_inputs is None:
        inputs, where = _images(net, image_size, in_channels)
    elif image_size is not None or in_channels is not None:
        raise ExportError("image_size and in_channels have no effect beside example_inputs")
    else:
        example = tree_map(_plain, example_inputs)
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors(example))
        inputs, where = lambda batch: in_batch(example, batch), f"example_inputs of shape {shapes}"
    try:
        with torch.no_grad():
            answers = tensors(call(net, inputs(1)))
    except Exception as error:  # whatever a foreign forward raises
        raise ExportError(f"the model cannot run on {where}: {error}") from error
    if not answers:
        raise ExportError(f"the model answers {where} without a tensor: nothing can be compared")
    if not all(answer.isfinite().all() for answer in answers):
        what = "answers" if config_of(model) is None else "logits"
        raise ExportError(f"the model's own {what} are not finite; its weights are broken")
    return net, inputs


def _images(
    net: nn.Module, image_size: ImageSize | None, in_channels: int | None
) -> tuple[Inputs, str]:
    """Random images of any batch size, and what they are in words."""
    if image_size is None and config_of(net) is None:
        raise ExportError(
            f"give image_size in pixels, or example_inputs, for a {type(net).__name__}"
        )
    height, width = sides(image_size)  # type: ignore[arg-type]
    channels = channels_of(net)
    if in_channels is not None and in_channels != channels:
        raise ExportError(f"in_channels is {in_channels}, but the model takes {channels}")

    def images(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, channels, height, width, generator=generator)

    return images, f"images of {height}x{width} pixels"


def _plain(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().cpu().float() if x.is_floating_point() else x.cpu()


def program_of(net: nn.Module, example: Any) -> torch.export.ExportedProgram:
    """The program of a net with a dynamic batch, in which readers copy only what they read."""
    positional, named = arguments(example)
    program = torch.export.export(net, positional, named, dynamic_shapes=dynamic(net, example))
    take_from_sources_(program)
    return program


def tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def dynamic(net: nn.Module, example: Any) -> dict[str, Any]:
    """The batch axis of each argument, by its parameter's name."""
    rows, batch = batch_size(example), torch.export.Dim("batch")
    return tree_map(lambda x: {0: batch} if batched(x, rows) else None, dict(by_name(net, example)))


def verify(
    net: nn.Module,
    inputs: Inputs,
    exported: Callable[[Any], list[Tensor]],
    tolerance: float,
    what: str,
) -> float:
    """The largest error over all batches and answers. Raises ExportError above `tolerance` of an answer."""
    worst = 0.0
    for batch in BATCHES:
        x = inputs(batch)
        with torch.no_grad():
            wanted = tensors(call(net, x))
            try:
                given = exported(x)
            except Exception as error:
                raise ExportError(f"the {what} does not run at batch {batch}: {error}") from error
        shapes, expected_shapes = ([tuple(y.shape) for y in ys] for ys in (given, wanted))
        if shapes != expected_shapes:
            raise ExportError(
                f"the {what} gives the shapes {shapes} at batch {batch}, the model {expected_shapes}"
            )
        for found, expected in zip(given, wanted, strict=True):
            if not expected.numel():
                continue
            scale = expected.double().abs().max().item()
            difference = (found.double() - expected.double()).abs().max().item()
            if not difference <= tolerance * scale:
                raise ExportError(
                    f"the {what} differs from the model at batch {batch}: largest error "
                    f"{difference:.3g} with logits up to {scale:.3g}; allowed is {tolerance:g} of "
                    "that. Nothing was written"
                )
            worst = max(worst, difference)
    return worst
