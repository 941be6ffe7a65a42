"""Write a net in int8, by the tools of the runtime that will run it; verified before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_dn.base.runtimes import QUANTISED, Runtime
from prune_dn.data.batches import read_batches
from prune_dn.deploy import onnxruntime_int8, openvino_int8
from prune_dn.deploy.formats import ENDINGS, FORMATS, open_deployed
from prune_dn.deploy.onnx_files import write_onnx
from prune_dn.deploy.openvino_files import openvino_of_onnx
from prune_dn.deploy.preparing import BATCHES, prepare, tensors
from prune_dn.deploy.quantising import Control, Source
from prune_dn.errors import ExportError, PruningError

LARGEST_ERROR = (
    0.5  # the largest rms error that a file may have, as a share of the rms of the float answers
)
_VERIFIED = 256  # calibration images on which answers are compared


@dataclass(frozen=True)
class Quantiser:
    """`settings` are names of ways to quantise, the one that suits DenseNets first.

    `plain` writes the float net of an ONNX file for the runtime, to compare with.
    """

    quantise: Callable[..., tuple[list[str], list[str]]]
    settings: tuple[str, ...]
    plain: Callable[[Path, Path], object]


QUANTISERS: dict[Runtime, Quantiser] = {
    "onnxruntime": Quantiser(
        onnxruntime_int8.quantise_onnx, tuple(onnxruntime_int8.SETTINGS), shutil.copyfile
    ),
    "openvino": Quantiser(
        openvino_int8.quantise_openvino, tuple(openvino_int8.SETTINGS), openvino_of_onnx
    ),
}


@dataclass(frozen=True)
class Int8Net:
    """A quantised net that was verified.

    `error` is the rms difference of its answers from the float net's, as a share of the rms of these, on
    `images` calibration images; `agreement` the share of them with the same top class (None: answers are no
    classes).
    """

    path: Path
    setting: str
    layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    error: float
    agreement: float | None
    images: int


def check_runtime(runtime: Any) -> None:
    """Raise ExportError for a runtime that has no int8."""
    if runtime not in QUANTISED:
        raise ExportError(f"runtime is {runtime!r}; int8 is in {', '.join(QUANTISED)}")


@contextmanager
def prepared(
    model: nn.Module,
    calibration: Iterable[object],
    folder: Path,
) -> Iterator[Source]:
    """The float net and its calibration images, checked, in files in `folder`.

    Raises ExportError for no images, images that are not as `read_batches` asks, that the net cannot take,
    or that are all of one class, and for a net that cannot be exported.
    """
    try:
        batches = read_batches(calibration)
    except PruningError as error:
        raise ExportError(str(error)) from error
    found = [x for x in batches.inputs if isinstance(x, Tensor)]
    if len(found) < len(batches.inputs):
        raise ExportError("only nets of images are quantised: calibration batches must be tensors")
    _check_images(found, batches.labels)
    first = found[0]
    net, inputs = prepare(model, None, first, None)
    names = write_onnx(net, inputs, folder / "float.onnx")
    if len(names) != 1:
        raise ExportError(f"the net has {len(names)} inputs; only nets of images are quantised")
    images = tuple(x.detach().cpu().float().numpy() for x in found)
    yield Source(net, folder / "float.onnx", names[0], images)


def _check_images(images: Sequence[Tensor], labels: Sequence[Tensor] | None) -> None:
    shapes = {tuple(x.shape[1:]) for x in images}
    if len(shapes) > 1:
        raise ExportError(
            f"calibration images have the shapes {sorted(shapes)}; a deployed file takes one"
        )
    if labels is None or any(x.ndim != 1 or x.is_floating_point() for x in labels):
        return
    found, count = torch.cat(list(labels)).unique(), sum(map(len, images))
    if len(found) == 1 and count > 1:
        raise ExportError(
            f"all {count} calibration images are of class {found.item()}; the ranges of int8 would fit "
            "that class alone: give images of all classes, or leave the labels out if there is only one"
        )


def write_int8(
    source: Source,
    path: Path,
    runtime: Runtime,
    setting: str | None = None,
    control: Control | None = None,
    largest_error: float | None = LARGEST_ERROR,
) -> Int8Net:
    """Write one quantised net to `path` and verify it; None as `largest_error` asks only that it runs.

    Raises ExportError where the tool cannot quantise the net, the file does not run, or its answers are wrong.
    """
    quantiser = QUANTISERS[runtime]
    setting = quantiser.settings[0] if setting is None else setting
    parts = FORMATS[ENDINGS[runtime]].parts(path)
    try:
        layers, plain = quantiser.quantise(source, parts, setting, control)
    except Exception as error:
        if type(error).__module__.startswith("prune_dn") or isinstance(error, OSError):
            raise
        raise ExportError(
            f"{runtime} cannot quantise this net: {type(error).__name__}: {str(error)[:2000]}"
        ) from error
    if not layers or len(plain) == len(layers):
        raise ExportError(f"{runtime} quantised none of the {len(layers)} layers of this net")
    off, agreement, count = _verify(source, path, largest_error)
    return Int8Net(path, setting, tuple(layers), tuple(plain), off, agreement, count)


def _verify(
    source: Source, path: Path, largest_error: float | None
) -> tuple[float, float | None, int]:
    """Error, agreement, and on how many images. Raises ExportError."""
    small = open_deployed(path, "int8")
    images = np.concatenate(source.images)[:_VERIFIED]
    for batch in BATCHES:
        some = images[np.arange(batch) % len(images)]
        try:
            found = small.run([some])
        except Exception as failure:
            raise ExportError(
                f"the int8 file does not run at batch {batch}: {failure}"
            ) from failure
        if any(len(x) != batch for x in found):
            raise ExportError(
                f"the int8 file answers a batch of {batch} with another number of rows"
            )
    off = scale = 0.0
    same, classes = 0, True
    for start in range(0, len(images), 32):
        some = images[start : start + 32]
        with torch.no_grad():
            wanted = [x.double().numpy() for x in tensors(source.net(torch.from_numpy(some)))]
        found = [np.array(x, dtype=np.float64) for x in small.run([some])]
        off += sum(float(((a - b) ** 2).sum()) for a, b in zip(found, wanted, strict=True))
        scale += sum(float((b**2).sum()) for b in wanted)
        classes = classes and wanted[0].ndim == 2 and wanted[0].shape[1] > 1
        if classes:
            same += int((found[0].argmax(1) == wanted[0].argmax(1)).sum())
    error = float(np.sqrt(off / scale)) if scale else float(np.sqrt(off))
    agreement = same / len(images) if classes else None
    if largest_error is not None and not error <= largest_error:
        told = "" if agreement is None else f", and {agreement:.1%} of top classes agree"
        raise ExportError(
            f"the int8 file differs from the net by {error:.1%} of its answers (rms, {len(images)} "
            f"calibration images){told}; allowed is {largest_error:.0%}. Nothing was written: give more "
            "or other calibration images, or max_drop, which leaves layers in float"
        )
    return error, agreement, len(images)
