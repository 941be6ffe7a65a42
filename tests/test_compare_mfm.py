"""The MFM table, end to end on a tiny net and a folder of random images."""

from __future__ import annotations

import json
from pathlib import Path

import compare_mfm as tool
import pytest
import results
import torch
from PIL import Image
from torch import nn

from prune_dn.checkpoints.checkpoint import load
from prune_dn.data.datasets import load_datasets
from prune_dn.errors import RecipeError
from prune_dn.measure.profiling import count
from prune_dn.models import densenet
from prune_dn.training import evaluate

SHAPE = "name: densenet, block_config: [3, 6], growth_rate: 4, bn_size: null, stem: cifar"
FIT = "{epochs: 1, batch_size: 4, learning_rate: 0.05, max_steps: 2}"
RECIPES = {
    "plain": f"# Plain.\nmodel: {{{SHAPE}}}\ntrain: {FIT}\n",
    "five": f"# Five.\nmodel: {{{SHAPE}, mfm: middle_and_last}}\ntrain: {FIT}\n",
    "five_longer": f"# five, longer.\nmodel: {{checkpoint: runs/five/dense.safetensors}}\n"
    f"train: {FIT}\n",
    "plain_l1": "# plain, cut by l1.\nmodel: {checkpoint: runs/plain/dense.safetensors}\n"
    f"prune: {{pruning_ratio: 0.4, unit: macs, criterion: l1}}\nfinetune: {FIT}\n",
}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 12), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    data = f"data: {{name: image_folder, root: {json.dumps(str(tmp_path / 'images'))}}}\n"
    (tmp_path / "recipes").mkdir()
    for name, text in RECIPES.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text + data)
    folders = {"--recipes": tmp_path / "recipes", "--out": tmp_path / "out"}
    return [str(x) for pair in folders.items() for x in pair]


def output(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> dict[str, list[results.Row]]:
    tool.main(arguments)
    found: dict[str, list[results.Row]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def bytes_that_convs_read(model: nn.Module, images: torch.Tensor) -> int:
    """Each conv keeps its input for the gradient of its weights."""
    read: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, out: read.append(args[0].numel() * 4))
    model(images)
    return sum(read)


def test_rows_of_all_seeds_and_a_resumed_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mfm table -->\n<!-- end mfm table -->\nb\n")
    arguments += ["--seeds", "0", "1"]
    rows = output([*arguments, "--docs", str(page)], capsys)["rows"]
    assert [(row["row"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("five_longer", "plain_l1")
    ]
    shape = {"bn_size": None, "stem": "cifar", "num_classes": 2}
    plain = count(densenet([3, 6], 4, **shape), 8)
    five = count(densenet([3, 6], 4, mfm="middle_and_last", **shape), 8)
    for row in rows:
        assert row["images"] == 6
        assert row["steps"] == 2
        if row["row"] == "five_longer":
            assert (row["params"], row["macs"], row["as_cut"]) == (five.params, five.macs, None)
        else:
            assert 0.5 * plain.macs < row["macs"] <= 0.6 * plain.macs
            assert row["as_cut"] is not None
        file = "dense" if row["row"] == "five_longer" else "pruned"
        folder = tmp_path / "out" / str(row["seed"]) / row["row"]
        model = load(folder / f"{file}.safetensors")
        spec = {"root": tmp_path / "images", "seed": row["seed"]}
        data = load_datasets("image_folder", **spec)
        assert row["accuracy"] == 100 * evaluate(model, data.test).accuracy
        assert row["val_accuracy"] == 100 * evaluate(model, data.val).accuracy
        inputs = bytes_that_convs_read(model, torch.zeros(tool.BATCH, 3, 8, 8))
        assert inputs < row["training_mb"] * 1e6 < 5 * inputs

    lines = page.read_text().splitlines()
    assert len(lines) == 8 and lines[0] == "a" and lines[-1] == "b"
    assert lines[4].startswith("| five, longer | ") and lines[5].startswith("| plain, cut by l1 | ")
    assert f"| {five.params:,} | {five.macs / 1e6:.2f} |" in lines[4]
    assert page.with_suffix(".png").read_bytes() == (tmp_path / "out" / "mfm.png").read_bytes()

    kept = tmp_path / "out" / "0" / "results.jsonl"
    first, *others = kept.read_text().splitlines()
    assert json.loads(first)["row"] == "five"
    kept.write_text("\n".join([first, *others[:-1], others[-1][:20]]))  # killed while it wrote
    weights = tmp_path / "out" / "0" / "plain_l1" / "pruned.safetensors"
    before = weights.stat().st_mtime_ns
    assert output(arguments, capsys)["rows"] == rows
    assert weights.stat().st_mtime_ns == before  # the run was there, and was read

    recipe = tmp_path / "recipes" / "plain_l1.yaml"
    recipe.write_text(recipe.read_text().replace("0.4", "0.5"))
    with pytest.raises(RecipeError, match="another recipe"):
        tool.main(arguments)


def test_latency_in_turns_and_rows_by_pattern(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--seeds", "0", "--rows", "plain*", "--latency", "--repeats", "2"]
    found = output(arguments, capsys)
    assert [row["row"] for row in found["rows"]] == ["plain_l1"]
    assert not (tmp_path / "out" / "0" / "five").exists()
    assert [(t["runtime"], t["batch_size"]) for t in found["latency"]] == [
        ("eager", 32),
        ("onnxruntime", 1),
    ]
    for times in found["latency"]:
        assert times["latency"]["plain_l1"]["n"] == 2
        assert "thread" in times["latency"]["plain_l1"]["machine"]
    (line,) = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert line.endswith(
        "".join(f" {t['latency']['plain_l1']['median_ms']:.2f} |" for t in found["latency"])
    )
    assert output(arguments, capsys) == found
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--rows", "plain"])


def test_means_and_spreads_of_equal_macs_best_first(arguments: list[str], tmp_path: Path) -> None:
    table = tool.Table(tmp_path / "recipes", tmp_path / "out", ["*"])
    rows = [
        {
            "row": name,
            "seed": s,
            "accuracy": a,
            "as_cut": c,
            "params": 9,
            "macs": m,
            "training_mb": 2.0,
        }
        for name, s, a, c, m in (
            ("five_longer", 0, 70.0, None, 1_000_000),
            ("five_longer", 1, 72.0, None, 1_000_000),
            ("plain_l1", 1, 72.0, 50.0, 993_000),
            ("plain_l1", 0, 75.0, 60.0, 996_000),
        )
    ]
    assert tool.markdown(table, rows, []).splitlines()[2:] == [
        "| plain, cut by l1 | 73.50 ± 2.12 |  | 55.00 ± 7.07 | 9 | 0.99 | 2.0 |",
        "| five, longer | 71.00 ± 1.41 | -2.50 ± 3.54 |  | 9 | 1.00 | 2.0 |",
    ]
    rows = [{**row, "macs": 2e6 if row["row"] == "five_longer" else 1e6} for row in rows]
    assert (
        tool.markdown(table, rows, [])
        .splitlines()[3]
        .startswith("| plain, cut by l1 | 73.50 ± 2.12 | +2.50 ± 3.54 | 55.00 ± 7.07 |")
    )
