"""Measured latency: median of many runs after a warm-up, with the machine that it was taken on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.runtimes import (
    PRECISIONS,
    RUNTIMES,
    Precision,
    Runtime,
    why_not_offered,
)
from prune_dn.deploy.deployed import Deployed, example
from prune_dn.deploy.formats import ENDINGS, FORMATS, deployed_info, open_deployed
from prune_dn.deploy.int8 import prepared, write_int8
from prune_dn.deploy.running import Running, arrays
from prune_dn.errors import PruneDNError
from prune_dn.graph.inference import arguments
from prune_dn.models.examples import for_net, in_batch
from prune_dn.models.examples import in_channels as channels_of
from prune_dn.models.sizes import ImageSize

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_IMAGES = 8  # random ones by which a net is quantised where only its time is asked for
Timed = nn.Module | Callable[..., Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one batch: median, 10 % and 90 % quantile of `n` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    batch_size: int
    runtime: str
    machine: str
    precision: str = "fp32"


def measure_latency(
    model: Timed,
    *,
    batch_size: int,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
    runtime: Runtime = "eager",
    precision: Precision = "fp32",
    channels_last: bool = True,
    threads: int | None = None,
    max_seconds: float | None = None,
) -> Latency:
    """How long one batch takes. See `compare_latency` for the arguments and errors."""
    return compare_latency(
        {"model": model},
        batch_size=batch_size,
        image_size=image_size,
        example_inputs=example_inputs,
        in_channels=in_channels,
        repeats=repeats,
        warmup=warmup,
        runtime=runtime,
        precision=precision,
        channels_last=channels_last,
        threads=threads,
        max_seconds=max_seconds,
    )["model"]


@usual_defaults()
def compare_latency(
    models: Mapping[str, Timed],
    *,
    batch_size: int,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
    runtime: Runtime = "eager",
    precision: Precision = "fp32",
    channels_last: bool = True,
    threads: int | None = None,
    max_seconds: float | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that a slow moment of the machine meets all of them.

    A model is a module (a copy in eval mode runs where its weights are; it is not touched), any function
    of a batch, or the path of a deployed file (.onnx, .xml, .pt2). A module gets random images of
    `image_size`, or `example_inputs` as it is called (see `export_onnx`), their rows in turn; a file
    gets them too, or without them random images of the size that it takes.

    `runtime` and `precision` are those of modules, which are exported for the purpose: `onnxruntime` and
    `openvino` (an extra) run on the CPU. `int8` quantises by random images with the first of the runtime's
    settings: the time is right, the answers are not; `quantize` writes files to use. In `eager`, `bf16`
    is a copy whose weights are bfloat16. A file is run by its own runtime, in the precision that
    it says, or with `bf16` in that where OpenVINO runs it. `threads=None` is PyTorch's present number,
    for all runtimes. After `max_seconds` no new round begins: `n` says how many there were.

    Raises PruneDNError for a size below 1, a precision that a runtime has not, models that need
    `in_channels`, and where neither or both of `image_size` and `example_inputs` are given, unless all
    are files; RuntimeMissingError for a runtime that is not installed.
    """
    for what, value, least in (
        ("batch_size", batch_size, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("threads", 1 if threads is None else threads, 1),
        ("number of models", len(models), 1),
    ):
        if value < least:
            raise PruneDNError(f"{what} is {value}; it must be at least {least}")
    if runtime not in RUNTIMES:
        raise PruneDNError(f"runtime is {runtime!r}; choose {' or '.join(map(repr, RUNTIMES))}")
    if precision not in PRECISIONS:
        raise PruneDNError(
            f"precision is {precision!r}; choose {' or '.join(map(repr, PRECISIONS))}"
        )
    files = [x for x in models.values() if isinstance(x, str | os.PathLike)]
    if len(files) < len(models) and (why := why_not_offered(runtime, precision)):
        raise PruneDNError(why)
    if (image_size is None) == (example_inputs is None) and not (
        len(files) == len(models) and image_size is None
    ):
        raise PruneDNError("give image_size in pixels, or example_inputs")
    inputs = _Inputs(batch_size, image_size, example_inputs, in_channels)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(_threads(threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs, labels, device = {}, {}, torch.device("cpu")
        for number, (name, model) in enumerate(models.items()):
            if isinstance(model, str | os.PathLike):
                feed = inputs.of(Deployed(model))
                runs[name], labels[name] = _file_run(Path(model), feed, precision, threads)
            elif runtime == "eager":
                device = _device(model)
                runs[name] = _eager_run(model, inputs.of(model), precision, channels_last)
                labels[name] = (runtime, precision)
            else:
                path = folder / f"{number}{ENDINGS[runtime]}"
                _write(model, path, inputs, runtime, precision)
                runs[name], labels[name] = _file_run(path, inputs.of(model), precision, threads)
        with torch.inference_mode():
            times = in_turns(runs, repeats, warmup, max_seconds)
        where = machine(device, threads)
    results = {}
    for name, taken in times.items():
        median, p10, p90 = (float(q) for q in np.percentile(taken, [50, 10, 90]) * 1e3)
        label, kind = labels[name]
        results[name] = Latency(median, p10, p90, len(taken), batch_size, label, where, kind)
    return results


@dataclass(frozen=True)
class _Inputs:
    """What models are timed on: a batch of images or of given inputs."""

    batch_size: int
    image_size: ImageSize | None
    example_inputs: Any
    in_channels: int | None

    def of(self, model: nn.Module | Callable[..., Any] | Deployed) -> Any:
        if self.example_inputs is not None:
            return in_batch(self.example_inputs, self.batch_size)
        if self.image_size is None:
            assert isinstance(model, Deployed)
            return example(model, self.batch_size)
        channels = self.in_channels
        if channels is None and isinstance(model, nn.Module):
            channels = model.in_channels if isinstance(model, Deployed) else channels_of(model)
        if channels is None:
            raise PruneDNError(f"in_channels is needed to time a {type(model).__name__}")
        return _images(self.batch_size, channels, self.image_size)


def _write(model: Any, path: Path, inputs: _Inputs, runtime: Runtime, precision: Precision) -> None:
    """Export a model to be timed."""
    given = {"image_size": inputs.image_size, "example_inputs": inputs.example_inputs}
    if precision != "int8":
        FORMATS[path.suffix].export(model, path, **given)
        return
    images = dataclasses.replace(inputs, batch_size=_IMAGES).of(model)
    with prepared(model, [images], path.parent) as source:
        write_int8(source, path, runtime, largest_error=None)


def _file_run(
    path: Path, inputs: Any, precision: Precision, threads: int
) -> tuple[Callable[[], None], tuple[str, str]]:
    """The run of a deployed file, and by what and in which precision it runs."""
    own = deployed_info(path).get("precision", "fp32")
    if precision != "bf16":
        precision = own
    feed = arrays(inputs)
    running: Running = open_deployed(path, precision, threads, [x.shape for x in feed])

    def run() -> None:
        running.run(feed)

    return run, (running.label, own if own == "int8" else precision)


def machine(device: torch.device | str = "cpu", threads: int | None = None) -> str:
    """The machine in words: CPU or GPU, cores that may be used, threads, PyTorch version."""
    threads = torch.get_num_threads() if threads is None else threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{_cpu_name()}", f"{cores} cores", f"{threads} thread{'s' if threads > 1 else ''}"]
    if torch.device(device).type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join([*parts, f"torch {torch.__version__}"])


def in_turns(
    runs: Mapping[str, Callable[[], None]], repeats: int, warmup: int, max_seconds: float | None
) -> dict[str, list[float]]:
    """Seconds of each run; every model runs once per round, and each round begins with another."""
    start, names = time.perf_counter(), list(runs)
    budget = float("inf") if max_seconds is None else max_seconds
    for _ in range(warmup):
        for name in names:
            runs[name]()
        if time.perf_counter() - start > budget / 2:
            break
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        if number and time.perf_counter() - start > budget:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def _eager_run(
    model: nn.Module | Callable[..., Any], inputs: Any, precision: Precision, channels_last: bool
) -> Callable[[], None]:
    def laid_out(x: Any) -> Any:
        if not isinstance(x, Tensor) or not channels_last or x.ndim not in _CHANNELS_LAST:
            return x
        return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])

    if precision == "bf16" and not isinstance(model, nn.Module):
        raise PruneDNError(f"precision has no effect on a {type(model).__name__}; leave it out")
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model).eval()
        model = model.bfloat16() if precision == "bf16" else model
        inputs = for_net(inputs, model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = laid_out(tensor.data)
    inputs = tree_map(laid_out, inputs)
    positional, named = arguments(inputs)
    function: Callable[..., Any] = model
    device = next((x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    synchronize = device is not None and device.type == "cuda"

    def run() -> None:
        function(*positional, **named)
        if synchronize:
            torch.cuda.synchronize(device)

    return run


def _images(batch: int, channels: int, image_size: ImageSize | None) -> Tensor:
    assert image_size is not None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, height, width, generator=generator)


def _device(model: Timed) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(parameters, torch.empty(0)).device


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"
