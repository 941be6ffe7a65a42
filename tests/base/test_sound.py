"""Unsound weights are named up front, by every entry, whatever it would do with them."""

from __future__ import annotations

import pytest
import torch
import torchvision.models as zoo
from oracle import randomise_
from torch import nn

from prune_dn.base.sound import check_filled, find_unsound
from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, densenet, light_cnn_9
from prune_dn.pruning import apply_plan, compensate_plan, make_plan, prune, settling_plan
from prune_dn.pruning.sensitivity import sensitivity

IMAGES = [torch.randn(4, 3, 16, 16)]


def net(**how) -> DenseNet:
    choices = {"bn_size": 2, "stem": "cifar", "num_classes": 3, **how}
    return randomise_(densenet([2, 1], 4, **choices), 5).eval()


def damaged(model: nn.Module, name: str, value: float) -> nn.Module:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[name].view(-1)[1] = value
    return model


VARIANCE = "features.denseblock1.denselayer2.norm1.running_var"
ENTRIES = {
    "bn_scale": lambda model: make_plan(model, 0.3),
    "random": lambda model: make_plan(model, 0.3, criterion="random"),
    "refit": lambda model: prune(
        model, 0.3, criterion="l2", compensate="least_squares", calibration=IMAGES
    ),
    "reconstruction": lambda model: prune(
        model, 0.3, criterion="reconstruction", calibration=IMAGES
    ),
    "apply": lambda model: apply_plan(model, make_plan(net(), 0.3)),
    "compensate": lambda model: compensate_plan(
        net(), model, make_plan(net(), 0.3), IMAGES, "mean"
    ),
    "sensitivity": lambda model: sensitivity(model, lambda _: 0.0),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (VARIANCE, torch.nan, "1 NaN or infinite value among 12"),
        (VARIANCE, -0.1, "1 negative value among 12"),
        ("features.norm5.running_mean", torch.inf, "1 NaN or infinite value among 12"),
        ("classifier.bias", torch.nan, "1 NaN or infinite value among 3"),
    ],
)
def test_a_densenet(entry: str, name: str, value: float, what: str) -> None:
    with pytest.raises(PruningError, match=f"^{name} holds {what}: "):
        ENTRIES[entry](damaged(net(), name, value))


def test_a_plan_that_settles() -> None:
    model = net(bn_size=None, mfm={"*": "2/1"})
    with pytest.raises(PruningError, match=r"^features.norm5.bias holds 1 NaN"):
        settling_plan(damaged(model, "features.norm5.bias", torch.nan), IMAGES)


@pytest.mark.parametrize("criterion", ["bn_scale", "l2", "taylor"])
@pytest.mark.parametrize(
    ("name", "value"), [("layer2.0.bn1.running_var", -1.0), ("layer3.0.conv1.weight", -torch.inf)]
)
def test_another_cnn(criterion: str, name: str, value: float) -> None:
    model = damaged(zoo.resnet18(num_classes=3), name, value)
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))] if criterion == "taylor" else None
    with pytest.raises(PruningError, match=f"^{name} holds 1 "):
        prune(model, 0.3, criterion=criterion, input_size=32, compensate="none", calibration=data)


def test_a_light_cnn_and_torchvisions_densenet() -> None:
    light = damaged(light_cnn_9(3, image_size=32), "fc2.bias", torch.nan)
    with pytest.raises(PruningError, match=r"^fc2.bias holds 1 NaN or infinite value among 3: "):
        prune(light, 0.3)
    theirs = damaged(zoo.densenet121(num_classes=3), "features.norm0.weight", torch.inf)
    with pytest.raises(PruningError, match=r"^features.norm0.weight holds 1 NaN or infinite "):
        prune(theirs, 0.3)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_every_dtype(dtype: torch.dtype) -> None:
    assert find_unsound([("w", torch.tensor([1.0, 0.0, -2.0]).to(dtype))]) is None
    found = find_unsound(
        [("a", torch.tensor([3])), ("w", torch.tensor([1.0, torch.nan]).to(dtype))]
    )
    assert found == "w holds 1 NaN or infinite value among 2"


def test_what_is_sound() -> None:
    """Integers, a mask of infinities, no running statistics, a variance of zero, a lazy layer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    model.append(nn.LazyConv2d(4, 3)).append(nn.BatchNorm2d(4))
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    model[3].running_var.zero_()
    model(torch.zeros(1, 3, 8, 8))
    assert prune(model, 0.3, criterion="l2", input_size=8)[0].out_channels < 8


def test_a_tensor_without_values() -> None:
    with pytest.raises(PruningError, match=r"features.conv0.weight is on the meta device"):
        prune(net().to("meta"), 0.3)


def test_the_last_look_at_a_new_net() -> None:
    small = net()
    check_filled(small)
    small.features.norm5.running_var = torch.empty(15, device="meta")
    with pytest.raises(PruningError, match=r"features.norm5.running_var is on the meta device"):
        check_filled(small)
