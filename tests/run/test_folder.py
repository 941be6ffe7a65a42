"""A run goes on with the data that it began with, and with no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Run, run  # noqa: F401  (a fixture)
from PIL import Image

from prune_dn.errors import DataError, DataWarning, RecipeError
from prune_dn.run import pipeline
from prune_dn.run.recipe import Recipe
from prune_dn.run.recipe_file import parse_recipe

RECIPE = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: image_folder, root: data, augment: false}
train: {epochs: 1, batch_size: 4}
prune: {pruning_ratio: 0.4, unit: macs, recalibrate_batches: 2}
export: {onnx: false, state_dict: false}
report: {batch_sizes: [1], repeats: 2}
output_dir: out
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run that stopped after `train`. All files have the same size, and equal names in both classes."""
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        split = "train" if i < 16 else "test"
        file = Path("data", split, "ab"[i % 2], f"{i // 2}.bmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    recipe = parse_recipe(RECIPE)
    pipeline.run(recipe, only_train=True, progress=False)
    return recipe


def swap_classes() -> None:
    for split in ("train", "test"):
        Path("data", split, "a").rename(f"data/{split}/c")
        Path("data", split, "b").rename(f"data/{split}/a")
        Path("data", split, "c").rename(f"data/{split}/b")


def replace_a_test_image() -> None:
    file = Path("data/test/a/8.bmp")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_its_class() -> None:
    Path("data/train/a/0.bmp").rename("data/train/b/x.bmp")


def add_validation_images() -> None:
    shutil.copytree("data/test", "data/val")


CHANGES: list[tuple[Callable[[], object], str]] = [
    (swap_classes, r"20 changed \(train/a/0\.bmp, train/a/1\.bmp, train/a/2\.bmp, \.\.\.\);"),
    (
        replace_a_test_image,
        r": 1 changed \(test/a/8\.bmp\); restore it, or .*--overwrite",
    ),
    (change_its_class, r"1 gone \(train/a/0\.bmp\); 1 new \(train/b/x\.bmp\); restore"),
    (lambda: Path("data/test/b/9.bmp").unlink(), r"1 gone \(test/b/9\.bmp\);"),
    (add_validation_images, r"4 new \(val/a/8\.bmp, val/a/9\.bmp, val/b/8\.bmp, \.\.\.\);"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_other_data_is_refused(trained: Recipe, change: Callable[[], object], match: str) -> None:
    shutil.copytree("data", "kept")
    change()
    kept = {f: f.read_bytes() for f in Path("out").iterdir()}
    for only_train in (False, True):
        with pytest.raises(DataError, match=rf"not what the run in out began with.*{match}"):
            pipeline.run(trained, progress=False, only_train=only_train)
    assert {f: f.read_bytes() for f in Path("out").iterdir()} == kept
    changed = Path("data").rename("changed")
    Path("kept").rename("data")
    done = pipeline.run(trained, progress=False)
    assert set(done.metrics["phases"]) >= {"train", "prune-1"}, "what was restored goes on"
    Path("data").rename("kept")
    changed.rename("data")
    with pytest.raises(DataError, match="not what the run in out began with"):
        pipeline.run(trained, progress=False)
    pipeline.run(trained, progress=False, overwrite=True, only_train=True)


def test_other_data_in_the_middle_of_training_is_refused_by_fit_too(trained: Recipe) -> None:
    """Without a run folder: `fit` alone keeps a digest in its state."""
    from prune_dn.errors import TrainingError
    from prune_dn.run.building import build_model, load_data
    from prune_dn.training import fit

    def go() -> None:
        data = load_data(trained.data, seed=0)
        assert trained.train is not None
        model = build_model(trained.model, data, seed=0)
        fit(model, data, trained.train, output_dir="fit", progress=False)

    go()
    swap_classes()
    with pytest.raises(TrainingError, match=r"belongs to a run with other settings .*contents: "):
        go()


def test_what_makes_no_difference_to_the_result_may_be_another(trained: Recipe) -> None:
    """As the advice goes when a process that loads images was killed."""
    other = parse_recipe(
        RECIPE, overrides=["train.num_workers=1", "train.tensorboard=true", "data.download=true"]
    )
    before = Path("out/dense.safetensors").stat().st_mtime_ns
    pipeline.run(other, progress=False, only_train=True)
    assert Path("out/dense.safetensors").stat().st_mtime_ns == before, "it trained again"
    with pytest.raises(RecipeError, match=r"other values of: train\.batch_size\);"):
        pipeline.run(
            parse_recipe(RECIPE, overrides=["train.batch_size=5", "train.num_workers=2"]),
            progress=False,
        )


def test_the_place_of_the_data_may_change_with_a_link(trained: Recipe) -> None:
    Path("data").rename("elsewhere")
    Path("data").symlink_to("elsewhere")
    pipeline.run(trained, progress=False, only_train=True)


def test_a_folder_from_before_has_no_list_and_gets_one(trained: Recipe) -> None:
    Path("out/data.json").unlink()
    pipeline.run(trained, progress=False, only_train=True)
    found = json.loads(Path("out/data.json").read_text())
    assert found["format"] == "prune_dn.data.datasets/1" and len(found["contents"]) == 20


def test_overwrite_takes_the_events_of_the_run_before_and_nothing_of_others(
    trained: Recipe,
) -> None:
    logged = parse_recipe(RECIPE, overrides=["train.tensorboard=true"])
    Path("out/train").mkdir()
    Path("out/train/notes.txt").write_text("mine")
    for _ in range(2):
        pipeline.run(logged, progress=False, only_train=True, overwrite=True)
        events = list(Path("out/train").glob("events.out.tfevents.*"))
        assert len(events) == 1
    assert Path("out/train/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"contents": 3}', '{"contents": null}', "\0\xff"])
def test_a_damaged_list(trained: Recipe, text: str) -> None:
    Path("out/data.json").write_bytes(text.encode("latin1"))
    with pytest.raises(
        DataError, match=r"out/data\.json, the list .* cannot be read .*--overwrite"
    ):
        pipeline.run(trained, progress=False)
    pipeline.run(trained, progress=False, overwrite=True, only_train=True)


@pytest.mark.filterwarnings("default::prune_dn.errors.DataWarning")
def test_what_the_owner_is_told_is_shown_and_kept(run: Run, trained: Recipe) -> None:  # noqa: F811
    Path("out").rename("old")
    shutil.copy("data/train/a/0.bmp", "data/test/b/9.bmp")
    Path("recipe.yaml").write_text(RECIPE)
    for _ in range(2):
        code, out, err = run("run", "recipe.yaml", "--json")
        text = "test holds copies of training images: 1 (first: test/b/9.bmp is train/a/0.bmp)"
        assert code == 0 and [line for line in err.splitlines() if "copies" in line] == [
            f"warning: {text}; scores on them are no measure of a net that was trained on them"
        ]
        notices = json.loads(out)["notices"]
        assert [x["name"] for x in notices] == ["data"] and notices[0]["text"].startswith(text)
        assert text in Path("out/report.md").read_text()
    assert issubclass(DataWarning, UserWarning)
