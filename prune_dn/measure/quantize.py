"""`quantize`: an int8 file that was verified, and what it is worth on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import atomic_paths
from prune_dn.base.runtimes import Runtime
from prune_dn.data.batches import Batches, read_batches
from prune_dn.deploy.formats import ENDINGS, FORMATS, StrPath, open_deployed
from prune_dn.deploy.int8 import (
    LARGEST_ERROR,
    QUANTISERS,
    Int8Net,
    check_runtime,
    prepared,
    write_int8,
)
from prune_dn.deploy.quantising import Control, Metric, Source
from prune_dn.errors import ExportError
from prune_dn.measure.latency import Latency, compare_latency
from prune_dn.measure.profiling import count

_REPEATS = 20
_SECONDS = 60.0  # of timing, per batch size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeReport:
    """What was written, how far it is from the float net, and how fast both are here.

    `layers` have weights, `float_layers` of them stay in float. `error` is the rms difference of the answers as a
    share of the rms of the float net's, on `images` calibration images; `agreement` the share of these with the
    same top class. `metric_float` and `metric` are what `evaluate` says of the two (by default the accuracy on
    the calibration images; None without labels). `latency` has a pair for each batch size: the float net
    and the file, in the same runtime, in turns.
    """

    path: Path
    size_bytes: int
    runtime: Runtime
    setting: str
    layers: int
    float_layers: tuple[str, ...]
    error: float
    agreement: float | None
    images: int
    metric_float: float | None
    metric: float | None
    latency: tuple[tuple[Latency, Latency], ...]

    @property
    def notices(self) -> list[str]:
        """Where the file is no faster than the float net."""
        return [
            f"at batch {int8.batch_size} int8 takes {int8.median_ms / plain.median_ms:.2f}x of the time of "
            f"float32 in {plain.runtime} on this machine: it saves bytes, not time"
            for plain, int8 in self.latency
            if int8.median_ms >= plain.median_ms
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        pairs = [{"float": asdict(a), "int8": asdict(b)} for a, b in self.latency]
        told = {**asdict(self), "path": str(self.path), "latency": pairs}
        return {**told, "float_layers": list(self.float_layers), "notices": self.notices}


@usual_defaults()
def quantize(
    model: nn.Module,
    path: StrPath,
    *,
    calibration: Iterable[object],
    runtime: Runtime = "onnxruntime",
    evaluate: Metric | None = None,
    max_drop: float | None = None,
    batch_sizes: Sequence[int] = (1,),
    info: Mapping[str, Any] | None = None,
) -> QuantizeReport:
    """Write a net of images in int8: an .onnx for onnxruntime, or an .xml and .bin for OpenVINO.

    Static post-training quantisation by the runtime's own tool (onnxruntime.quantization: QDQ per channel;
    NNCF). `calibration` are batches of images (N, C, H, W), normalised as in training, or (images, labels): a few
    hundred of all classes. Where the tool has several settings the one that is fastest here, in turns
    at each of `batch_sizes`, is taken. The file answers any batch size, and gets its name only after its answers
    were compared with the float net's on calibration images.

    `max_drop` is how far `evaluate` (net -> number, more is better; by default the accuracy on calibration
    images with labels) may fall. Where no setting holds, the layers that hurt stay in float: of
    onnxruntime those whose quantisation alone changes answers most, found by bisection; in OpenVINO by NNCF's
    accuracy control. `evaluate` gets the model, and then `Deployed` nets. `info` as of `export_onnx`.

    Raises ExportError for calibration images that are missing, of one class, or not what the net takes, for an
    `evaluate` that gives no finite number, where `max_drop` cannot be met, and for a file that fails the
    comparison: nothing is written then; RuntimeMissingError where the runtime is not installed.

    >>> import os, tempfile
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    >>> path = os.path.join(tempfile.mkdtemp(), "small.int8.onnx")
    >>> report = quantize(net, path, calibration=[torch.randn(32, 1, 8, 8)])
    >>> report.layers, report.float_layers, report.latency[0][1].precision
    (2, (), 'int8')
    """
    check_runtime(runtime)
    form = FORMATS[ENDINGS[runtime]]
    if Path(path).suffix != ENDINGS[runtime]:
        raise ExportError(f"{path} must end in {ENDINGS[runtime]}, as files for {runtime} do")
    _check_drop(max_drop)
    if not isinstance(calibration, torch.Tensor):  # that is refused, with a word
        calibration = list(calibration)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        source = stack.enter_context(prepared(model, calibration, folder))
        evaluate = evaluate or _accuracy(read_batches(calibration))
        if evaluate is None and max_drop is not None:
            raise ExportError("max_drop needs evaluate, or labels beside the calibration images")
        cost = count(source.net, example_inputs=torch.from_numpy(source.images[0][:1]))
        told = {**(info or {}), "params": cost.params, "macs": cost.macs}
        source = dataclasses.replace(source, info=told)
        control = None if evaluate is None else Control(evaluate, source.net, max_drop or 0.0)
        largest = LARGEST_ERROR if max_drop is None else None  # else layers may go back to float
        made = _settings(source, folder, runtime, largest)
        plain = folder / f"float{ENDINGS[runtime]}"
        if plain != source.onnx:
            QUANTISERS[runtime].plain(source.onnx, plain)
        times = _times({"float": plain, **{x.setting: x.path for x in made}}, batch_sizes)
        made.sort(key=lambda net: math.prod(t[net.setting].median_ms for t in times))
        chosen = next((net for net in made if _holds(net, control, max_drop)), None)
        if chosen is None:
            logger.warning("int8: no setting holds the metric; layers that hurt go back to float")
            chosen = write_int8(source, made[0].path, runtime, made[0].setting, control)
            times = _times({"float": plain, chosen.setting: chosen.path}, batch_sizes)
            if not _holds(chosen, control, max_drop):
                assert control is not None
                raise ExportError(
                    f"{runtime} cannot hold the metric within {max_drop:g}: it falls by "
                    f"{control.fell():.4g}, with {len(chosen.float_layers)} of {len(chosen.layers)} layers "
                    "in float; allow a larger max_drop, or give more calibration images"
                )
        elif control is not None:
            control.measure(open_deployed(chosen.path, "int8"))
        with atomic_paths(*form.parts(path)) as temporaries:
            for part, temporary in zip(form.parts(chosen.path), temporaries, strict=True):
                shutil.copyfile(part, temporary)
    return QuantizeReport(
        path=Path(path),
        size_bytes=sum(part.stat().st_size for part in form.parts(path)),
        runtime=runtime,
        setting=chosen.setting,
        layers=len(chosen.layers),
        float_layers=chosen.float_layers,
        error=chosen.error,
        agreement=chosen.agreement,
        images=chosen.images,
        metric_float=None if control is None else control.wanted,
        metric=None if control is None else control.found,
        latency=tuple((t["float"], t[chosen.setting]) for t in times),
    )


def _check_drop(max_drop: Any) -> None:
    right = isinstance(max_drop, Real) and not isinstance(max_drop, bool)
    if max_drop is not None and not (right and 0 <= max_drop < math.inf):
        raise ExportError(f"max_drop is {max_drop!r}; it must be a number of at least 0")


def _accuracy(batches: Batches) -> Metric | None:
    """The accuracy on batches with class labels; None where they have none."""
    labels = batches.labels
    if labels is None or any(x.ndim != 1 or x.is_floating_point() for x in labels):
        return None

    def accuracy(net: nn.Module) -> float:
        right = 0
        with torch.no_grad():
            for images, wanted in zip(batches.inputs, labels, strict=True):
                answers = net(images.cpu().float())
                right += int((answers.argmax(1) == wanted.cpu()).sum())
        return right / len(batches)

    return accuracy


def _settings(
    source: Source, folder: Path, runtime: Runtime, largest_error: float | None
) -> list[Int8Net]:
    """The net by each setting of the runtime that verifies. Raises what the first one does if none does."""
    made, wrong = [], []
    for setting in QUANTISERS[runtime].settings:
        path = folder / f"{setting}{ENDINGS[runtime]}"
        try:
            made.append(write_int8(source, path, runtime, setting, None, largest_error))
        except ExportError as error:
            wrong.append(error)
    if not made:
        raise wrong[0]
    return made


def _times(files: Mapping[str, Path], batch_sizes: Sequence[int]) -> list[dict[str, Latency]]:
    return [
        compare_latency(files, batch_size=batch, repeats=_REPEATS, max_seconds=_SECONDS)
        for batch in batch_sizes
    ]


def _holds(net: Int8Net, control: Control | None, max_drop: float | None) -> bool:
    if control is None or max_drop is None:
        return True
    return net.error <= LARGEST_ERROR and control.holds(open_deployed(net.path, "int8"))
