"""Every recipe that comes with the project is valid, and its whole run works on tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prune_dn.checkpoints.checkpoint import save
from prune_dn.measure.profiling import count
from prune_dn.models import MaxFeatureMap
from prune_dn.pruning import make_plan, settling_plan
from prune_dn.run import pipeline
from prune_dn.run.recipe import Recipe, to_yaml
from prune_dn.run.recipe_file import load_recipe, parse_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = {
    "quickstart",
    "densenet40_cifar10",
    "densenet_bc100_cifar10",
    "densenet40_cifar10_cpu",
    "densenet_bc40_cifar10_cpu",
    "mfm_cifar10",
    "densenet121_imagefolder",
    "resnet18_imagefolder",
    "light_cnn_9_digits",
    "criteria_sweep",
}
MFM_TABLE = {
    "plain",
    "plain_longer",
    "plain_random_as_five",
    "plain_l1_as_five",
    "plain_bn_scale_as_five",
    "plain_random_as_both",
    "plain_l1_as_both",
    "plain_bn_scale_as_both",
    "plain_reconstruction_as_both",
    "five",
    "five_longer",
    "five_losers",
    "skipped",
    "skipped_longer",
    "skipped_losers",
    "both",
    "both_longer",
    "both_losers",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, 16 pixels wide."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_all_recipes_are_here() -> None:
    paths = {*NAMES, *(f"mfm_table/{name}" for name in MFM_TABLE)}
    assert {str(path.relative_to(FOLDER).with_suffix("")) for path in RECIPES} == paths


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_explained(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(to_yaml(recipe)) == recipe
    assert path.read_text().startswith("# ")
    assert recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_to_the_end(path: Path, images: Path, tmp_path: Path) -> None:
    size = 32 if "imagefolder" in path.stem else 16
    given = load_recipe(path)
    overrides = [
        f"output_dir={json.dumps(str(tmp_path / 'run'))}",
        f"data={{name: image_folder, root: {json.dumps(str(images))}, image_size: {size}}}",
        "export={onnx: false, state_dict: false}",
        "report={batch_sizes: [1], repeats: 1}",
        "sweep=null",
    ]
    light = path.stem.startswith("light_cnn")
    if given.model.checkpoint is not None:
        start = tmp_path / "start.safetensors"
        save(start_of(given).model.build(num_classes=2), start)
        overrides.append(f"model.checkpoint={json.dumps(str(start))}")
    if given.prune is not None:
        overrides += [] if light else ["prune.recalibrate_batches=1"]
        overrides += ["prune.calibration=64"] if given.prune.reads_images else []
    for part in ("train", "finetune"):
        if getattr(given, part) is None:
            continue
        overrides += [f"{part}.{x}" for x in ("max_steps=2", "batch_size=4", "num_workers=0")]
        overrides += [f"{part}.epochs=1", f"{part}.gradient_accumulation=1"]
        if getattr(given, part).resolutions:
            overrides.append(f"{part}.resolutions=[[0, 8], [0.5, 16]]")
    recipe = load_recipe(path, overrides)
    result = pipeline.run(recipe, progress=False)
    stages = result.metrics["stages"]
    mfm = [m for m in result.model.modules() if isinstance(m, MaxFeatureMap)]
    settled = path.stem.endswith("losers")
    five = path.stem.startswith(("mfm", "five", "both")) and not settled
    assert len(mfm) == (10 if light else 5 if five else 0)
    if recipe.prune is None:
        assert set(stages) == {"dense"}
        return
    compensated = {"compensated"} if recipe.prune.compensate != "none" else set()
    recalibrated = set() if light else {"recalibrated"}
    tuned = set() if recipe.finetune is None else {"fine-tuned"}
    assert set(stages) == {"dense", "pruned"} | recalibrated | compensated | tuned
    dense, small = stages["dense"], list(stages.values())[-1]
    ratio, unit = recipe.prune.pruning_ratio or 0.0, recipe.prune.unit
    assert small[unit] <= (1 - ratio) * dense[unit]


def start_of(recipe: Recipe) -> Recipe:
    """The recipe of the MFM table whose checkpoint this one reads."""
    checkpoint = recipe.model.checkpoint
    assert checkpoint is not None
    return load_recipe(FOLDER / "mfm_table" / f"{Path(checkpoint).parent.name}.yaml")


def mfm_table() -> dict[str, Recipe]:
    return {name: load_recipe(FOLDER / "mfm_table" / f"{name}.yaml") for name in MFM_TABLE}


def test_rows_of_the_mfm_table_differ_in_what_they_say_only() -> None:
    """Equal budgets: one training for all starting points, one for all that goes on from them."""
    recipes = mfm_table().values()
    starts = [recipe for recipe in recipes if recipe.model.checkpoint is None]
    others = [recipe for recipe in recipes if recipe.model.checkpoint is not None]
    assert len({recipe.train for recipe in starts}) == 1
    assert len({recipe.train or recipe.finetune for recipe in others}) == 1
    assert len({recipe.data for recipe in recipes}) == 1
    shapes = [
        recipe.model.model_copy(update={"mfm": None, "mfm_skipped": None}) for recipe in starts
    ]
    assert len({shape.model_dump_json() for shape in shapes}) == 1


@pytest.mark.parametrize("name", sorted(name for name in MFM_TABLE if "_as_" in name))
def test_ratios_of_the_mfm_table_are_those_of_the_mfm_nets(name: str) -> None:
    recipe = mfm_table()[name]
    model = start_of(recipe).model.build()
    plain = count(model)
    wanted = count(mfm_table()[name.rpartition("_as_")[2]].model.build())
    assert recipe.prune is not None
    assert recipe.prune.unit == "macs"
    assert recipe.prune.pruning_ratio == round(1 - wanted.macs / plain.macs, 4)
    dearest = 32 * 32 * (27 + 16 * 9 + 16)  # a map of the stem: made, read by a layer, a transition
    if not recipe.prune.reads_images:
        plan = make_plan(
            model, recipe.prune.pruning_ratio, unit="macs", criterion=recipe.prune.criterion
        )
        assert 0 <= wanted.macs - plan.achieved["after"]["macs"] < dearest


def test_five_layers_without_losers_cost_what_both_cost() -> None:
    """So the plain nets that are cut to the MACs of `both` stand beside either."""
    recipes = mfm_table()
    five = recipes["five"].model.build()
    settled = settling_plan(five, criterion="random")
    assert count(settled.config_after).macs == count(recipes["both"].model.build()).macs
