"""The comparison tool, end to end on a tiny net and a folder of random images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import prune_dn
from prune_dn.models import densenet

PATH = Path(__file__).parent.parent / "tools" / "compare_pruners.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_pruners", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_for_both_sides_and_a_resumed_run(tool, tmp_path: Path, capsys) -> None:
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
    arguments += [
        "--methods",
        "ours/reconstruction/least_squares/all",
        "tp/l1/*",
        "tp/taylor/local",
    ]
    tool.main(arguments)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == [
        "dense",
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
    results = tmp_path / "out" / "results.jsonl"
    results.write_text(results.read_text() + '{"method": "ha')  # killed while it wrote
    tool.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert (tmp_path / "out" / "table.md").read_text().count("| tp/") == 3
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--ratios", "0.999"])
    assert "error" in capsys.readouterr().out
