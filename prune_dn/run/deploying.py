"""Deployed files of a checkpoint or a run: written, evaluated, timed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base.files import same_file
from prune_dn.base.intervals import wilson
from prune_dn.base.runtimes import Precision, Runtime
from prune_dn.checkpoints.checkpoint import read_plan
from prune_dn.checkpoints.opened import open_checkpoint, open_deployed_net
from prune_dn.data.datasets import Datasets, calibration_batches
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import ENDINGS, FORMATS, deployed_bytes, deployed_info, is_deployed
from prune_dn.deploy.int8 import QUANTISERS
from prune_dn.deploy.openvino_files import openvino
from prune_dn.deploy.openvino_int8 import library
from prune_dn.errors import ExportError
from prune_dn.measure.latency import compare_latency, measure_latency
from prune_dn.measure.profiling import count
from prune_dn.measure.quantize import quantize
from prune_dn.models.convert import as_ours
from prune_dn.pruning import Plan
from prune_dn.run.data_options import DataOptions
from prune_dn.run.recipe import ExportSection, ReportSection
from prune_dn.training import evaluate as score

Kind = tuple[Runtime, Precision]  # who runs a file, and in which precision
_SECONDS = 60.0  # of timing, per batch size


def digest_of(plan: Plan | None) -> dict[str, str]:
    """The digest by which a deployed file names the plan that its net was cut by."""
    return (
        {} if plan is None else {"plan_digest": hashlib.sha256(plan.to_json().encode()).hexdigest()}
    )


def open_any(path: Path, precision: str, **effects: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint or a deployed file (then in `precision`), and its info.

    `effects` are options that only checkpoints have.
    """
    if not is_deployed(path):
        return open_checkpoint(path, effects.get("ema", False), effects.get("model"))
    for name, given in effects.items():
        if given:
            raise ExportError(f"--{name} has no effect on {path}, a deployed file; leave it out")
    return open_deployed_net(path, "bf16" if precision == "bf16" else "fp32")


def write_deployed(
    model: nn.Module, path: Path, inputs: Mapping[str, Any], info: Mapping[str, Any]
) -> None:
    """Write a net in the format of the ending, with what `info` says of it and what it costs."""
    cost = count(model, **inputs)
    told = {**info, "params": cost.params, "macs": cost.macs}
    FORMATS[path.suffix].export(model, path, **inputs, info=told)


