"""What a training section takes, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from prune_dn.training import Distillation, FitConfig, Sparsity


def test_json_round_trip() -> None:
    config = FitConfig(
        epochs=3,
        milestones=(0.2, 0.9),
        resolutions=((0.0, 16), (0.5, 32)),
        sparsity=Sparsity(kind="proximal"),
        distillation=Distillation(weight=1.0),
    )
    assert FitConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"epoch": 3}, "Extra inputs are not permitted"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"epochs": "3"}, "valid integer"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"weight_decay": -1e-4}, "greater than or equal to 0"),
        ({"optimizer": "adam"}, "'sgd' or 'adamw'"),
        ({"precision": "fp8"}, "'no', 'bf16' or 'fp16'"),
        ({"schedule": "linear"}, "'one_cycle'"),
        ({"milestones": (0.5, 1.5)}, "less than or equal to 1"),
        ({"ema_decay": 1}, "less than 1"),
        ({"label_smoothing": 1}, "less than 1"),
        ({"momentum": 0}, "nesterov needs a momentum above 0; set nesterov: false"),
        ({"epochs": 2, "warmup_epochs": 2}, r"warmup_epochs=2\S* fill all 2 epochs"),
        ({"schedule": "one_cycle", "warmup_epochs": 0.5}, "one_cycle has its own warm-up"),
        ({"resolutions": ((0.1, 16),)}, "the first at 0"),
        ({"resolutions": ((0.0, 16), (0.5, 24), (0.5, 32))}, "rising `from`"),
        ({"sparsity": {"strength": 0}}, "greater than 0"),
        ({"distillation": {"weight": 0}}, "greater than 0"),
    ],
)
def test_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        FitConfig.model_validate({"epochs": 1, **wrong})


def test_neighbours_of_the_refused_pass() -> None:
    FitConfig(epochs=1, momentum=0, nesterov=False)
    FitConfig(epochs=1, momentum=0, optimizer="adamw")
    FitConfig(epochs=2, warmup_epochs=1.5)
    FitConfig(epochs=1, batch_size=2, resolutions=((0.0, 8), (1.0, 16)))
