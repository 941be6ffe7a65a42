"""The pull on the norms' scales against closed forms, alone and inside a step of `fit`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from prune_dn.data.datasets import Datasets, load_datasets
from prune_dn.errors import TrainingError
from prune_dn.models import DenseNet, densenet
from prune_dn.training import FitConfig, Sparsity, fit
from prune_dn.training.regularizers import (
    add_l1_gradient_,
    describe_scales,
    norm_scales,
    shrink_,
    sparsity_notice,
)


def net() -> DenseNet:
    torch.manual_seed(1)
    model = densenet([2, 2], 4, stem="cifar", bn_size=None, in_channels=1, num_classes=10)
    for scale in norm_scales(model):
        nn.init.uniform_(scale, -1, 1)
    return model


@pytest.fixture(scope="module")
def data() -> Datasets:
    return load_datasets("digits", image_size=8, limit=60, augment=False)


def test_scales_are_those_of_trainable_norms() -> None:
    model = net()
    want = [p for n, p in model.named_parameters() if "norm" in n and n.endswith("weight")]
    assert [id(s) for s in norm_scales(model)] == [id(p) for p in want] and len(want) == 6
    want[0].requires_grad_(False)
    assert len(norm_scales(model)) == 5
    assert norm_scales(nn.BatchNorm2d(3, affine=False)) == []


def test_l1_gradient() -> None:
    """d/dw (loss + s * sum |w|), by autograd; at 0 the penalty has no pull."""
    scale = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0, 0.0]))
    loss = (scale**3).sum()
    (want,) = torch.autograd.grad(loss + 0.1 * scale.abs().sum(), scale)
    (scale.grad,) = torch.autograd.grad((scale**3).sum(), scale)
    add_l1_gradient_([scale, nn.Parameter(torch.ones(2))], 0.1)
    assert torch.allclose(scale.grad, want) and float(scale.grad[3]) == 0


def test_proximal_step_minimises() -> None:
    """argmin_u (u - w)^2 / 2 + a |u|, found on a fine grid."""
    start = torch.tensor([-2.0, -0.3, 0.0, 0.29, 0.31, 5.0])
    scale = nn.Parameter(start.clone())
    shrink_([scale], 0.3)
    grid = np.linspace(-6, 6, 120_001)
    for before, after in zip(start.tolist(), scale.tolist(), strict=True):
        best = grid[np.argmin((grid - before) ** 2 / 2 + 0.3 * np.abs(grid))]
        assert after == pytest.approx(best, abs=2e-4)
    assert scale[3] == 0 and scale.requires_grad and scale.grad is None


def gradients(model: DenseNet, images: Tensor, labels: Tensor, pieces: int) -> list[Tensor]:
    """Mean gradient over `pieces` equal parts, each normalised alone, by plain autograd."""
    model.train()
    model.zero_grad()
    for x, y in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
        (F.cross_entropy(model(x), y) / pieces).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["l1", "proximal"])
def test_one_step_of_fit(data: Datasets, kind: Any, accumulation: int) -> None:
    """w - lr (g + s sign(w)), or shrunk by lr s: once a step, also when gradients accumulate."""
    rate, strength = 0.05, 0.3
    batch = len(data.train) // accumulation
    config = FitConfig(
        epochs=1,
        max_steps=1,
        batch_size=batch,
        gradient_accumulation=accumulation,
        momentum=0,
        nesterov=False,
        learning_rate=rate,
        weight_decay=0,
        schedule="constant",
        channels_last=False,
        sparsity=Sparsity(kind=kind, strength=strength),
    )
    model, twin = net(), net()
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module.training else None
    )
    fit(model, data, config, progress=False)
    handle.remove()
    images = torch.cat(seen)
    everything, labels = data.train.__getitems__(list(range(len(data.train))))
    place = [int(((everything - x) == 0).flatten(1).all(1).nonzero()[0, 0]) for x in images]
    assert len(set(place)) == len(place) == batch * accumulation
    slopes = gradients(twin, images, labels[place], accumulation)
    scales = {id(s) for s in norm_scales(twin)}
    moved = 0
    for ours, before, slope in zip(model.parameters(), twin.parameters(), slopes, strict=True):
        pull = rate * strength if id(before) in scales else 0.0
        want = before.detach() - rate * slope
        if kind == "l1":
            want = want - pull * before.detach().sign()
        else:
            want = want.sign() * (want.abs() - pull).clamp(min=0)
        moved += id(before) in scales
        assert torch.allclose(ours, want, atol=2e-6)
    assert moved == 6


@pytest.mark.parametrize("clip", [None, 0.5])
def test_penalty_is_added_to_unscaled_gradients(
    data: Datasets, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    """Gradients 1024 times too large until they are unscaled, as in fp16, change no step."""
    config = FitConfig(
        epochs=1,
        batch_size=25,
        learning_rate=0.05,
        clip_norm=clip,
        sparsity=Sparsity(strength=0.3),
    )
    plain, scaled = net(), net()
    fit(plain, data, config, progress=False)
    gradients_of = list(scaled.parameters())

    def unscale(self: Accelerator, optimizer: object = None) -> None:
        for parameter in gradients_of:
            assert parameter.grad is not None
            parameter.grad.div_(1024)

    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (loss * 1024).backward())
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    fit(scaled, data, config, progress=False)
    for first, second in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(first, second)


def test_strong_pull_makes_scales_small_and_is_described(data: Datasets) -> None:
    model = net()
    config = FitConfig(
        epochs=3, batch_size=25, learning_rate=0.1, sparsity=Sparsity(kind="proximal", strength=3.0)
    )
    result = fit(model, data, config, progress=False)
    gamma = result.history[-1]["gamma"]
    values = torch.cat([s.detach().abs() for s in norm_scales(model)]).numpy()
    assert gamma["share_small"] == pytest.approx((values < 0.01).mean()) and values.min() == 0
    assert gamma["share_small"] > 0.5 and result.notices == []


def test_description_and_notice() -> None:
    model = net()
    found = describe_scales(model)
    values = torch.cat([s.detach().abs() for s in norm_scales(model)]).numpy()
    for percent, value in found["quantiles"].items():
        assert value == pytest.approx(np.quantile(values, int(percent) / 100), abs=1e-5)
    counts, _ = np.histogram(values, bins=20, range=(0, values.max()))
    assert found["histogram"]["counts"] == counts.tolist()
    assert found["histogram"]["to"] == pytest.approx(values.max())
    text = sparsity_notice(found, Sparsity(strength=0.002))
    assert text is not None and "not sparse" in text and "strength above 0.002" in text
    assert sparsity_notice({**found, "share_small": 0.05}, Sparsity()) is None


def test_pull_on_nothing_is_an_error(data: Datasets) -> None:
    model = net()
    for scale in norm_scales(model):
        scale.requires_grad_(False)
    config = FitConfig(epochs=1, sparsity=Sparsity())
    with pytest.raises(TrainingError, match="scales of batch norms; none here can train"):
        fit(model, data, config, progress=False)


def test_weak_pull_gives_a_notice(data: Datasets, capsys: pytest.CaptureFixture[str]) -> None:
    model = densenet([1], 4, stem="cifar", in_channels=1, num_classes=10)
    config = FitConfig(epochs=1, learning_rate=0.01, sparsity=Sparsity(strength=1e-5))
    result = fit(model, data, config, progress=True)
    assert len(result.notices) == 1 and "not sparse" in result.notices[0]
    assert f"notice: {result.notices[0]}" in capsys.readouterr().err
