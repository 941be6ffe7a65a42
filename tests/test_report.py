"""The report: its figures against hand-made metrics, its plots by what they draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from prune_dn import report
from prune_dn.models import densenet
from prune_dn.pruning import make_plan


def stage(accuracy: float, params: int, macs: int, size: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "n_test": 360,
        "params": params,
        "macs": macs,
        "file_bytes": size,
    }


def latency(batch: int, median: float) -> dict[str, Any]:
    return {"batch_size": batch, "median_ms": median, "n": 30, "runtime": "eager"}


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "name": "mine",
        "data": {"name": "digits", "classes": list("0123456789"), "image_size": 32},
        "stages": {
            "dense": stage(0.98, 2_000_000, 40_000_000, 8_000_000),
            "pruned": stage(0.10, 1_500_000, 20_000_000, 6_000_000),
            "recalibrated": stage(0.80, 1_500_000, 20_000_000, 6_000_000),
            "fine-tuned": stage(0.975, 1_500_000, 20_000_000, 6_000_000),
        },
        "latency": {
            "dense": [latency(1, 4.0), latency(32, 60.0)],
            "pruned": [latency(1, 2.0), latency(32, 40.0)],
        },
        "rounds": [{"unit": "macs", "requested": 0.5, "achieved": 0.5}],
        "history": {"train": [{"loss": 1.0, "val_accuracy": 0.5}]},
        "phases": {"train": {"seconds": 61.0}, "finetune-1": {"seconds": 9.0}},
    }


@pytest.fixture
def environment() -> dict[str, Any]:
    return {
        "machine": "a machine, 2 cores",
        "versions": {"torch": "9.9"},
        "seed": 5,
        "processes": 1,
        "command": "prune-dn run mine.yaml",
    }


@pytest.fixture
def plan() -> dict[str, Any]:
    torch.manual_seed(0)
    net = densenet((3, 3), 8, bn_size=2, stem="cifar", num_classes=4)
    made = make_plan(net, 0.5, unit="macs", criterion="l2", protect=["features.denseblock2"])
    return {"round": 1, "layers": made.layers, **json.loads(made.to_json())}


def test_table_is_one_row_per_stage(metrics: dict[str, Any]) -> None:
    header, rows = report.stage_table(metrics)
    assert header == [
        "net",
        "test accuracy",
        "params",
        "MACs",
        "latency, batch 1",
        "latency, batch 32",
        "file",
    ]
    dense = ["dense", "98.00 %", "2,000,000", "40 M", "4.00 ms", "60.00 ms", "8 MB"]
    tuned = ["fine-tuned", "97.50 %", "1,500,000", "20 M", "2.00 ms", "40.00 ms", "6 MB"]
    assert rows[0] == dense
    assert rows[3] == tuned
    assert [row[0] for row in rows] == ["dense", "pruned", "recalibrated", "fine-tuned"]


def test_gains(metrics: dict[str, Any]) -> None:
    lines = report.gains(metrics, "fine-tuned")
    assert lines == [
        "asked: 50 % fewer MACs; achieved: 50.00 %",
        "params: 25.0 % fewer",
        "MACs: 50.0 % fewer",
        "bytes on disk: 25.0 % fewer",
        "latency, batch 1: 4.00 -> 2.00 ms (2.00 times as fast)",
        "latency, batch 32: 60.00 -> 40.00 ms (1.50 times as fast)",
        "test accuracy: -0.50 points (n = 360)",
    ]


def test_page_says_all(
    metrics: dict[str, Any], environment: dict[str, Any], plan: dict[str, Any]
) -> None:
    text = report.render(metrics, environment, [plan])
    for part in (
        "# mine",
        "| fine-tuned | 97.50 % |",
        "Asked: pruning_ratio 0.5, unit macs, criterion l2",
        "widths.png",
        "training.png",
        "a machine, 2 cores",
        "torch 9.9",
        "seed: 5",
        "time: 70 s",
        "`prune-dn run mine.yaml`",
        "30 runs per figure",
    ):
        assert part in text
    for name, reason in plan["protected"].items():
        assert f"- {name}: {reason}" in text
    assert plan["protected"]
    for row in plan["layers"]:
        line = f"| {row['name']} | {row['kind']} | {row['before']} | {row['after']} |"
        assert (line in text) == (row["before"] != row["after"])


def test_page_of_a_run_that_only_trained(
    metrics: dict[str, Any], environment: dict[str, Any]
) -> None:
    metrics["stages"] = {"dense": metrics["stages"]["dense"]}
    metrics["latency"], metrics["rounds"] = {}, []
    text = report.render(metrics, environment, [])
    assert "| dense |" in text
    assert "What it brought" not in text and "widths.png" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (288_000_000, "288 M"), (2_834_161_664, "2.83 G")],
)
def test_human_numbers(number: int, text: str) -> None:
    assert report.human(number) == text


def test_files(
    tmp_path: Path, metrics: dict[str, Any], environment: dict[str, Any], plan: dict[str, Any]
) -> None:
    path = report.write_report(tmp_path, metrics, environment, [plan])
    assert path.read_text() == report.render(metrics, environment, [plan])
    for name in ("widths.png", "training.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.md", "training.png", "widths.png"]


def test_bars_are_the_widths(
    tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    report.plot_widths(plan["layers"], tmp_path / "widths.png")
    heights = {}
    for axes in drawn[0].axes:
        before, after = axes.containers
        kind = axes.get_ylabel().split()[0]
        heights[kind] = [
            (b.get_height(), a.get_height()) for b, a in zip(before, after, strict=True)
        ]
    for kind in ("stream", "bottleneck", "edge"):
        rows = [(r["before"], r["after"]) for r in plan["layers"] if r["kind"] == kind]
        assert heights[kind] == rows
