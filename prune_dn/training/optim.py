"""Optimizers and schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from prune_dn.errors import TrainingError
from prune_dn.training.config import FitConfig


def build_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """A new optimizer on the parameters that train; norms and biases get no weight decay.

    Raises TrainingError when nothing would train.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError(
            "every parameter is frozen: this step would train nothing; set requires_grad=True on "
            "what should train"
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov
    )


def learning_rate(config: FitConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, 0 <= step < steps.

    Warm-up rises linearly to `learning_rate`. `cosine` falls to 0 (arXiv:1608.03983); `one_cycle`
    rises over the first 30 % from a 25th and falls to 0 (arXiv:1708.07120); `step` multiplies by
    `gamma` at each milestone.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "step":
        factor = config.gamma ** sum(step / steps >= m for m in config.milestones)
    elif config.schedule == "cosine":
        factor = _half_cosine(progress)
    elif progress < 0.3:
        factor = 1.0 - (1.0 - 1 / 25) * _half_cosine(progress / 0.3)
    else:
        factor = _half_cosine((progress - 0.3) / 0.7)
    return config.learning_rate * factor


def _half_cosine(x: float) -> float:
    return (1.0 + math.cos(math.pi * x)) / 2
