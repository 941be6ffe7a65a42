"""Schedules against closed forms; who gets weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from prune_dn.errors import TrainingError
from prune_dn.models import densenet
from prune_dn.training import FitConfig
from prune_dn.training.optim import build_optimizer, learning_rate

STEPS, PER_EPOCH = 100, 10


def rates(**how: Any) -> list[float]:
    config = FitConfig(epochs=10, learning_rate=0.4, **how)
    return [learning_rate(config, step, STEPS, PER_EPOCH) for step in range(STEPS)]


def test_constant_and_step() -> None:
    assert rates(schedule="constant") == [0.4] * STEPS
    found = rates(schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert found == pytest.approx([0.4] * 50 + [0.04] * 25 + [0.004] * 25)
    assert rates(schedule="step", milestones=(), gamma=0.1) == [0.4] * STEPS


def test_cosine() -> None:
    found = rates(schedule="cosine")
    assert found[0] == 0.4 and found[50] == pytest.approx(0.2)
    assert found[25] == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert found[99] == pytest.approx(0.2 * (1 + math.cos(0.99 * math.pi))) and found[99] > 0
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        assert found[step] == pytest.approx(schedule.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        schedule.step()


def test_one_cycle() -> None:
    found = rates(schedule="one_cycle")
    assert found[0] == pytest.approx(0.4 / 25) and found[30] == pytest.approx(0.4)
    assert found[15] == pytest.approx(0.4 * (1 + 1 / 25) / 2)
    assert found[65] == pytest.approx(0.2)
    assert found[:31] == sorted(found[:31]) and found[30:] == sorted(found[30:], reverse=True)
    assert 0 < found[-1] < 0.001


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warmup_rises_linearly(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_epochs=1.9)
    assert found[:19] == pytest.approx([0.4 * (i + 1) / 20 for i in range(19)])
    assert found[19] == pytest.approx(0.4)
    if schedule == "cosine":
        assert found[60] == pytest.approx(0.2 * (1 + math.cos(math.pi * 41 / 81)))
    if schedule == "step":
        assert found[49:51] == pytest.approx([0.4, 0.04])


def test_warmup_longer_than_the_run_and_one_step() -> None:
    config = FitConfig(epochs=10, learning_rate=0.4, warmup_epochs=5)
    assert learning_rate(config, 2, 3, 10) == pytest.approx(0.4 * 3 / 51)
    assert learning_rate(FitConfig(epochs=1, learning_rate=0.4), 0, 1, 1) == 0.4


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_norms_and_biases_get_no_weight_decay(kind: str) -> None:
    model = densenet([2, 2], 4, stem="cifar", bn_size=2, num_classes=10)
    model.classifier.weight.requires_grad_(False)
    optimizer = build_optimizer(
        model, FitConfig(epochs=1, optimizer=kind, learning_rate=0.3, weight_decay=0.02)
    )
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert id(names.pop("classifier.weight")) not in decay
    assert len(decay) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in names.items():
        conv = "conv" in name
        assert decay[id(parameter)] == (0.02 if conv else 0.0), name
    assert all(g["lr"] == 0.3 for g in optimizer.param_groups)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]


def test_sgd_is_nesterov_with_the_momentum() -> None:
    """One parameter, two steps, by hand: v = m v + g; w -= lr (g + m v)."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    config = FitConfig(epochs=1, learning_rate=0.1, momentum=0.5, weight_decay=0.01)
    optimizer = build_optimizer(net, config)
    weight, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0):
        net.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        total = gradient + 0.01 * weight
        velocity = 0.5 * velocity + total
        weight -= 0.1 * (total + 0.5 * velocity)
        assert net.weight.item() == pytest.approx(weight)


def test_only_norms_trained_is_one_group_and_nothing_is_an_error() -> None:
    model = densenet([2, 2], 4, stem="cifar", num_classes=10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    assert len(build_optimizer(model, FitConfig(epochs=1)).param_groups) == 1
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"every parameter is frozen.*set requires_grad=True"):
        build_optimizer(model, FitConfig(epochs=1))
