"""Commands that make deployed files, and those that read them: figures recomputed, no option without effect."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from commands import Run, bad, document, net, run  # noqa: F401  (fixtures)

from prune_dn.checkpoints.checkpoint import load
from prune_dn.data.datasets import load_datasets
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import deployed_bytes, deployed_info
from prune_dn.measure.profiling import count
from prune_dn.pruning import Plan
from prune_dn.run import pipeline
from prune_dn.run.deploying import digest_of
from prune_dn.run.recipe_file import parse_recipe
from prune_dn.training import evaluate

# ruff: noqa: F811


@pytest.mark.parametrize("file", ["small.int8.onnx", "small.int8.xml"])
def test_quantize_then_evaluate_and_profile_the_file(run: Run, net: Path, file: str) -> None:
    told = document(
        run("quantize", net, "-o", file, "--calibration", 40, "--batch-size", 1, "--json")
    )
    assert told["layers"] == 8 + 1 + 1 + 1 and told["float_layers"] == []
    found = document(run("evaluate", file, "--json"))  # data, size, mean and std are in the file
    data = load_datasets("digits", image_size=8, seed=0)
    test, val = (evaluate(Deployed(file), part) for part in (data.test, data.val))
    assert (found["accuracy"], found["n"]) == (test.accuracy, test.n)
    assert found["loss"] == pytest.approx(test.loss)
    assert told["val_accuracy"] == val.accuracy
    assert told["val_accuracy_float"] == evaluate(load(net), data.val).accuracy
    assert found["macs"] == count(load(net), 8).macs
    assert found["images"]["image_size_from"] == "from the file"
    seen = document(run("profile", file, "--batch-size", 3, "--repeats", 2, "--json"))
    (latency,) = seen["latency"]
    assert (latency["batch_size"], latency["n"], latency["precision"]) == (3, 2, "int8")
    assert seen["file_bytes"] == deployed_bytes(file) and seen["inputs"] == [[None, 1, 8, 8]]
    code, out, _ = run("profile", file, "--batch-size", 1, "--repeats", 1)
    assert code == 0 and ", int8" in out


def test_export_for_openvino_and_bf16(run: Run, net: Path) -> None:
    document(run("export", net, "-o", "net.xml", "--json"))
    assert Path("net.bin").stat().st_size > 1000
    assert deployed_info("net.xml")["data"]["name"] == "digits"
    seen = document(
        run(
            "profile", "net.xml", "--precision", "bf16", "--batch-size", 1, "--repeats", 1, "--json"
        )
    )
    assert seen["latency"][0]["precision"] == "bf16"
    exact, low = (
        document(run("evaluate", "net.xml", "--precision", p, "--json"))["loss"]
        for p in ("no", "bf16")
    )
    assert low == pytest.approx(exact, rel=0.1)
    seen = document(
        run("profile", net, "--runtime", "openvino", "--precision", "int8", "--batch-size", 1,
            "--repeats", 1, "--json")
    )  # fmt: skip
    assert seen["latency"][0]["runtime"].startswith("openvino ")
    assert seen["latency"][0]["precision"] == "int8" and seen["layers"]


def test_the_file_of_a_cut_names_its_plan(run: Run, net: Path) -> None:
    how = ("--ratio", 0.3, "-o", "s.safetensors", "--plan-out", "plan.json", "--export", "s.onnx")
    document(run("prune", net, *how, "--json"))
    digest = digest_of(Plan.load("plan.json"))["plan_digest"]
    assert deployed_info("s.onnx")["plan_digest"] == digest
    document(run("export", "s.safetensors", "-o", "again.onnx", "--json"))
    assert deployed_info("again.onnx")["plan_digest"] == digest


def test_what_has_no_effect_or_cannot_be(run: Run, net: Path) -> None:
    document(run("export", net, "-o", "net.onnx", "--json"))
    files = set(os.listdir())
    for arguments, message in (
        (
            ("quantize", net, "-o", "x.pt2"),
            "the ending says the runtime; use .onnx (onnxruntime), .xml",
        ),
        (("quantize", net, "-o", net), "is the checkpoint itself; name another file"),
        (("evaluate", "net.onnx", "--ema"), "--ema has no effect on net.onnx, a deployed file"),
        (("evaluate", "net.onnx", "--recalibrate", 2), "--recalibrate has no effect on net.onnx"),
        (("evaluate", "net.onnx", "--precision", "bf16"), "onnxruntime has no bf16"),
        (("evaluate", "net.onnx", "--image-size", 9), "takes 8 pixels a side, --image-size says 9"),
        (("evaluate", "gone.xml"), "cannot read gone.xml: No such file"),
        (("profile", "net.onnx", "--runtime", "eager"), "--runtime has no effect on net.onnx"),
        (("profile", "net.onnx", "--precision", "int8"), "--precision int8 has no effect"),
        (("profile", net, "--precision", "int8"), "eager has no int8; it has fp32, bf16"),
        (("export", net, "-o", "net.tflite"), "the ending says the format; use .onnx, .xml, .pt2"),
    ):
        bad(run(*arguments), re.escape(message))
    assert set(os.listdir()) == files


def test_a_run_leaves_int8_files_and_tells_of_them(tmp_path: Path) -> None:
    recipe = parse_recipe(
        "model: {name: densenet, block_config: [2], growth_rate: 4, stem: cifar}\n"
        "data: {name: digits, image_size: 8, limit: 64}\n"
        "train: {epochs: 1, batch_size: 16, learning_rate: 0.05}\n"
        "prune: {pruning_ratio: 0.3, unit: macs, recalibrate_batches: 2}\n"
        "export: {openvino: true, int8: [onnxruntime, openvino]}\n"
        "report: {batch_sizes: [1, 2], repeats: 2}\n",
        overrides=[f"output_dir={json.dumps(str(tmp_path / 'run'))}"],
    )
    result = pipeline.run(recipe, progress=False)
    files = result.metrics["files"]
    names = ["model.onnx", "model.xml", "model.int8.onnx", "model.int8.xml"]
    assert list(files) == names
    data, plan = load_datasets("digits", image_size=8, limit=64, seed=0), tmp_path / "run/plan.json"
    for name in names:
        path = result.output_dir / name
        test = evaluate(Deployed(path), data.test)
        assert (files[name]["test_accuracy"], files[name]["n_test"]) == (test.accuracy, test.n)
        assert files[name]["file_bytes"] == deployed_bytes(path)
        assert [row["batch_size"] for row in files[name]["latency"]] == [1, 2]
        told = deployed_info(path)
        assert told["data"] == data.spec.to_dict() and told["macs"] == count(result.model, 8).macs
        assert told["plan_digest"] == digest_of(Plan.load(plan))["plan_digest"]
    text = (result.output_dir / "report.md").read_text().partition("## Deployed files")[2]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, row in zip(names, rows, strict=True):
        assert (
            f"`{name}`" in row and row.count(" ms |") == 2 and ("int8 |" in row) == ("int8" in name)
        )
    again = pipeline.run(recipe, progress=False)
    assert again.metrics == result.metrics
