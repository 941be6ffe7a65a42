"""Deployed files of every format: the net's answers, what they say of themselves, none half-written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import onnx
import pytest
import torch
from oracle import randomise_

import prune_dn
from prune_dn.base.files import atomic_paths
from prune_dn.deploy import about
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import FORMATS, deployed_bytes, deployed_info
from prune_dn.deploy.onnx_files import export_onnx
from prune_dn.deploy.openvino_files import export_openvino
from prune_dn.errors import ExportError, RuntimeMissingError, WriteError
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import make_plan

INFO = {
    "data": {"name": "digits", "mean": [0.3], "std": [0.4], "classes": ["a", 'b <"&>']},
    "plan_digest": "0123",
    "history": "long",
}


def net() -> DenseNet:
    return randomise_(densenet([2, 2], 4, stem="cifar", num_classes=3, in_channels=1), 0).eval()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_answers_as_the_net_and_says_what_it_is(tmp_path: Path, ending: str) -> None:
    path, model = tmp_path / f"net{ending}", net()
    FORMATS[ending].export(model, path, image_size=(8, 12), info=INFO)
    told = deployed_info(path)
    assert (told["data"], told["plan_digest"]) == (INFO["data"], "0123")
    assert told["precision"] == "fp32" and told["prune_dn_version"] == prune_dn.__version__
    assert "history" not in told
    found = Deployed(path)
    assert (found.in_channels, found.image_size) == (1, (8, 12))
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 12)
        with torch.no_grad():
            torch.testing.assert_close(found(x), model(x), rtol=0, atol=1e-4)
    assert deployed_bytes(path) == sum(p.stat().st_size for p in tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"does not run on inputs of shape \(2, 3, 8, 12\)"):
        found(torch.randn(2, 3, 8, 12))


def test_a_dense_block_concatenates_each_map_once(tmp_path: Path) -> None:
    """What begins with an earlier concatenation reads that: the first layers of a block are read once each."""
    export_onnx(net(), tmp_path / "net.onnx", image_size=8)
    graph = onnx.load(tmp_path / "net.onnx").graph
    joins = [node for node in graph.node if node.op_type == "Concat"]
    assert [len(node.input) for node in joins] == [2] * 4
    made = {node.output[0] for node in joins}
    assert sum(node.input[0] in made for node in joins) == 2  # the second one of each block
    names = {node.name for node in graph.node if node.op_type in ("Conv", "Gemm")}
    assert {"features.conv0", "features.denseblock2.denselayer1.conv1", "classifier"} <= names


def test_openvino_is_two_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.xml"
    report = export_openvino(net(), path, image_size=8)
    assert sorted(os.listdir(tmp_path)) == ["net.bin", "net.xml"]
    assert report.size_bytes == deployed_bytes(path) and report.max_abs_error < 1e-4
    before = [(tmp_path / name).read_bytes() for name in ("net.xml", "net.bin")]
    with pytest.raises(ExportError, match="the OpenVINO net differs from the model"):
        export_openvino(randomise_(net(), 1), path, image_size=8, tolerance=0)
    replace, calls = os.replace, []

    def fails_at(number: int):  # type: ignore[no-untyped-def]
        def once(old: object, new: object) -> None:
            calls.append(new)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            replace(old, new)  # type: ignore[arg-type]

        return once

    for number in range(1, 5):  # two old files aside, two new ones in place
        calls.clear()
        monkeypatch.setattr(os, "replace", fails_at(number))
        with pytest.raises(WriteError, match=r"net.xml and .*net.bin: No space left"):
            export_openvino(randomise_(net(), 1), path, image_size=8)
        monkeypatch.undo()
        assert [(tmp_path / name).read_bytes() for name in ("net.xml", "net.bin")] == before
        assert sorted(os.listdir(tmp_path)) == ["net.bin", "net.xml"]
    with pytest.raises(ExportError, match=r"net.onnx must end in .xml"):
        export_openvino(net(), tmp_path / "net.onnx", image_size=8)
    (tmp_path / "net.bin").unlink()
    with pytest.raises(ExportError, match=r"cannot read .*net.bin: No such file"):
        Deployed(path)


def test_new_files_that_cannot_all_be_placed_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with (
        pytest.raises(WriteError, match="it is a folder"),
        atomic_paths(tmp_path / "a", tmp_path / "b"),
    ):
        pass
    assert os.listdir(tmp_path) == ["b"]


def test_a_runtime_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = r"needs openvino, .* pip install 'prune_dn\[openvino\]'"
    with pytest.raises(RuntimeMissingError, match=message):
        export_openvino(net(), tmp_path / "net.xml", image_size=8)
    with pytest.raises(RuntimeMissingError, match=message):
        prune_dn.measure_latency(net(), batch_size=1, image_size=8, runtime="openvino")
    calibration = [torch.randn(4, 1, 8, 8)]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(RuntimeMissingError, match=r"needs nncf, .* pip install 'prune_dn\[open"):
        prune_dn.quantize(net(), tmp_path / "net.xml", calibration=calibration, runtime="openvino")
    assert os.listdir(tmp_path) == []


def test_files_that_are_none(tmp_path: Path) -> None:
    for ending in FORMATS:
        path = tmp_path / f"bad{ending}"
        with pytest.raises(ExportError, match=rf"cannot read .*bad{ending}: No such file"):
            Deployed(path)
        path.write_bytes(b"nothing of the kind")
        path.with_suffix(".bin").write_bytes(b"")
        for read in (Deployed, deployed_info):
            with pytest.raises(ExportError, match=rf"bad{ending}"):
                read(path)
    with pytest.raises(
        ExportError, match=r"is no deployed file; these end in \.onnx, \.xml, \.pt2"
    ):
        Deployed(tmp_path / "net.txt")
    for text in ("{", "[1]", "[" * 100_000):
        with pytest.raises(ExportError, match=r"net.onnx is damaged: what it says of itself is no"):
            about.parse(text, Path("net.onnx"))
    with pytest.raises(ExportError, match="info holds what JSON cannot"):
        about.describe({"macs": float("nan")})
    assert json.loads(about.describe(None))["prune_dn_version"]


def test_what_a_runtime_does_not_compute_in(tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "net.onnx", image_size=8)
    with pytest.raises(ExportError, match=r"net.onnx cannot run so: onnxruntime has no bf16"):
        Deployed(tmp_path / "net.onnx", "bf16")


def test_a_latency_budget_has_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prune_dn.PruneConfig(0.3, unit="latency", runtime="openvino", precision="int8")
    assert asked.timed == ("openvino", 1, "int8")
    with pytest.raises(
        prune_dn.errors.PruningError, match="precision 'bf16' cannot be had: onnxru"
    ):
        prune_dn.PruneConfig(0.3, unit="latency", precision="bf16")
    with pytest.raises(prune_dn.errors.PruningError, match="precision has no effect with unit 'ch"):
        prune_dn.PruneConfig(0.3, precision="int8")
    seen = []
    compare = prune_dn.measure.latency.compare_latency

    def watched(nets, **how):  # type: ignore[no-untyped-def]
        seen.append((how["runtime"], how["precision"], how["batch_size"]))
        return compare(nets, **{**how, "runtime": "eager", "precision": "fp32", "repeats": 1})

    monkeypatch.setattr(prune_dn.pruning.latency_model, "compare_latency", watched)
    model = prune_dn.fit_latency_model(
        net(), runtime="onnxruntime", precision="int8", image_size=8, nets=5, repeats=1
    )
    assert seen == [("onnxruntime", "int8", 1)] and model.precision == "int8"
    with pytest.raises(
        prune_dn.errors.PruningError, match="was fitted with precision 'int8', and 'fp32' is asked"
    ):
        make_plan(net(), 0.3, unit="latency", precision="fp32", latency_model=model, input_size=8)
