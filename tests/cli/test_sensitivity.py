"""`prune-dn sensitivity`: true figures in the table, the JSON, the page and the plot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import bad, document
from PIL import Image

from prune_dn.checkpoints.checkpoint import load, save, save_state_dict
from prune_dn.cli import app as cli
from prune_dn.data.datasets import ImageSet, calibration_loader, load_datasets
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import Plan, make_plan, recalibrate_batch_norm_
from prune_dn.pruning.ratios import FORMAT, SensitivityRow
from prune_dn.pruning.sensitivity import sensitivity
from prune_dn.run import sensitivity_report
from prune_dn.training import evaluate

Run = Callable[..., tuple[int, str, str]]
QUICK = ["--max-images", 50, "--ratios", "0.25,0.75"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `prune-dn sensitivity` in a folder of its own; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["sensitivity", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained() -> DenseNet:
    """A net that reads some digits, so that a cut costs accuracy."""
    torch.manual_seed(1)
    net = densenet((2, 2), 4, bn_size=2, stem="cifar", num_classes=10, in_channels=1)
    data = load_datasets("digits", image_size=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(3):
        for images, labels in calibration_loader(data.train, 64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    assert evaluate(net, data.val).accuracy > 0.6
    return net.eval()


@pytest.fixture
def net(trained: DenseNet, tmp_path: Path) -> Path:
    """A checkpoint that knows its data."""
    spec = load_datasets("digits", image_size=8).spec
    save(trained, tmp_path / "net.safetensors", info={"data": spec.to_dict()})
    return tmp_path / "net.safetensors"


def test_end_to_end(run: Run, net: Path) -> None:
    code, out, err = run(net, "--out", "sens", *QUICK)
    assert code == 0, err
    assert sorted(p.name for p in Path("sens").iterdir()) == [
        "report.html",
        "sensitivity.json",
        "sensitivity.md",
        "sensitivity.png",
    ]
    facts = json.loads(Path("sens/sensitivity.json").read_text())
    model = load(net)
    assert facts["format"] == FORMAT
    assert facts["split"].startswith("val ")
    assert (facts["n"], facts["macs"]) == (50, count(model, 8).macs)
    drops = {(r["name"], r["ratio"]): r["drop"] for r in facts["rows"]}
    assert {ratio for _, ratio in drops} == {0.25, 0.75}
    # The mapping is what it says, worked out again.
    for name in {name for name, _ in drops}:
        borne = [r for r in (0.25, 0.75) if drops[name, r] <= 0.5]
        assert facts["ratios"].get(name) == (max(borne) if borne else None)
    page = Path("sens/sensitivity.md").read_text()
    assert "# Sensitivity of net.safetensors" in page
    assert "50 images of digits" in page and "one image is 2.00 points" in page
    assert "![heat map of the drops](sensitivity.png)" in page
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(table) == len({name for name, _ in drops})
    shown = [float(line[4]) for line in table]
    assert shown == sorted(shown, reverse=True), "most sensitive first"
    assert shown[0] > shown[-1] + 5
    assert shown[0] == round(max(d for (_, r), d in drops.items() if r == 0.75), 2)
    for line in table:
        assert line[0].removeprefix("| ") in out
    with Image.open("sens/sensitivity.png") as image:
        image.load()
        assert min(image.size) > 200
    assert "written: sens/sensitivity.json" in out


def by_hand(net: Path, metric: str, batches: int) -> list[Any]:
    """The rows from the Python face, on the same balanced validation images."""
    data = load_datasets("digits", image_size=8)

    def score(small: torch.nn.Module) -> float:
        if batches:
            loader = calibration_loader(data.train, 64)
            recalibrate_batch_norm_(small, loader, max_batches=batches)
        found = evaluate(small, data.val)
        return 100 * found.accuracy if metric == "accuracy" else found.loss

    return sensitivity(
        load(net), score, ratios=[0.5], input_size=8, higher_is_better=metric == "accuracy"
    )


@pytest.mark.parametrize(("metric", "batches"), [("accuracy", 0), ("loss", 2)])
def test_the_figures_are_those_of_the_python_face(
    run: Run, net: Path, metric: str, batches: int
) -> None:
    options = ["--metric", metric, "--recalibrate", batches, "--ratios", 0.5, "--json"]
    facts = document(run(net, "--out", "sens", *options))
    assert facts == json.loads(Path("sens/sensitivity.json").read_text())
    expected = by_hand(net, metric, batches)
    assert facts["dense"] == pytest.approx(expected[0].dense)
    assert [r["name"] for r in facts["rows"]] == [r.name for r in expected]
    for found, row in zip(facts["rows"], expected, strict=True):
        assert found["drop"] == pytest.approx(row.drop, abs=1e-9)
        assert found["macs_saved"] == row.macs_saved
    assert facts["recalibrated_on_batches"] == batches
    assert facts["max_drop"] == (0.5 if metric == "accuracy" else 0.05)


def test_no_test_image_is_looked_at(run: Run, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only held-out training images are read, evenly from the classes."""
    data = load_datasets("digits", image_size=8)
    original, looked = ImageSet.__getitems__, []

    def watched(self: ImageSet, indices: Any) -> Any:
        looked.append((len(self.images.labels), self.indices[torch.as_tensor(indices)]))
        return original(self, indices)

    monkeypatch.setattr(ImageSet, "__getitems__", watched)
    document(run(net, "--out", "sens", *QUICK, "--json"))
    assert {size for size, _ in looked} == {len(data.train) + len(data.val)}
    seen = torch.cat([indices for _, indices in looked]).unique()
    assert len(seen) == 50 and torch.isin(seen, data.val.indices).all()
    assert data.val.images.labels[seen].bincount().tolist() == [5] * 10


