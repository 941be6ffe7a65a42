"""`prune-dn compare`: both sides' figures as a table and as JSON, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import bad, document
from PIL import Image

import prune_dn
from prune_dn.base.intervals import wilson
from prune_dn.cli import app as cli
from prune_dn.data.datasets import load_datasets
from prune_dn.measure.latency import machine
from prune_dn.models import densenet
from prune_dn.run.data_options import NORMALISATIONS
from prune_dn.training import evaluate

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `prune-dn compare` in a folder with `net.safetensors` and the images `photos`."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 40), ("test", 10)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    torch.manual_seed(0)
    prune_dn.save(densenet([2, 2], 6, bn_size=2, stem="cifar", num_classes=2), "net.safetensors")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["compare", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return call


GIVEN = ["net.safetensors", "--data", "photos", "--image-size", 8, "--normalize", "cifar10"]


def test_both_sides_as_json_and_as_a_table(run: Run) -> None:
    asked = [*GIVEN, "--criteria", "l1", "--calibration", 64, "--ratios", 0.3, 0.5]
    facts = document(run(*asked, "--json"))
    assert (facts["n"], facts["calibration_images"], facts["machine"]) == (20, 64, machine())
    assert [(row["method"], row["ratio"]) for row in facts["rows"]] == [
        ("dense", 0.0),
        *(
            (method, ratio)
            for ratio in (0.3, 0.5)
            for method in (
                "ours/reconstruction/least_squares",
                "torch-pruning/l1/global",
                "torch-pruning/l1/local",
            )
        ),
    ]
    mean, std = NORMALISATIONS["cifar10"]
    sets = load_datasets("image_folder", root="photos", image_size=8, mean=mean, std=std)
    dense = facts["rows"][0]
    assert dense["one_shot"] == evaluate(prune_dn.load("net.safetensors"), sets.test).accuracy
    assert tuple(dense["one_shot_interval"]) == wilson(dense["one_shot"], 20)
    for row in facts["rows"][1:]:
        assert row["error"] is None
        assert row["ratio"] <= row["macs_cut"] < row["ratio"] + 0.2
        low, high = row["recalibrated_interval"]
        assert low <= row["recalibrated"] <= high
    for ratio, (ours, theirs) in facts["best"].items():
        at = [row for row in facts["rows"] if f"{row['ratio']:g}" == ratio]
        best = {row["method"]: max(row["one_shot"], row["recalibrated"]) for row in at}
        assert ours == "ours/reconstruction/least_squares"
        assert best[theirs] == max(v for k, v in best.items() if k.startswith("torch-pruning/"))
    code, out, _ = run(*asked[:-2], "0.5", "--max-images", 8)
    assert code == 0
    assert re.search(r"torch-pruning/l1/local +50% +[56]\d\.\d% ", out)
    assert f"best at 50% fewer MACs: {facts['best']['0.5'][0]} " in out
    assert f"machine: {machine()}" in out
    assert "n: 8" in out


def test_what_cannot_be_pruned_so_far_is_said(run: Run) -> None:
    result = run(*GIVEN, "--criteria", "l1", "--ratios", 0.999, "--json")
    rows = document(result)["rows"][1:]
    assert all(row["error"] and row["one_shot"] is None for row in rows)
    code, out, _ = run(*GIVEN, "--criteria", "l1", "--ratios", 0.999)
    assert code == 0
    assert "best at 99.9% fewer MACs: none" in out
    assert "failed:" in out


def test_refusals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bad(run(*GIVEN, "--ratios", "half"), "--ratios: could not convert .* such as 0.5 0.7")
    bad(run(*GIVEN, "--ratios", "0.5", "0.5"), "--ratios has 0.5 twice")
    bad(run(*GIVEN, "--ratios", "1.5"), "pruning_ratio is 1.5")
    bad(run(*GIVEN, "--criteria", "bn"), "criteria has 'bn'; choose from bn_scale")
    bad(run(*GIVEN, "--split", "train"), "--split 'train' is unknown; choose test or val")
    bad(run(*GIVEN, "--precision", "fp8"), "--precision 'fp8' is unknown; choose no or bf16")
    bad(run("no.safetensors"), "no.safetensors")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    bad(run(*GIVEN), r"pip install 'prune_dn\[compare\]'")
