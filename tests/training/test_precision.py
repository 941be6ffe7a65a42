"""Half precision: trained in float32, and what it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_dn.data.datasets import load_datasets
from prune_dn.errors import TrainingError
from prune_dn.models import DenseNet, densenet
from prune_dn.training import FitConfig, fit
from prune_dn.training.precision import in_float32

HALF = [torch.float16, torch.bfloat16]


def net() -> DenseNet:
    torch.manual_seed(0)
    return densenet([2], 4, bn_size=None, stem="cifar", in_channels=1, num_classes=10)


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.5}, {"distillation": {"temperature": 2.0}, "precision": "bf16"}]
)
@pytest.mark.parametrize("dtype", HALF)
def test_a_fit_is_that_of_the_same_weights_in_float32(dtype: torch.dtype, options) -> None:
    data = load_datasets("digits", image_size=8, limit=64)
    config = FitConfig(epochs=2, batch_size=16, learning_rate=0.05, **options)
    half = net().to(dtype)
    wide = copy.deepcopy(half).float()
    results = []
    for model in (half, wide):
        teacher = net().to(dtype) if "distillation" in options else None
        results.append(fit(model, data, config, teacher=teacher, progress=False))
        assert teacher is None or {p.dtype for p in teacher.parameters()} == {dtype}
    assert {p.dtype for p in half.parameters()} == {dtype}
    for (name, a), b in zip(half.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
    losses = [[row["loss"] for row in result.history] for result in results]
    assert losses[0] == losses[1]
    before = net().to(dtype).features.conv0.weight
    assert not torch.equal(half.features.conv0.weight, before)


def test_a_fit_that_fails_leaves_the_dtypes() -> None:
    data = load_datasets("digits", image_size=8, limit=64)
    model = net().bfloat16()
    with pytest.raises(TrainingError, match="distillation needs a teacher"):
        fit(model, data, FitConfig(epochs=1, distillation={"temperature": 2.0}), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_each_tensor_has_its_own_dtype_again() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1).half(), nn.BatchNorm2d(2).double(), nn.Conv2d(2, 1, 1))
    before = {name: (x.dtype, x.clone()) for name, x in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    with in_float32(model):
        assert model[0].weight.dtype == torch.float32 and model[1].weight.dtype == torch.float64
    assert [id(p) for p in model.parameters()] == identities
    for name, x in model.state_dict().items():
        assert x.dtype == before[name][0] and torch.equal(x, before[name][1])


def test_what_float16_cannot_hold_stays_in_float32() -> None:
    model = nn.BatchNorm2d(3).half()
    with (
        pytest.warns(UserWarning, match=r"stays in float32: in torch.float16 running_var holds 1"),
        in_float32(model),
    ):
        model.running_var[1] = 1e5
    assert model.running_var.tolist() == [1, 1e5, 1] and model.weight.dtype == torch.float32