def quantize_checkpoint(
    checkpoint: Path,
    output: Path,
    data: DataOptions,
    *,
    calibration: int | None,
    max_drop: float | None,
    batch_sizes: Sequence[int],
    ema: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in int8 for the runtime of `output`'s ending; `max_drop` is in points of accuracy.

    The metric is the accuracy on the validation images.
    """
    if same_file(output, checkpoint):
        raise ExportError(f"--output {output} is the checkpoint itself; name another file")
    runtime = next((r for r in QUANTISERS if ENDINGS[r] == output.suffix), None)
    if runtime is None:
        endings = ", ".join(f"{ENDINGS[r]} ({r})" for r in QUANTISERS)
        raise ExportError(f"{output}: the ending says the runtime; use {endings}")
    check_installed([(runtime, "int8")])
    net, info = open_checkpoint(checkpoint, ema, model)
    net = as_ours(net) or net
    sets, pixels = data.load(info, net, checkpoint)
    told = {**info, **digest_of(read_plan(checkpoint)), "data": sets.spec.to_dict()}

    def accuracy(candidate: nn.Module) -> float:
        found = score(candidate, sets.val).accuracy
        assert found is not None
        return found

    report = quantize(
        net,
        output,
        calibration=calibration_batches(sets.train, calibration, seed=data.seed),
        runtime=runtime,
        evaluate=accuracy,
        max_drop=None if max_drop is None else max_drop / 100,
        batch_sizes=batch_sizes,
        info=told,
    )
    told = report.to_dict()
    accuracies = {
        "val_accuracy_float": told.pop("metric_float"),
        "val_accuracy": told.pop("metric"),
    }
    intervals = {f"{k}_interval": wilson(v, len(sets.val)) for k, v in accuracies.items()}
    return {
        "output": str(output),
        **accuracies,
        **intervals,
        "n": len(sets.val),
        **{key: value for key, value in told.items() if key != "path"},
        "pixels": pixels,
    }


def profile_file(
    path: Path, batch_sizes: Sequence[int], repeats: int, precision: str | None
) -> dict[str, Any]:
    """What a deployed file says of itself, its bytes, and its latency in its own runtime.

    `precision` is "bf16" for OpenVINO's, or what the file is in.
    """
    net, info = open_deployed_net(path)
    own = info.get("precision", "fp32")
    if precision not in (None, own, "bf16"):
        raise ExportError(
            f"--precision {precision} has no effect: {path} is in {own}; leave it out"
        )
    kind: Precision = "bf16" if precision == "bf16" else "fp32"
    return {
        "file": str(path),
        "file_bytes": deployed_bytes(path),
        "inputs": [list(shape) for shape in net.running.shapes],
        "params": info.get("params"),
        "macs": info.get("macs"),
        "info": info,
        "latency": [
            dataclasses.asdict(
                measure_latency(
                    path,
                    batch_size=batch,
                    repeats=repeats,
                    max_seconds=_SECONDS,
                    precision=kind,
                )
            )
            for batch in batch_sizes
        ],
    }


def wanted_files(wish: ExportSection) -> dict[str, Kind]:
    """The deployed files that a recipe asks for: who runs each, and in which precision."""
    plain: dict[Runtime, bool] = {
        "onnxruntime": wish.onnx,
        "openvino": wish.openvino,
        "eager": wish.torch_export,
    }
    asked: list[Kind] = [(r, "fp32") for r, wanted in plain.items() if wanted]
    asked += [(runtime, "int8") for runtime in wish.int8]
    return {file_name(*kind): kind for kind in asked}


def file_name(runtime: Runtime, precision: Precision) -> str:
    """What a run calls a deployed file.

    >>> file_name("openvino", "int8")
    'model.int8.xml'
    """
    return f"model{'.int8' if precision == 'int8' else ''}{ENDINGS[runtime]}"


def check_installed(kinds: Sequence[Kind]) -> None:
    """Raise RuntimeMissingError where a runtime that files need is not installed."""
    for runtime, precision in kinds:
        if runtime == "openvino":
            openvino()
            if precision == "int8":
                library()


def write_file(
    model: nn.Module,
    path: Path,
    runtime: Runtime,
    precision: Precision,
    sets: Datasets,
    info: Mapping[str, Any],
    calibration: int | None,
    *,
    seed: int,
) -> list[str]:
    """Write one deployed file of a run; what its reader must know."""
    size = sets.spec.image_size
    if precision != "int8":
        write_deployed(model, path, {"image_size": size}, info)
        return []
    images = calibration_batches(sets.train, calibration, seed=seed)
    report = quantize(model, path, calibration=images, runtime=runtime, info=info)
    kept = [f"{path.name}: in float stay {', '.join(report.float_layers)}"]
    return [f"{path.name}: {x}" for x in report.notices] + kept * bool(report.float_layers)


def file_figures(
    files: Mapping[str, Path], sets: Datasets, report: ReportSection, *, timed: bool
) -> dict[str, dict[str, Any]]:
    """Of each deployed file: accuracy on test images, bytes, and latency, all files timed in turns.

    Several processes share the test images; one of them is to time (`timed`).
    """
    found: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        test = score(Deployed(path), sets.test)
        info = deployed_info(path)
        found[name] = {
            "test_accuracy": test.accuracy,
            "n_test": test.n,
            "file_bytes": deployed_bytes(path),
            "float_layers": info.get("float_layers", []),
            "latency": [],
        }
    for batch in report.batch_sizes if files and timed else ():
        times = compare_latency(
            files, batch_size=batch, repeats=report.repeats, max_seconds=report.max_seconds
        )
        for name, latency in times.items():
            found[name]["latency"].append(dataclasses.asdict(latency))
    return found
