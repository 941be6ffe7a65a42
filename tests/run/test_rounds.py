"""What a recipe's cut goes by: its own seed, and what the outputs mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import randomise_

from prune_dn.data.datasets import Datasets, load_datasets
from prune_dn.errors import RecipeError
from prune_dn.models import DenseNet, densenet, light_cnn_9
from prune_dn.run.recipe import Recipe
from prune_dn.run.recipe_file import parse_recipe
from prune_dn.run.rounds import calibration, plan_round

TEXT = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: digits, image_size: 8}
train: {epochs: 1}
prune: {pruning_ratio: 0.4, unit: macs, criterion: taylor, calibration: 24}
"""


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, overrides=overrides)


@pytest.fixture(scope="module")
def data() -> Datasets:
    return load_datasets("digits", image_size=8)


def net() -> DenseNet:
    model = densenet([2, 2], 4, bn_size=2, stem="cifar", in_channels=1, num_classes=10)
    return randomise_(model, 0).eval()


@pytest.mark.parametrize("which", ["seed", "prune.seed"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "reconstruction", "activation"])
def test_the_seed_draws_the_images_that_decide(data: Datasets, criterion: str, which: str) -> None:
    found: list[Any] = []
    for seed in (1, 2, 3, 4, 1):
        read = recipe(f"{which}={seed}", f"prune.criterion={criterion}", "prune.calibration=4")
        images = torch.cat([x for x, _ in calibration(read, data)])
        assert len(images) == 4
        found.append((images, plan_round(read, net(), net(), data, 1).keep_indices))
    assert torch.equal(found[0][0], found[4][0]) and found[0][1] == found[4][1]
    for images, _ in found[1:4]:
        assert not torch.equal(images, found[0][0])
    assert any(cut != found[0][1] for _, cut in found[1:4])


def test_the_seed_draws_for_a_light_cnn_too() -> None:
    data = load_datasets("digits", image_size=16)
    model = light_cnn_9(10, image_size=16, widths=[6, 8, 8, 8, 8], embedding=8).eval()
    plans = [
        plan_round(recipe("prune.calibration=8", f"prune.seed={seed}"), model, model, data, 1)
        for seed in (1, 2, 1)
    ]
    assert plans[0].keep_indices == plans[2].keep_indices != plans[1].keep_indices


def test_what_the_outputs_mean(data: Datasets) -> None:
    """Classes where nothing is said; and what is said reaches the scores."""
    read = recipe("prune.criterion=reconstruction")
    usual = plan_round(read, net(), net(), data, 1)
    named = plan_round(
        recipe("prune.criterion=reconstruction", "prune.loss=softmax"), net(), net(), data, 1
    )
    assert usual.keep_indices == named.keep_indices
    other = plan_round(
        recipe("prune.criterion=reconstruction", "prune.loss=mse"), net(), net(), data, 1
    )
    assert other.keep_indices != usual.keep_indices and other.requested["loss"] == "mse"
    beside = recipe("prune.criterion=l2", "prune.compensate=least_squares", "prune.loss=sigmoid")
    requested = plan_round(beside, net(), net(), data, 1).requested  # for the refit
    assert (requested["loss"], requested["compensate"]) == ("sigmoid", "least_squares")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.loss=hinge", r"'hinge' is no loss; .*mse, sigmoid, softmax"),
        ("prune.criterion=l2", "prune.loss has no effect: the criterion does not depend on"),
        ("prune.criterion=activation", "prune.loss has no effect"),
    ],
)
def test_losses_that_are_refused(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe("prune.loss=mse", "prune.calibration=null", setting)
