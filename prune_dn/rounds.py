"""What one round of a recipe cuts: a plan for a DenseNet, or a smaller Light CNN."""

from __future__ import annotations

import torch

from prune_dn.data import Datasets, calibration_batches
from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, LightCNN
from prune_dn.profiling import count
from prune_dn.pruning import Plan, make_plan, prune, settling_plan
from prune_dn.pruning.config import LATENCY
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


def plan_round(
    recipe: Recipe, model: DenseNet, dense: DenseNet, data: Datasets, number: int
) -> Plan:
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


def cut_round(
    recipe: Recipe, model: LightCNN, dense: LightCNN, data: Datasets, number: int
) -> LightCNN:
    """What `plan_round` and surgery are for DenseNets: a smaller Light CNN."""
    section = recipe.prune
    assert section is not None and section.pruning_ratio is not None
    ratio = section.pruning_ratio * number / section.rounds
    if model is not dense and section.unit != LATENCY:
        whole, now = (getattr(count(net), section.unit) for net in (dense, model))
        ratio = 1 - (1 - ratio) * whole / now
        if ratio <= 0:
            raise PruningError(
                f"round {number} has nothing to cut: the round before it went further than asked; "
                "choose fewer rounds, or a smaller round_to"
            )
    small = prune(
        model,
        ratio,
        **section.model_dump(exclude=NOT_PLANNED),
        compensate=section.compensate,
        seed=seed_of(recipe),
        calibration=calibration(recipe, data) if reads_images(section.criterion) else None,
        loss=section.loss,
    )
    assert isinstance(small, LightCNN)
    return small


def calibration(recipe: Recipe, data: Datasets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training images that criterion and compensation see; the cut's seed draws them."""
    assert recipe.prune is not None
    return calibration_batches(data.train, recipe.prune.calibration, seed=seed_of(recipe))


def seed_of(recipe: Recipe) -> int:
    """The seed of the cut: its own, or the recipe's."""
    assert recipe.prune is not None
    return recipe.seed if recipe.prune.seed is None else recipe.prune.seed