def test_criteria_that_read_images_and_other_units(run: Run, net: Path) -> None:
    options = ["--criterion", "taylor", "--calibration", 40, "--units", "edge", *QUICK]
    facts = document(run(net, "--out", "sens", *options, "--json"))
    assert facts["calibration_images"] == 40
    assert {r["kind"] for r in facts["rows"]} == {"edge"}
    kept = document(run(net, "--out", "sens", "--protect", "*block1*", *QUICK, "--json"))
    assert not any("block1" in r["name"] for r in kept["rows"])
    assert r"Protected: \*block1\*" in Path("sens/sensitivity.md").read_text()


def test_its_ratios_make_a_plan(run: Run, net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document(run(net, "--out", "sens", *QUICK, "--metric", "loss", "--json"))
    command = ["prune", str(net), "--ratio", "0.3", "--unit", "macs", "--criterion", "l2"]
    command += ["--ratios", "sens/sensitivity.json", "--plan-out", "plan.json", "-o"]
    assert cli.main([*command, "small.safetensors"]) == 0
    plan = Plan.load("plan.json")
    rows = [
        SensitivityRow(**row)
        for row in json.loads(Path("sens/sensitivity.json").read_text())["rows"]
    ]
    again = make_plan(load(net), 0.3, unit="macs", criterion="l2", input_size=8, ratios=rows)
    assert plan.keep_indices == again.keep_indices
    assert plan.requested["ratios"] == "sens/sensitivity.json"
    assert load("small.safetensors").config == plan.config_after
    capsys.readouterr()
    result = cli.main([*command, "x.safetensors", "--units", "edge"]), *capsys.readouterr()
    bad(result, "sensitivity.json has measured no edge units")
    assert not Path("x.safetensors").exists()


def test_max_drop(run: Run, net: Path) -> None:
    all_borne = document(run(net, "--out", "a", *QUICK, "--max-drop", 100, "--json"))
    assert set(all_borne["ratios"].values()) == {0.75}
    assert set(all_borne["ratios"]) == {r["name"] for r in all_borne["rows"]}
    _, out, _ = run(net, "--out", "a", *QUICK, "--max-drop", 0.1)
    assert "one image is 2.00 points; use more images" in out


def test_help_says_which_images(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert re.search(r"never\s+from\s+test\s+images", out)
    assert re.search(r"^  +prune-dn sensitivity ", out, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "half"], "--ratios 'half': give fractions with commas"),
        (["--ratios", "0.5,1"], r"ratios: 1.0 must be a number in \(0, 1\)"),
        (["--ratios", "50"], "did you mean 0.5"),
        (["--ratios", ""], "--ratios '': give fractions"),
        (["--criterion", "l3"], "criterion 'l3' is unknown; choose from"),
        (["--units", "edges"], "units 'edges' is unknown"),
        (["--units", ""], "units is empty"),
        (["--protect", "nobody"], "protect pattern 'nobody' matches no module"),
        (["--metric", "f1"], "--metric 'f1' is unknown; choose from accuracy, loss"),
        (["--max-drop", -1], "max_drop is -1.0; it must be a number of at least 0"),
        (["--max-drop", "nan"], "max_drop is nan"),
        (["--max-images", 0], "Invalid value for '--max-images'"),
        (["--calibration", 8], "--calibration has no effect: criterion 'l2'"),
        (["--data", "digit"], "data set 'digit' is unknown"),
        (["--out", "net.safetensors"], "net.safetensors is a file; give a folder"),
        (["--out", "net.safetensors/x"], "net.safetensors is a file; give a folder"),
    ],
)
def test_bad_arguments(run: Run, net: Path, arguments: list[Any], message: str) -> None:
    bad(run(net, "--out", "sens", *arguments), message)
    assert not Path("sens").exists()


def test_bad_checkpoint(run: Run, net: Path, tmp_path: Path) -> None:
    bad(run("none.safetensors", "--out", "sens"), "cannot read none.safetensors: No such file")
    save_state_dict(load(net), "plain.pt")
    bad(run("plain.pt", "--out", "sens"), r"does not say what data .* add --data")
    save(densenet((2,), 4, stem="cifar", num_classes=3, in_channels=1), tmp_path / "3.safetensors")
    bad(run("3.safetensors", "--data", "digits", "--out", "sens"), "has 3 classes, the data set")
    bad(run(net), "Missing option '--out'")
    assert not Path("sens").exists()


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    """A loss can overflow: JSON has null there, and table and plot still come."""
    rows = [
        {"name": "features.conv0", "kind": "stream", "ratio": 0.5, "size": 8, "drop": float("inf")},
        {"name": "features.norm5", "kind": "edge", "ratio": 0.5, "size": 8, "drop": float("nan")},
    ]
    facts = {
        "checkpoint": "a", "metric": "loss", "value_unit": "nats", "criterion": "l2", "n": 1,
        "dense": 1.0, "data": "digits", "split": "val", "one_image": None, "max_drop": 0.1,
        "ratios": {}, "recalibrated_on_batches": 0, "calibration_images": None, "protect": [],
        "seed": 0, "params": 1, "macs": 10, "image_size": 8, "machine": "none",
        "rows": [{**row, "macs_saved": 1} for row in rows],
    }  # fmt: skip
    sensitivity_report.write(facts, tmp_path)
    assert json.loads((tmp_path / "sensitivity.json").read_text())["rows"][0]["drop"] is None
    with Image.open(tmp_path / "sensitivity.png") as image:
        image.load()
