"""The comparison tool, end to end on a tiny net and a folder of random images."""

from __future__ import annotations

import json
from pathlib import Path

import compare_pruners as tool
import pytest
import results
import torch
from PIL import Image

import prune_dn
from prune_dn.measure.latency import machine
from prune_dn.models import densenet


@pytest.mark.filterwarnings("ignore::prune_dn.errors.PruningWarning")  # a busy machine's times
def test_rows_for_both_sides_and_a_resumed_run(tmp_path: Path, capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 12), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    net = densenet([2, 2], 8, bn_size=2, stem="cifar", num_classes=2)
    prune_dn.save(net, tmp_path / "net.safetensors")
    arguments = [str(tmp_path / "net.safetensors"), str(tmp_path / "images"), "--image-size", "16"]
    arguments += ["--out", str(tmp_path / "out"), "--ratios", "0.4", "--calibration", "16"]
    arguments += ["--epochs", "1"]
    arguments += [
        "--methods",
        "ours/reconstruction/least_squares/all",
        "slimming",
        "tp/l1/*",
        "tp/taylor/local",
    ]
    tool.main(arguments)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == [
        "dense",
        "slimming",
        "ours/reconstruction/least_squares/all",
        "tp/l1/global",
        "tp/l1/local",
        "tp/taylor/local",
    ]
    assert rows[0]["macs_cut"] == 0
    for row in rows[1:]:
        assert 0.4 <= row["macs_cut"] < 0.75, row
        assert row["images"] == 6
        assert row["params"] < rows[0]["params"]
        assert 0 <= row["fine_tuned"] <= 100
    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text("<!-- t -->\n<!-- end t -->\n")
    tool.main([*arguments, "--docs", str(page), "t", "--plot", str(figure)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert "| tp/l1/global |" in page.read_text()
    assert f"{machine()}; 6 test images, precision no; 16 images for" in page.read_text()
    assert figure.stat().st_size > 10_000
    kept = tmp_path / "out" / "results.jsonl"
    kept.write_text(kept.read_text() + '{"method": "ha')  # killed while it wrote
    tool.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert (tmp_path / "out" / "table.md").read_text().count("| tp/") == 3
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--ratios", "0.999"])
    assert "error" in capsys.readouterr().out
    in_time = "ours/l2/none/stream+bottleneck+layer/latency"
    arguments[arguments.index("--methods") + 1 :] = ["slimming", in_time]
    tool.main([*arguments, "--latency", "--repeats", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["dense", "slimming", in_time]
    assert all(row["onnxruntime_batch1_ms"] > 0 for row in rows)


def test_a_table_of_means_and_the_fastest_of_equal_accuracy(tmp_path: Path) -> None:
    def row(method: str, asked: float, seed: int, accuracy: float, ms: float) -> results.Row:
        measured = {"macs_cut": asked, "params": 10, "one_shot": accuracy, "seconds": 1.0}
        times = {"onnxruntime_batch1_ms": ms, "onnxruntime_batch1_vs_dense": ms / 10}
        return {"method": method, "asked": asked, "seed": seed, **measured, **times}

    rows = [row("dense", 0.0, 0, 90.0, 10.0)]
    rows += [row("ours/x", 0.5, seed, accuracy, 6.0) for seed, accuracy in ((0, 80.0), (1, 82.0))]
    rows += [row("ours/x", 0.7, 0, 60.0, 4.0), row("tp/y", 0.5, 0, 70.0, 8.0)]
    lines = tool.table(rows).splitlines()
    assert lines[2].startswith("| dense | 0.0% | 10 | 90.00 |")
    assert lines[3] == "| ours/x | 50.0% | 10 | 81.00 ± 1.41 | 0.60x | 1.0 |"
    (pair,) = tool.equal_accuracy(rows, "one_shot", "onnxruntime_batch1")
    assert (pair["ours"], pair["latency_ratio"]) == ("ours/x 50%", pytest.approx(0.75))
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- t -->\nold\n<!-- end t -->\nb\n")
    results.write_between(document, "t", "new\n")
    assert document.read_text() == "a\n<!-- t -->\nnew\n<!-- end t -->\nb\n"
    with pytest.raises(SystemExit, match="no lines '<!-- u -->'"):
        results.write_between(document, "u", "new\n")
