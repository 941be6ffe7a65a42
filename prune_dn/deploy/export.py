"""Export to ONNX and torch.export; a file gets its name only after its answers were compared."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import atomic_path
from prune_dn.deploy.concatenations import take_from_sources_
from prune_dn.errors import ExportError
from prune_dn.graph.inference import arguments, call
from prune_dn.models.as_built import as_built
from prune_dn.models.examples import (
    batch_size,
    batched,
    by_name,
    in_batch,
    inference_copy,
    names_in,
)
from prune_dn.models.examples import in_channels as channels_of
from prune_dn.models.families import config_of, shares_memory
from prune_dn.models.sizes import ImageSize, sides

INPUT_NAME, OUTPUT_NAME = "input", "logits"
BATCHES = (1, 7)
OLDEST_OPSET = 18
_EXAMPLE_BATCH = 2  # the exporters take a batch of 1 for a constant
_LONGEST = 2_000  # characters of another library's error
Inputs = Callable[[int], Any]  # the inputs of a batch of this size


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, and how far its answers are from the model's on random or given inputs."""

    path: Path
    size_bytes: int
    max_abs_error: float
    batches: tuple[int, ...] = BATCHES


OnnxReport = ExportReport


@usual_defaults()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
) -> OnnxReport:
    """Write one ONNX file of any net, float32, with a dynamic batch.

    A net of images takes `image_size` in pixels; any other takes `example_inputs`, as it is called: a
    tensor, a tuple of the forward's arguments, or a dict of them by name. Each tensor that has as many
    rows as the first one has a dynamic batch, the others are constants. A single tensor is "input", a single
    answer "logits", several inputs have the names of the forward's arguments, several answers those of their
    keys and positions (`maps_0`); what a net answers beside tensors is left out.

    The model itself is not touched: a copy in eval mode on the CPU is exported. onnxruntime then
    runs the file at batch 1 and 7; `tolerance` is the error allowed, as a share of the largest
    answer. `opset=None` leaves the choice to PyTorch, which writes 18 and newer ones.

    Raises ExportError if the model cannot be run or exported, in that opset, or if the answers differ.
    """
    import onnx

    _check_opset(opset, onnx.defs.onnx_opset_version())
    net, inputs = _prepare(model, image_size, example_inputs, in_channels)
    example = inputs(_EXAMPLE_BATCH)
    with torch.no_grad():
        answer = call(net, example)
    if isinstance(answer, Tensor):
        answers = [OUTPUT_NAME]
    else:
        answers = names_in(answer)
        net.register_forward_hook(lambda _, given, out: _tensors(out))
    positional, named = arguments(example)
    names = names_in(by_name(net, example))
    if not named and len(positional) == 1 and isinstance(positional[0], Tensor):
        names = [INPUT_NAME]
    answers = [f"{name}_out" if name in names else name for name in answers]
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's internals
            try:
                program = torch.onnx.export(
                    _program(net, example),
                    dynamo=True,
                    dynamic_shapes=_dynamic(net, example),  # for the axis's name
                    input_names=names,
                    output_names=answers,
                    opset_version=opset,
                    verbose=False,
                )
            except Exception as error:
                raise ExportError(
                    f"PyTorch could not export the model to ONNX: {str(error)[:_LONGEST]}"
                ) from error
        assert program is not None
        proto = program.model_proto
        written = {entry.domain: entry.version for entry in proto.opset_import}
        if opset is not None and written != {"": opset}:
            raise ExportError(
                f"opset {opset} was asked for, but PyTorch exported {written}; leave opset out"
            )
        _clear_metadata(proto)
        onnx.save(proto, str(temporary))
        worst = _verify(net, inputs, _onnx_runner(temporary, names), tolerance, "ONNX file")
        size = temporary.stat().st_size
    return OnnxReport(Path(path), size, worst)


@usual_defaults()
def export_torch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a `torch.export` program (.pt2) with a dynamic batch; `torch.export.load` reads it.

    As `export_onnx`: a float32 copy in eval mode on the CPU, checked at batch 1 and 7. It is called as the
    net is, and answers in the same containers, with None for what is no tensor.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"{path} must end in .pt2, which torch.export asks for")
    net, inputs = _prepare(model, image_size, example_inputs, in_channels)
    net.register_forward_hook(
        lambda _, given, out: tree_map(lambda x: x if isinstance(x, Tensor) else None, out)
    )
    example = inputs(_EXAMPLE_BATCH)
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = _program(net, example)
                for node in program.graph.nodes:
                    node.meta.pop("stack_trace", None)  # paths of this machine
                whole = io.BytesIO()  # on a full disk torch's own writer ends the process
                torch.export.save(program, whole)
            except Exception as error:
                raise ExportError(
                    f"torch.export could not export the model: {str(error)[:_LONGEST]}"
                ) from error
            temporary.write_bytes(whole.getbuffer())
            try:
                loaded = torch.export.load(temporary).module()
            except Exception as error:
                raise ExportError(f"torch cannot read its own program again: {error}") from error
        worst = _verify(
            net, inputs, lambda x: _tensors(call(loaded, x)), tolerance, "exported program"
        )
        size = temporary.stat().st_size
    return ExportReport(Path(path), size, worst)


def _program(net: nn.Module, example: Any) -> torch.export.ExportedProgram:
    """The program of a net with a dynamic batch, in which readers copy only what they read."""
    positional, named = arguments(example)
    program = torch.export.export(net, positional, named, dynamic_shapes=_dynamic(net, example))
    take_from_sources_(program)
    return program


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _dynamic(net: nn.Module, example: Any) -> dict[str, Any]:
    """The batch axis of each argument, by its parameter's name."""
    rows, batch = batch_size(example), torch.export.Dim("batch")
    return tree_map(lambda x: {0: batch} if batched(x, rows) else None, dict(by_name(net, example)))


def _check_opset(opset: Any, newest: int) -> None:
    is_whole = isinstance(opset, Integral) and not isinstance(opset, bool)
    if opset is not None and not (is_whole and OLDEST_OPSET <= opset <= newest):
        raise ExportError(
            f"opset is {opset!r}; PyTorch's exporter can write the integers from {OLDEST_OPSET} to "
            f"{newest}, and None leaves the choice to it"
        )


def _prepare(
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
        shapes = ", ".join(str(tuple(x.shape)) for x in _tensors(example))
        inputs, where = lambda batch: in_batch(example, batch), f"example_inputs of shape {shapes}"
    try:
        with torch.no_grad():
            answers = _tensors(call(net, inputs(1)))
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


def _onnx_runner(path: Path, names: list[str]) -> Callable[[Any], list[Tensor]]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot read the exported file: {error}") from error
    needed = {entry.name for entry in session.get_inputs()}

    def run(inputs: Any) -> list[Tensor]:
        given = dict(zip(names, _tensors(inputs), strict=True))
        feed = {name: x.numpy() for name, x in given.items() if name in needed}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    return run


def _verify(
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
            wanted = _tensors(call(net, x))
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


def _clear_metadata(message: Any) -> None:
    """Take off the exporter's notes on each node: they hold paths of this machine."""
    for field, value in message.ListFields():
        if field.name == "metadata_props":
            message.ClearField("metadata_props")
        elif field.message_type is not None and field.name != "initializer":
            for child in value if hasattr(value, "__len__") else [value]:
                _clear_metadata(child)
