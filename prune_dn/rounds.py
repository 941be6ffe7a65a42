"""What one round of a recipe cuts: a plan."""

from __future__ import annotations

import torch

from prune_dn.data import Datasets, calibration_batches
from prune_dn.models import Net
from prune_dn.pruning import Plan, make_plan, settling_plan
from prune_dn.pruning.criteria import follows_loss, reads_images
from prune_dn.pruning.request import usual_criterion
from prune_dn.recipe import Recipe

NOT_PLANNED = {
    "pruning_ratio",
    "settle",
    "rounds",
    "recalibrate_batches",
    "seed",
    "compensate",
    "calibration",
    "loss",
}


def plan_round(recipe: Recipe, model: Net, dense: Net, data: Datasets, number: int) -> Plan:
    """The plan of one round: `number`/`rounds` of the ratio in all, always against `dense`; or the
    one that settles every MFM."""
    section = recipe.prune
    assert section is not None
    images = calibration(recipe, data) if reads_images(section.criterion) else None
    loss = section.loss if follows_loss(section.criterion) else None
    seed = seed_of(recipe)
    if section.pruning_ratio is None:
        criterion = section.criterion or usual_criterion(model)
        return settling_plan(model, images, criterion=criterion, loss=loss, seed=seed)
    return make_plan(
        model,
        section.pruning_ratio * number / section.rounds,
        **section.model_dump(exclude=NOT_PLANNED),
        seed=seed,
        input_size=data.spec.image_size,
        calibration=images,
        loss=loss,
        baseline=dense.config,
    )


def calibration(recipe: Recipe, data: Datasets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training images that criterion and compensation see; the cut's seed draws them."""
    assert recipe.prune is not None
    return calibration_batches(data.train, recipe.prune.calibration, seed=seed_of(recipe))


def seed_of(recipe: Recipe) -> int:
    """The seed of the cut: its own, or the recipe's."""
    assert recipe.prune is not None
    return recipe.seed if recipe.prune.seed is None else recipe.prune.seed
