"""Measured latency: median of many runs after a warm-up, with the machine that it was taken on."""

from __future__ import annotations

import contextlib
import copy
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
from prune_dn.base.runtimes import RUNTIMES, Runtime
from prune_dn.deploy.export import export_onnx
from prune_dn.errors import PruneDNError
from prune_dn.graph.inference import arguments
from prune_dn.models.examples import for_net, in_batch
from prune_dn.models.examples import in_channels as channels_of
from prune_dn.models.sizes import ImageSize

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
Timed = nn.Module | Callable[..., Any]


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


def measure_latency(
    fn_or_model: Timed,
    *,
    batch_size: int,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
    runtime: Runtime = "eager",
    onnx_path: str | os.PathLike[str] | None = None,
    channels_last: bool = True,
    threads: int | None = None,
    max_seconds: float | None = None,
) -> Latency:
    """How long one batch takes. See `compare_latency` for the arguments and errors."""
    return compare_latency(
        {"model": fn_or_model},
        batch_size=batch_size,
        image_size=image_size,
        example_inputs=example_inputs,
        in_channels=in_channels,
        repeats=repeats,
        warmup=warmup,
        runtime=runtime,
        onnx_paths=None if onnx_path is None else {"model": onnx_path},
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
    onnx_paths: Mapping[str, str | os.PathLike[str]] | None = None,
    channels_last: bool = True,
    threads: int | None = None,
    max_seconds: float | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that a slow moment of the machine meets all of them.

    A model is a module (a copy in eval mode runs where its weights are; it is not touched) or any
    function of a batch. It gets random images of `image_size`, or `example_inputs` as it is called (see
    `export_onnx`), their rows in turn. `runtime="onnxruntime"` times `onnx_paths[name]` on the CPU, or
    the model exported for the purpose. `threads=None` is PyTorch's present number, for both
    runtimes. After `max_seconds` no new round begins: `n` says how many there were.

    Raises PruneDNError for a size below 1, models that need `in_channels`, and where neither or both of
    `image_size` and `example_inputs` are given.
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
    if (image_size is None) == (example_inputs is None):
        raise PruneDNError("give image_size in pixels, or example_inputs")
    if onnx_paths is not None and runtime != "onnxruntime":
        raise PruneDNError("an ONNX file is only timed with runtime='onnxruntime'")
    for name, file in (onnx_paths or {}).items():
        if name not in models or not Path(file).is_file():
            raise PruneDNError(f"the ONNX file {file} of {name!r} is missing, or its model is")
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(_threads(threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs, device = {}, torch.device("cpu")
        for number, (name, model) in enumerate(models.items()):
            if example_inputs is None:
                inputs = _images(batch_size, _channels(model, in_channels), image_size)
            else:
                inputs = in_batch(example_inputs, batch_size)
            if runtime == "onnxruntime":
                path = (onnx_paths or {}).get(name)
                if path is None:
                    path = folder / f"{number}.onnx"
                    given = {"image_size": image_size, "example_inputs": example_inputs}
                    export_onnx(model, path, **given)  # type: ignore[arg-type]
                runs[name] = _onnx_run(Path(path), inputs, threads)
            else:
                device = _device(model)
                runs[name] = _eager_run(model, inputs, channels_last)
        with torch.inference_mode():
            times = in_turns(runs, repeats, warmup, max_seconds)
        where = machine(device, threads)
    label = runtime if runtime == "eager" else f"onnxruntime {_onnxruntime_version()}"
    results = {}
    for name, taken in times.items():
        median, p10, p90 = (float(q) for q in np.percentile(taken, [50, 10, 90]) * 1e3)
        results[name] = Latency(median, p10, p90, len(taken), batch_size, label, where)
    return results


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


def _eager_run(model: Timed, inputs: Any, channels_last: bool) -> Callable[[], None]:
    def laid_out(x: Any) -> Any:
        if not isinstance(x, Tensor) or not channels_last or x.ndim not in _CHANNELS_LAST:
            return x
        return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])

    if isinstance(model, nn.Module):
        inputs = for_net(inputs, model)
        model = copy.deepcopy(model).eval()
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


def _onnx_run(path: Path, inputs: Any, threads: int) -> Callable[[], None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would wait for work in a busy loop, and take the cores from the model timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = [x.cpu() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    arrays = [(x.float() if x.is_floating_point() else x).numpy() for x in given]
    feed = {entry.name: x for entry, x in zip(session.get_inputs(), arrays, strict=True)}

    def run() -> None:
        session.run(None, feed)

    return run


def _images(batch: int, channels: int, image_size: ImageSize | None) -> Tensor:
    assert image_size is not None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, height, width, generator=generator)


def _channels(model: Timed, in_channels: int | None) -> int:
    if in_channels is not None:
        return in_channels
    if isinstance(model, nn.Module):
        return channels_of(model)
    raise PruneDNError(f"in_channels is needed to time a {type(model).__name__}")


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


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"
