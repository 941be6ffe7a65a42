"""Every recipe that comes with the project is valid, and its whole run works on tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prune_dn import pipeline
from prune_dn.models import MaxFeatureMap
from prune_dn.recipe import to_yaml
from prune_dn.recipe_file import load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
NAMES = {
    "quickstart",
    "densenet40_cifar10",
    "densenet_bc100_cifar10",
    "densenet40_cifar10_cpu",
    "densenet_bc40_cifar10_cpu",
    "mfm_cifar10",
    "densenet121_imagefolder",
    "light_cnn_9_digits",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, 16 pixels wide."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_all_recipes_are_here() -> None:
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_explained(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(to_yaml(recipe)) == recipe
    assert path.read_text().startswith("# ")
    assert recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_to_the_end(path: Path, images: Path, tmp_path: Path) -> None:
    size = 32 if "121" in path.stem else 16
    given = load_recipe(path)
    overrides = [
        f"output_dir={json.dumps(str(tmp_path / 'run'))}",
        f"data={{name: image_folder, root: {json.dumps(str(images))}, image_size: {size}}}",
        "export={onnx: false, state_dict: false}",
        "report={batch_sizes: [1], repeats: 1}",
        *(["prune.calibration=64"] if load_recipe(path).prune.reads_images else []),
    ]
    light = path.stem.startswith("light_cnn")
    overrides += [] if light else ["prune.recalibrate_batches=1"]
    for part in ("train", "finetune"):
        overrides += [f"{part}.{x}" for x in ("max_steps=2", "batch_size=4", "num_workers=0")]
        overrides += [f"{part}.epochs=1", f"{part}.gradient_accumulation=1"]
    if given.train is not None and given.train.resolutions:
        overrides.append("train.resolutions=[[0, 8], [0.5, 16]]")
    recipe = load_recipe(path, overrides)
    result = pipeline.run(recipe, progress=False)
    assert recipe.prune is not None
    compensated = {"compensated"} if recipe.prune.compensate != "none" else set()
    stages = {"dense", "pruned", "fine-tuned"} | compensated
    stages |= set() if light else {"recalibrated"}
    assert set(result.metrics["stages"]) == stages
    dense, small = (result.metrics["stages"][s] for s in ("dense", "fine-tuned"))
    unit = recipe.prune.unit
    assert small[unit] <= (1 - recipe.prune.pruning_ratio) * dense[unit]
    mfm = [m for m in result.model.modules() if isinstance(m, MaxFeatureMap)]
    assert len(mfm) == (10 if light else 5 if "mfm" in path.stem else 0)
