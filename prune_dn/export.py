"""Export to ONNX and torch.export; a file gets its name only after its answers were compared."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_dn.defaults import usual_defaults
from prune_dn.errors import ConfigError, ExportError
from prune_dn.files import atomic_path
from prune_dn.models import DenseNet, LightCNN, Net
from prune_dn.models.as_built import as_built
from prune_dn.models.convert import convert
from prune_dn.profiling import ImageSize, sides

INPUT_NAME, OUTPUT_NAME = "input", "logits"
BATCHES = (1, 7)
OLDEST_OPSET = 18
_EXAMPLE_BATCH = 2  # the exporters take a batch of 1 for a constant


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its logits are from the model's on random images."""

    path: Path
    size_bytes: int
    max_abs_error: float
    batches: tuple[int, ...] = BATCHES


OnnxReport = ExportReport


@usual_defaults()
def export_onnx(
    model: Net,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
) -> OnnxReport:
    """Write one ONNX file, float32, with a dynamic batch: "input" (N, C, H, W) -> "logits".

    The model itself is not touched: a copy in eval mode on the CPU is exported. onnxruntime then
    runs the file at batch 1 and 7; `tolerance` is the error allowed, as a share of the largest
    logit. `opset=None` leaves the choice to PyTorch, which writes 18 and newer ones.

    Raises ExportError if the model cannot be run or exported, in that opset, or if the answers differ.
    """
    import onnx

    _check_opset(opset, onnx.defs.onnx_opset_version())
    net, images = _prepare(model, image_size, in_channels)
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's internals
            try:
                program = torch.onnx.export(
                    net,
                    (images(_EXAMPLE_BATCH),),
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    input_names=[INPUT_NAME],
                    output_names=[OUTPUT_NAME],
                    opset_version=opset,
                    verbose=False,
                )
            except Exception as error:
                raise ExportError(f"PyTorch could not export the model to ONNX: {error}") from error
        assert program is not None
        proto = program.model_proto
        written = {entry.domain: entry.version for entry in proto.opset_import}
        if opset is not None and written != {"": opset}:
            raise ExportError(
                f"opset {opset} was asked for, but PyTorch exported {written}; leave opset out"
            )
        _clear_metadata(proto)
        onnx.save(proto, str(temporary))
        worst = _verify(net, images, _onnx_runner(temporary), tolerance, "ONNX file")
        size = temporary.stat().st_size
    return OnnxReport(Path(path), size, worst)


@usual_defaults()
def export_torch(
    model: Net,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a `torch.export` program (.pt2) with a dynamic batch; `torch.export.load` reads it.

    As `export_onnx`: a float32 copy in eval mode on the CPU, checked at batch 1 and 7.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"{path} must end in .pt2, which torch.export asks for")
    net, images = _prepare(model, image_size, in_channels)
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = torch.export.export(
                    net,
                    (images(_EXAMPLE_BATCH),),
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                )
                for node in program.graph.nodes:
                    node.meta.pop("stack_trace", None)  # paths of this machine
                whole = io.BytesIO()  # on a full disk torch's own writer ends the process
                torch.export.save(program, whole)
            except Exception as error:
                raise ExportError(f"torch.export could not export the model: {error}") from error
            temporary.write_bytes(whole.getbuffer())
            loaded = torch.export.load(temporary).module()
        worst = _verify(net, images, loaded, tolerance, "exported program")
        size = temporary.stat().st_size
    return ExportReport(Path(path), size, worst)


def _check_opset(opset: Any, newest: int) -> None:
    is_whole = isinstance(opset, Integral) and not isinstance(opset, bool)
    if opset is not None and not (is_whole and OLDEST_OPSET <= opset <= newest):
        raise ExportError(
            f"opset is {opset!r}; PyTorch's exporter can write the integers from {OLDEST_OPSET} to "
            f"{newest}, and None leaves the choice to it"
        )


def _prepare(
    model: Net, image_size: ImageSize, in_channels: int | None
) -> tuple[Net, Callable[[int], Tensor]]:
    """A float32 copy in eval mode on the CPU, and random images of any batch size for it."""
    net = copy.deepcopy(as_built(model) if isinstance(model, LightCNN) else convert(model))
    net = net.cpu().float().eval()
    if isinstance(net, DenseNet):
        net.memory_efficient = False
    height, width = sides(image_size)
    channels = net.config.in_channels
    if in_channels is not None and in_channels != channels:
        raise ExportError(f"in_channels is {in_channels}, but the model takes {channels}")

    def images(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, channels, height, width, generator=generator)

    try:
        with torch.no_grad():
            logits = net(images(1))
    except (RuntimeError, ConfigError) as error:
        raise ExportError(
            f"the model cannot run on images of {height}x{width} pixels: {error}"
        ) from error
    if not logits.isfinite().all():
        raise ExportError("the model's own logits are not finite; its weights are broken")
    return net, images


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot read the exported file: {error}") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})[0])

    return run


def _verify(
    net: Net,
    images: Callable[[int], Tensor],
    exported: Callable[[Tensor], Tensor],
    tolerance: float,
    what: str,
) -> float:
    """The largest error over all batches. Raises ExportError above `tolerance` of the logits."""
    worst = 0.0
    for batch in BATCHES:
        x = images(batch)
        with torch.no_grad():
            expected = net(x)
            try:
                found = exported(x)
            except Exception as error:
                raise ExportError(f"the {what} does not run at batch {batch}: {error}") from error
        if found.shape != expected.shape:
            raise ExportError(
                f"the {what} gives shape {tuple(found.shape)} at batch {batch}, "
                f"the model {tuple(expected.shape)}"
            )
        scale = expected.abs().max().item()
        difference = (found - expected).abs().max().item()
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
