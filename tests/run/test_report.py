"""The report: its figures against hand-made metrics, its plots by what they draw."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

from prune_dn.base.console import plain
from prune_dn.models import densenet
from prune_dn.pruning import make_plan
from prune_dn.run import report

# 353 and 351 of 360, by scipy.stats.binomtest(k, 360).proportion_ci(method="wilson").
DENSE, TUNED = "98.06 % (96.0 to 99.1)", "97.50 % (95.3 to 98.7)"


def stage(accuracy: float, params: int, macs: int, size: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "n_test": 360,
        "params": params,
        "macs": macs,
        "file_bytes": size,
    }


def latency(batch: int, median: float) -> dict[str, Any]:
    return {
        "batch_size": batch,
        "median_ms": median,
        "p10_ms": median - 0.5,
        "p90_ms": median + 0.5,
        "n": 30,
        "runtime": "eager",
        "machine": "a CPU, 2 threads",
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "name": "mine",
        "data": {"name": "digits", "classes": list("0123456789"), "image_size": 32},
        "stages": {
            "dense": stage(353 / 360, 2_000_000, 40_000_000, 8_000_000),
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
        "test accuracy (n = 360)",
        "params",
        "MACs",
        "eager, batch 1",
        "eager, batch 32",
        "file",
    ]
    dense = ["dense", DENSE, "2,000,000", "40 M", "4.00 ms", "60.00 ms", "8 MB"]
    tuned = ["fine-tuned", TUNED, "1,500,000", "20 M", "2.00 ms", "40.00 ms", "6 MB"]
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
        "latency, eager, batch 1: 4.00 -> 2.00 ms (2.00 times as fast; 50.0 % fewer ms, n = 30)",
        "latency, eager, batch 32: 60.00 -> 40.00 ms (1.50 times as fast; 33.3 % fewer ms, n = 30)",
        "test accuracy: -0.56 points (n = 360)",
    ]


def test_page_says_all(
    metrics: dict[str, Any], environment: dict[str, Any], plan: dict[str, Any]
) -> None:
    text = report.render(metrics, environment, [plan])
    for part in (
        "# mine",
        f"| fine-tuned | {TUNED} |",
        "Asked: pruning_ratio 0.5, unit macs, criterion l2",
        "widths.png",
        "training.png",
        "a machine, 2 cores",
        "torch 9.9",
        "seed: 5",
        "time: 70 s",
        "`prune-dn run mine.yaml`",
        "| pruned | eager | 32 | 40.00 | 39.50 | 40.50 | 30 | a CPU, 2 threads |",
        "95 % interval (Wilson)",
    ):
        assert part in text
    for name, reason in plan["protected"].items():
        assert f"- {name}: {reason}" in text
    assert plan["protected"]
    for row in plan["layers"]:
        line = f"| {row['name']} | {row['kind']} | {row['before']} | {row['after']} |"
        assert (line in text) == (row["before"] != row["after"])


def test_every_stage_is_in_the_table(metrics: dict[str, Any]) -> None:
    before = metrics["stages"]
    metrics["stages"] = {
        "dense": before["dense"],
        "pruned": before["pruned"],
        "compensated": stage(0.95, 1_500_000, 20_000_000, 6_000_000),
    }
    _, rows = report.stage_table(metrics)
    assert [row[0] for row in rows] == ["dense", "pruned", "compensated"]


def test_the_runtime_that_was_asked_for_stands_beside_eager(
    metrics: dict[str, Any], environment: dict[str, Any]
) -> None:
    for net, median in (("dense", 7.0), ("pruned", 2.0)):
        row = {**latency(4, median), "runtime": "onnxruntime 9.9", "machine": "a CPU, 1 thread"}
        metrics["latency"][net].append(row)
    metrics["rounds"] = [
        {
            "unit": "latency",
            "requested": 0.5,
            "achieved": 0.64,
            "runtime": "onnxruntime",
            "batch_size": 4,
        }
    ]
    lines = report.gains(metrics, "fine-tuned")
    assert lines[0] == (
        "asked: 50 % fewer milliseconds, onnxruntime, batch 4; achieved: 64.00 % as timed while "
        "planning"
    )
    assert (
        "latency, onnxruntime 9.9, batch 4: 7.00 -> 2.00 ms (3.50 times as fast; 71.4 % fewer ms, "
        "n = 30)"
    ) in lines
    header, rows = report.stage_table(metrics)
    assert header[-2] == "onnxruntime 9.9, batch 4"
    assert [row[-2] for row in rows] == ["7.00 ms", "2.00 ms", "2.00 ms", "2.00 ms"]
    text = report.render(metrics, environment, [])
    assert "| dense | onnxruntime 9.9 | 4 | 7.00 | 6.50 | 7.50 | 30 | a CPU, 1 thread |" in text
    below = report.below_table(metrics)
    assert below["latency"] == "median of 30 runs, nets in turn; a CPU, 2 threads; a CPU, 1 thread"


def test_notices_are_on_the_page_and_below_the_table(
    metrics: dict[str, Any], environment: dict[str, Any]
) -> None:
    metrics["notices"] = [
        {"name": "prune-1", "text": "fitted badly"},
        {"name": "finetune", "text": "made worse"},
        {"name": "finetune", "text": "and not sparse"},
    ]
    text = report.render(metrics, environment, [])
    assert "**Notice** (prune-1): fitted badly" in text
    assert "**Notice** (finetune): made worse" in text
    below = report.below_table(metrics)
    assert below["notice (prune-1)"] == "fitted badly"
    assert below["notice (finetune)"] == "made worse; and not sparse"


def test_names_cannot_write_markdown(
    metrics: dict[str, Any], environment: dict[str, Any], plan: dict[str, Any]
) -> None:
    nasty = "a|b `c`\n# d\x1b[31m\u202e<script>"
    metrics["name"] = metrics["data"]["name"] = nasty
    metrics["notices"] = [{"name": "train", "text": nasty}]
    environment["command"] = environment["machine"] = nasty
    metrics["latency"]["dense"][0]["machine"] = nasty
    plan["requested"]["protect"] = [nasty]
    plan["layers"][0].update(name=nasty, after=1)
    plan["protected"][nasty] = nasty
    text = report.render(metrics, environment, [plan])
    assert all(c.isprintable() or c == "\n" for c in text)
    page = MarkdownIt("commonmark").enable("table").render(text)  # what a reader sees
    assert page.count(escape(plain(nasty))) == 10
    assert page.count("<h1>") == 1 and "<script" not in page
    assert page.count("<table>") == 3


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
