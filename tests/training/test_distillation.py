"""The distillation loss against explicit sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from prune_dn.errors import TrainingError
from prune_dn.training.distillation import distillation_loss


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_explicit_sum(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps, pt = ([math.exp(v / temperature) for v in row] for row in (s, t))
        ps, pt = [v / sum(ps) for v in ps], [v / sum(pt) for v in pt]
        total += sum(q * math.log(q / p) for p, q in zip(ps, pt, strict=True))
    want = temperature**2 * total / len(student)
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(want)


def test_temperature_one_is_kl_of_teacher_from_student() -> None:
    student, teacher = logits(0), logits(1)
    want = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    assert torch.allclose(distillation_loss(student, teacher, 1.0), want)


def test_same_answers_cost_nothing_and_pull_nowhere() -> None:
    student = logits(0).requires_grad_()
    loss = distillation_loss(student, logits(0) + 7.0, 3.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-12


def test_gradient_keeps_its_size_as_temperature_grows() -> None:
    """T^2 makes the limit (s - t) / (classes * N), with centred logits."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, 1e4), student)
    centred = [x - x.mean(dim=1, keepdim=True) for x in (student.detach(), teacher)]
    assert torch.allclose(gradient, (centred[0] - centred[1]) / (5 * 6), atol=1e-4)


def test_logits_that_do_not_fit() -> None:
    """Neither a broadcast nor a softmax that is always 1."""
    with pytest.raises(TrainingError, match="teacher answers 1 classes, the model 5"):
        distillation_loss(logits(0), logits(1)[:, :1], 1.0)
    with pytest.raises(TrainingError, match="nothing to distil from one output"):
        distillation_loss(logits(0)[:, :1], logits(1)[:, :1], 1.0)
