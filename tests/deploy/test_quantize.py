"""int8 files: close to the float net, by both tools; bad input leaves nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import prune_dn
from prune_dn.deploy import onnxruntime_int8
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import deployed_info
from prune_dn.errors import ExportError
from prune_dn.models import densenet
from prune_dn.training import evaluate

ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml"}
torch.manual_seed(0)
LABELS = torch.arange(48) % 3
IMAGES = torch.randn(48, 1, 8, 8) * 0.3 + (LABELS - 1.0).view(-1, 1, 1, 1)
BATCHES = [(IMAGES[:32], LABELS[:32]), (IMAGES[32:], LABELS[32:])]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A DenseNet that knows light from dark."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = densenet([2, 2], 8, stem="cifar", num_classes=3, in_channels=1)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("runtime", ENDINGS)
def test_the_file_is_close_and_says_so(
    net: nn.Module, tmp_path: Path, runtime: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"small.int8{ENDINGS[runtime]}"
    info = {"data": {"mean": [0.5], "std": [0.5]}}
    report = prune_dn.quantize(net, path, calibration=BATCHES, runtime=runtime, info=info)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    small = Deployed(path)
    with torch.no_grad():
        wanted, found = net(IMAGES), small(IMAGES)
    # the report's figures, computed in another way
    error = (found - wanted).double().norm() / wanted.double().norm()
    assert report.error == pytest.approx(float(error), rel=0.05) and 0 < report.error < 0.1
    assert report.agreement == (found.argmax(1) == wanted.argmax(1)).float().mean()
    assert report.metric_float == evaluate(net, BATCHES).accuracy
    assert report.metric == evaluate(small, BATCHES).accuracy
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    assert report.layers == layers and report.float_layers == ()
    told = deployed_info(path)
    assert told["precision"] == "int8" and told["data"] == info["data"]
    cost = prune_dn.count(net, 8)
    assert (told["macs"], told["params"]) == (cost.macs, cost.params)
    plain, int8 = report.latency[0]
    assert (plain.precision, int8.precision, int8.batch_size) == ("fp32", "int8", 1)
    assert bool(report.notices) == (int8.median_ms >= plain.median_ms)
    parts = 2 if runtime == "openvino" else 1
    assert len(os.listdir(tmp_path)) == parts
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_onnxruntime_gets_unsigned_activations_and_signed_weights(
    net: nn.Module, tmp_path: Path
) -> None:
    prune_dn.quantize(net, tmp_path / "a.onnx", calibration=[IMAGES])
    graph = onnx.load(tmp_path / "a.onnx").graph
    types = {entry.name: entry.data_type for entry in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in types]
    kinds = {types[n.input[0]] for n in weights if n.input[0].endswith(".weight_quantized")}
    assert kinds == {onnx.TensorProto.INT8}
    made = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {types[n.input[2]] for n in made} == {onnx.TensorProto.UINT8}


@contextlib.contextmanager
def spoilt(monkeypatch: pytest.MonkeyPatch, layer: str) -> Iterator[None]:
    """onnxruntime's quantiser harms every file in which this layer is in int8."""
    write = onnxruntime_int8._write

    def harm(source, parts, *how, **given):  # type: ignore[no-untyped-def]
        layers, plain = write(source, parts, *how, **given)
        if layer not in plain:
            proto = onnx.load(parts[0])
            bias = next(x for x in proto.graph.initializer if x.name.startswith("classifier.bias"))
            values = onnx.numpy_helper.to_array(bias)
            changed = values + (2**24 if values.dtype.kind == "i" else 100) * (
                values == values.max()
            )
            bias.CopyFrom(onnx.numpy_helper.from_array(changed.astype(values.dtype), bias.name))
            onnx.save(proto, parts[0])
        return layers, plain

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_int8, "_write", harm)
        yield


def test_layers_that_hurt_stay_in_float(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = "features.denseblock1.denselayer2.conv1"
    given = {"calibration": BATCHES, "max_drop": 0.01}
    with spoilt(monkeypatch, culprit):
        with pytest.raises(ExportError, match=r"differs from the net by .* of its answers"):
            prune_dn.quantize(net, tmp_path / "a.onnx", calibration=BATCHES)
        assert os.listdir(tmp_path) == []
    with spoilt(monkeypatch, culprit):
        report = prune_dn.quantize(net, tmp_path / "a.onnx", **given)  # type: ignore[arg-type]
    assert report.float_layers == (culprit,)
    assert deployed_info(tmp_path / "a.onnx")["float_layers"] == [culprit]
    assert report.metric is not None and report.metric_float is not None
    assert report.metric >= report.metric_float - 0.01


def test_openvino_has_accuracy_control(net: nn.Module, tmp_path: Path) -> None:
    """Whatever is quantised costs: everything goes back to float, and that is refused."""

    def harsh(candidate: nn.Module) -> float:
        with torch.no_grad():
            return -float((candidate(IMAGES) - net(IMAGES)).abs().max())

    with pytest.raises(ExportError, match=r"(cannot hold the metric|quantised none of the)"):
        prune_dn.quantize(
            net, tmp_path / "a.xml", calibration=[IMAGES], runtime="openvino", evaluate=harsh,
            max_drop=0.0,
        )  # fmt: skip
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calibration": []}, "calibration has no images"),
        ({"calibration": IMAGES}, "calibration is one tensor"),
        ({"calibration": [IMAGES.byte()]}, r"calibration batch 0 is .*uint8.* in floating point"),
        ({"calibration": [IMAGES[0]]}, r"each batch must be images \(N, C, H, W\)"),
        ({"calibration": [IMAGES / 0]}, "calibration batch 0 holds NaN or infinity"),
        (
            {"calibration": [IMAGES.repeat(1, 3, 1, 1)]},
            r"cannot run on example_inputs of shape \(48, 3",
        ),
        (
            {"calibration": [IMAGES, IMAGES[..., :6]]},
            r"have the shapes \[\(1, 8, 6\), \(1, 8, 8\)\]",
        ),
        ({"calibration": [(IMAGES, LABELS * 0)]}, "all 48 calibration images are of class 0"),
        ({"evaluate": lambda _: float("nan")}, "evaluate gave nan for the float net"),
        (
            {"evaluate": lambda _: "good"},
            "evaluate gave 'good' for the float net; it must return a num",
        ),
        ({"max_drop": -1}, "max_drop is -1; it must be a number of at least 0"),
        ({"max_drop": 0.1}, "max_drop needs evaluate, or labels"),
        ({"runtime": "eager"}, "runtime is 'eager'; int8 is in onnxruntime, openvino"),
        ({"runtime": "openvino"}, "a.onnx must end in .xml, as files for openvino do"),
    ],
)
def test_bad_input(net: nn.Module, tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        prune_dn.quantize(net, tmp_path / "a.onnx", **{"calibration": [IMAGES], **given})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_an_evaluate_that_breaks_later(net: nn.Module, tmp_path: Path) -> None:
    answers = iter([1.0, float("nan")])
    with pytest.raises(ExportError, match="evaluate gave nan for a quantised net"):
        prune_dn.quantize(
            net, tmp_path / "a.onnx", calibration=[IMAGES], evaluate=lambda _: next(answers)
        )
    assert os.listdir(tmp_path) == []
