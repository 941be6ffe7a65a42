"""What one round of a recipe cuts: a plan, of a ratio or as far as the accuracy allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_dn.data.datasets import Datasets, calibration_batches
from prune_dn.models.families import config_of
from prune_dn.pruning import Plan, make_plan
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.criteria import reads_images
from prune_dn.run.recipe import Recipe
from prune_dn.run.trials import Trial
from prune_dn.run.within import Found, prune_within
from prune_dn.training.evaluation import accuracy_per_image


def plan_round(
    recipe: Recipe, model: nn.Module, dense: nn.Module, data: Datasets, number: int
) -> Plan:
    """The plan of one round, with its ratio always against `dense`."""
    assert recipe.prune is not None
    asked = recipe.request(data.spec.image_size, number)
    return make_plan(
        model,
        asked,
        calibration=calibration(recipe, data) if reads_images(asked.criterion) else None,
        ratios=recipe.prune.ratios,
        baseline=config_of(dense) or dense,
    )


def calibration(recipe: Recipe, data: Datasets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training images that criterion and compensation see; the cut's seed draws them."""
    assert recipe.prune is not None
    return calibration_batches(data.train, recipe.prune.calibration, seed=recipe.request().seed)


def plan_within(
    recipe: Recipe,
    dense: nn.Module,
    data: Datasets,
    path: Path,
    progress: Callable[[Trial], object] | None = None,
) -> Found:
    """The largest cut that loses at most `max_drop` points on the validation images; trials in `path`."""
    assert recipe.prune is not None and recipe.prune.max_drop is not None
    images = calibration(recipe, data) if recipe.prune.reads_images else None
    asked = recipe.request(data.spec.image_size)
    return largest_cut(dense, asked, recipe.prune.max_drop, data, images, path, progress)


def largest_cut(
    dense: nn.Module,
    asked: PruneConfig,
    points: float,
    data: Datasets,
    calibration: Iterable[object] | None,
    path: Path,
    progress: Callable[[Trial], object] | None,
    example_inputs: Any = None,
) -> Found:
    """`prune_within` by the accuracy on the validation images, in points."""
    return prune_within(
        dense,
        lambda net: accuracy_per_image(net, data.val, loss=asked.loss),
        points / 100,
        calibration=calibration,
        example_inputs=example_inputs,
        path=path,
        progress=progress,
        request=asked,
    )
