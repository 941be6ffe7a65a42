"""Latency on a clock that the tests turn, and on the real one."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from other_nets import NETS
from torch import nn

import prune_dn.measure.latency
from prune_dn.deploy.onnx_files import export_onnx
from prune_dn.errors import PruneDNError
from prune_dn.measure.latency import compare_latency, machine, measure_latency
from prune_dn.models import DenseNet, densenet


class Clock:
    """Functions that take the milliseconds that they are told to, and a log of who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def function(self, name: str, *milliseconds: float):  # type: ignore[no-untyped-def]
        left = list(milliseconds)

        def run(images: torch.Tensor) -> None:
            self.log.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        prune_dn.measure.latency, "time", SimpleNamespace(perf_counter=lambda: clock.now)
    )
    return clock


SIZE = {"batch_size": 2, "image_size": 8, "in_channels": 3}


def net() -> DenseNet:
    return densenet([1], 4, stem="cifar", num_classes=2)


def test_quantiles_leave_out_the_warmup(clock: Clock) -> None:
    slow_start = clock.function("f", 900, 900, *range(1, 12))
    found = measure_latency(slow_start, repeats=11, warmup=2, **SIZE)
    assert (found.n, found.batch_size, found.runtime) == (11, 2, "eager")
    assert found.p10_ms == pytest.approx(2)
    assert found.median_ms == pytest.approx(6)
    assert found.p90_ms == pytest.approx(10)
    assert len(clock.log) == 13


def test_models_take_turns(clock: Clock) -> None:
    models = {name: clock.function(name, ms) for name, ms in (("a", 1), ("b", 20), ("c", 3))}
    found = compare_latency(models, repeats=4, warmup=1, **SIZE)
    assert "".join(clock.log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [round(found[name].median_ms) for name in "abc"] == [1, 20, 3]
    assert list(found) == ["a", "b", "c"]


def test_time_budget(clock: Clock) -> None:
    found = measure_latency(clock.function("f", 1000), repeats=30, warmup=2, max_seconds=7, **SIZE)
    assert found.n == 6  # two of warm-up; the round that passes the seventh second is the last
    clock.log.clear()
    one = measure_latency(clock.function("f", 9000), repeats=30, warmup=5, max_seconds=1, **SIZE)
    assert one.n == 1 and len(clock.log) == 2


def test_a_real_model_is_timed_and_not_touched() -> None:
    model = net().train()
    model.features.norm5.eval()
    state = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure_latency(model, batch_size=3, image_size=(8, 12), repeats=4, threads=2)
    assert found.n == 4 and 0 < found.p10_ms <= found.median_ms <= found.p90_ms < 10_000
    assert "2 threads" in found.machine
    assert torch.equal(rng, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert model.training and not model.features.norm5.training
    for key, (value, stride) in state.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert model.state_dict()[key].stride() == stride


@pytest.mark.parametrize("channels_last", [True, False])
def test_what_the_model_is_given(channels_last: bool) -> None:
    seen = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.shape, x.dtype, self.training, torch.is_grad_enabled()))
            for t in (x, self.conv.weight):
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert t.is_contiguous(memory_format=layout)
            return self.conv(x)

    measure_latency(
        Watch(), batch_size=2, image_size=(8, 6), in_channels=3, repeats=2, warmup=0,
        channels_last=channels_last,
    )  # fmt: skip
    assert seen == [((2, 3, 8, 6), torch.float64, False, False)] * 2


def test_onnxruntime(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "net.onnx"
    export_onnx(model, path, image_size=8)
    options = {"batch_size": 2, "image_size": 8, "runtime": "onnxruntime", "repeats": 3}
    found = measure_latency(model, **options)
    assert found.n == 3 and found.runtime.startswith("onnxruntime 1.")
    assert 0 < found.p10_ms <= found.median_ms
    both = compare_latency({"a": path, "b": model}, **options)
    assert both["a"].n == both["b"].n == 3
    assert os.listdir(tmp_path) == ["net.onnx"]  # the export of b is gone again


@pytest.mark.parametrize("name", ["two inputs", "volume"])
def test_any_net_on_its_example(name: str) -> None:
    build, example, _ = NETS[name]
    batches: list[int] = []
    net, inputs = build(), example()
    hook = net.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    options = {"batch_size": 5, "example_inputs": inputs, "repeats": 2, "warmup": 0}
    assert measure_latency(net, **options).n == 2  # type: ignore[arg-type]
    assert batches == [5, 5]
    hook.remove()
    assert measure_latency(net, runtime="onnxruntime", **options).n == 2  # type: ignore[arg-type]


def test_who_is_not_timed_leaves_the_cores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads do not wait for work in a loop."""
    path, options = tmp_path / "net.onnx", []
    export_onnx(net(), path, image_size=8)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda file, given, **how: options.append(given) or session(file, given, **how),
    )
    measure_latency(path, batch_size=1, threads=2, repeats=1)
    given = options[-1]
    assert given.get_session_config_entry("session.force_spinning_stop") == "1"
    assert given.intra_op_num_threads == 2


def test_machine_says_what_it_is() -> None:
    torch.set_num_threads(1)
    text = machine()
    assert text.endswith(f"1 thread, torch {torch.__version__}")
    assert "cores" in text and text.split(",")[0].strip()
    assert "3 threads" in machine(threads=3)
    if platform.system() == "Linux":
        assert f"{len(os.sched_getaffinity(0))} cores" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"warmup": -1}, "warmup is -1; it must be at least 0"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        (
            {"runtime": "tensorrt"},
            "runtime is 'tensorrt'; choose 'eager' or 'onnxruntime' or 'openvino'",
        ),
        ({"image_size": None}, "give image_size in pixels, or example_inputs"),
        ({"in_channels": None}, "in_channels is needed to time a function"),
        ({"precision": "int4"}, "precision is 'int4'; choose 'fp32' or 'bf16' or 'int8'"),
        ({"precision": "int8"}, "eager has no int8; it has fp32, bf16, and int8 is in onnxruntime"),
        (
            {"precision": "bf16", "runtime": "onnxruntime"},
            "onnxruntime has no bf16; it has fp32, int8",
        ),
        ({"precision": "bf16"}, "precision has no effect on a function; leave it out"),
    ],
)
def test_errors(options: dict[str, object], text: str) -> None:
    with pytest.raises(PruneDNError, match=text):
        measure_latency(lambda x: x, **{**SIZE, **options})


def test_no_models() -> None:
    with pytest.raises(PruneDNError, match="number of models is 0; it must be at least 1"):
        compare_latency({}, **SIZE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_is_waited_for() -> None:
    big = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(20)]).cuda()
    found = measure_latency(big, batch_size=32, image_size=128, in_channels=64, repeats=5)
    assert found.median_ms > 1  # a launch alone takes some microseconds
    assert torch.cuda.get_device_name() in found.machine
