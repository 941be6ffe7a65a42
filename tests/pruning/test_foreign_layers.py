"""Layers that change the number or order of channels, computed weights, other inputs: right or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from oracle import randomise_
from other_nets import Blur
from torch import nn

import prune_dn
from prune_dn import prune
from prune_dn.errors import ConfigError, PruningError

X = torch.randn(2, 3, 16, 16)


class Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def maxout(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(*x.chunk(2, 1))


def gated(x: torch.Tensor) -> torch.Tensor:
    left, right = x.split(8, 1)
    return left * right.sigmoid()


def parts_of_four(x: torch.Tensor) -> torch.Tensor:
    return x.view(len(x), -1, 4, *x.shape[2:]).flip(2).flatten(1, 2)


def whole_parts(mask: torch.Tensor) -> torch.Tensor:
    parts = mask.view(4, 4)
    assert (parts == parts[:, :1]).all()
    return mask


WHOLE = "the conv before it stays whole"
Follow = Callable[[torch.Tensor], torch.Tensor]
# A layer between two convs, how many channels it makes of 16, and what is right: the mask of its
# channels by the mask of those that it reads, or that nothing is cut before it.
CHANGES: dict[str, tuple[nn.Module, int, str | Follow]] = {
    "GLU": (nn.GLU(1), 8, lambda mask: mask[:8]),
    "functional GLU": (Call(lambda x: F.glu(x, 1)), 8, lambda mask: mask[:8]),
    "maxout": (Call(maxout), 8, lambda mask: mask[:8]),
    "gate, split at 8": (Call(gated), 8, WHOLE),
    "split at half its width": (
        Call(lambda x: torch.maximum(*x.split(x.shape[1] // 2, 1))),
        8,
        lambda mask: mask[:8],
    ),
    "view at 16": (Call(lambda x: x.view(-1, 16, x.shape[2], x.shape[3])), 16, WHOLE),
    "parts of four": (Call(parts_of_four), 16, whole_parts),
    "stacked and summed": (
        Call(lambda x: torch.stack([x, x.relu()], 1).mul(2).sum(1)),
        16,
        lambda mask: mask,
    ),
    "GroupNorm": (nn.GroupNorm(4, 16), 16, whole_parts),
    "GroupNorm of one group": (nn.GroupNorm(1, 16), 16, WHOLE),
    "blur": (nn.Sequential(nn.Upsample(scale_factor=2), Blur(16)), 16, lambda mask: mask),
    "blur by the width": (
        Call(
            lambda x: F.conv2d(
                x, torch.ones(1, 1, 3, 3).to(x).expand(x.shape[1], -1, -1, -1), groups=x.shape[1]
            )
        ),
        16,
        lambda mask: mask,
    ),
    "CReLU": (Call(lambda x: torch.cat([x, -x], 1).relu()), 32, lambda mask: mask.repeat(2)),
    "PixelShuffle": (nn.PixelShuffle(2), 4, lambda mask: mask[::4]),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), 64, lambda mask: mask.repeat_interleave(4)),
    "Unfold": (
        nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (8, 8))),
        64,
        lambda mask: mask.repeat_interleave(4),
    ),
    "pooling over channels": (Call(lambda x: F.max_pool3d(x[:, None], (2, 1, 1))[:, 0]), 8, WHOLE),
    "top channels": (Call(lambda x: x.topk(8, 1)[0]), 8, WHOLE),
    "slice": (Call(lambda x: x[:, ::2]), 8, WHOLE),
    "sum of parts": (Call(lambda x: sum(x.chunk(4, 1))), 4, lambda mask: mask[:4]),
    "padding": (
        Call(lambda x: F.pad(x, (0, 0, 0, 0, 0, 4))),
        20,
        lambda mask: F.pad(mask, (0, 4), value=1),
    ),
    "repeat": (Call(lambda x: x.repeat(1, 2, 1, 1)), 32, lambda mask: mask.repeat(2)),
    "ChannelShuffle": (nn.ChannelShuffle(4), 16, lambda mask: mask.view(4, 4).T.flatten()),
    "LocalResponseNorm": (nn.LocalResponseNorm(3), 16, WHOLE),
    "softmax": (nn.Softmax2d(), 16, WHOLE),
    "depthwise, twice as many": (
        nn.Conv2d(16, 32, 3, padding=1, groups=16),
        32,
        lambda mask: mask.repeat_interleave(2),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_channels_is_cut_right_or_refused(name) -> None:
    layer, width, right = CHANGES[name]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), layer,
        nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    net = randomise_(net, 0).double().eval()
    options = {"criterion": "l2", "unit": "params", "input_size": 16, "scope": "local"}
    small, dense = prune(net, 0.15, **options), copy.deepcopy(net)
    left, last = (torch.isin(net[n].bias, small[n].bias).double() for n in (1, 4))
    if isinstance(right, str):
        assert bool(left.all())
    else:
        assert not bool(left.all())
        mask = right(left)[:, None, None]
        dense[3].register_forward_pre_hook(lambda _, x: x[0] * mask)
    assert not bool(last.all())
    dense[8].register_forward_pre_hook(lambda _, x: x[0] * last)
    torch.testing.assert_close(small(X.double()), dense(X.double()))


def test_a_layer_with_two_names_costs_what_it_does() -> None:
    """As in MONAI's DynUNet: the budget was missed without a word."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
            self.layers = nn.Sequential(self.first, nn.ReLU(), self.last)

        def forward(self, x):
            return self.layers(x)

    net = Net()
    small = prune(net, 0.5, unit="macs", criterion="l2", input_size=16)
    assert small.layers[0] is small.first
    assert prune_dn.count(small, 16).macs <= prune_dn.count(net, 16).macs / 2


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


def test_standardised_weights_cost_and_stay() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), Standardised(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)
    )
    with pytest.raises(
        PruningError, match="0 stays: 1 computes its weight anew in each forward; repl"
    ):
        prune(net, 0.3, unit="macs", criterion="l2", input_size=16)
    net = nn.Sequential(net, nn.ReLU(), nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    small = prune(net, 0.1, unit="macs", criterion="l2", input_size=16)
    assert small[0][1].weight.shape == (16, 16, 3, 3)
    assert prune_dn.count(small, 16).macs <= 0.9 * prune_dn.count(net, 16).macs


def test_layers_that_see_neighbouring_channels_are_refused() -> None:
    """The effect is small: 1e-5 of the answers."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 3))
    with pytest.raises(PruningError, match="0 stays: pooling over an axis of channels reads it"):
        prune(net, 0.3, input_size=16)


class Thresholds(nn.Module):
    """Writes what it computes into float32 zeros, as torchxrayvision's thresholds do."""

    def forward(self, x):
        out = torch.zeros(x.shape)
        out[x > 0.1] = x[x > 0.1].sqrt()
        return out


def head_of(*layers: nn.Module) -> nn.Sequential:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), *pooled, *layers)
    return randomise_(net, 0).eval()


def test_a_net_that_cannot_run_in_float64_is_checked_in_float32() -> None:
    net = head_of(Thresholds())
    with pytest.warns(UserWarning, match=r"cannot run in float64 .* was checked in float32"):
        small = prune(net, 0.3, unit="params", input_size=16)
    assert small[0].out_channels + small[2].out_channels < 24 and small(X).shape == (2, 4)


def test_a_net_that_rounds_to_float32_inside_is_checked_as_well_as_that_allows() -> None:
    def half_way(x: torch.Tensor) -> torch.Tensor:
        return x.float().softmax(1).to(x.dtype)

    small = prune(head_of(Call(half_way)), 0.3, unit="params", input_size=16)
    assert small[0].out_channels + small[2].out_channels < 24
    net = head_of(Call(half_way))
    net[1] = Call(lambda x: x * x.shape[1])
    with pytest.raises(PruningError, match=r"outputs of 0 depends"):
        prune(net, 0.7, unit="params", input_size=16)


# -- computed weights ----------------------------------------------------------------------------


def masked(layer: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def old_spectral_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(layer)


@pytest.mark.parametrize(
    "apply", [masked, nn.utils.parametrizations.weight_norm, old_spectral_norm]
)
def test_computed_weights_are_refused_with_the_remedy(apply) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    apply(model[2])
    with pytest.raises(PruningError, match=r"2.weight is computed by .*; bake it in first") as e:
        prune(model, 0.3, input_size=16)
    want = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(str(e.value).rpartition("first: ")[2], {"torch": torch, "model": model})
    torch.testing.assert_close(model(X), want)
    assert prune(model, 0.3, input_size=16)(X).shape == want.shape


def test_what_cannot_be_copied_cannot_be_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[1])
    model(X)
    with pytest.raises(ConfigError, match=r"cannot be copied: 1.weight .*remove_weight_norm"):
        prune_dn.count(model, 16)


# -- inputs --------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(9, 2)

    def forward(self, image, age, scale=1.0):
        return self.head(torch.cat([self.conv(image).mean((2, 3)), age * scale], 1))


class FromDict(TwoInputs):
    def forward(self, batch):
        return super().forward(batch["image"], batch["age"])


class KeywordOnly(TwoInputs):
    def forward(self, image, *, age):
        return super().forward(image, age)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (TwoInputs, "its forward takes image, age, not only"),
        (KeywordOnly, "its forward takes image, age, not only"),
        (FromDict, "its forward needs more than"),
    ],
)
def test_other_inputs_than_one_image_have_no_size(kind, what) -> None:
    text = rf"{what} one image tensor \(N, C, H, W\): give example_inputs"
    with pytest.raises(ConfigError, match=text) as e:
        prune_dn.count(kind(), 16)
    assert "size" not in str(e.value)


AGE = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (TwoInputs, (X, AGE)),
        (TwoInputs, {"image": X, "age": AGE, "scale": 2.0}),
        (KeywordOnly, {"image": X, "age": AGE}),
        (FromDict, ({"image": X, "age": AGE},)),
    ],
)
def test_other_inputs_are_given_as_examples(kind, inputs) -> None:
    net = kind()
    with pytest.raises(
        PruningError, match=r"does not run on .*; give example_inputs that it takes"
    ):
        prune(net, 0.3, input_size=16)
    small = prune(net, 0.3, unit="params", example_inputs=inputs)
    assert small.conv.out_channels < 8
    out = small(**inputs) if isinstance(inputs, dict) else small(*inputs)
    assert out.shape == (2, 2)


def test_the_remedy_for_two_inputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TwoInputs()

        def forward(self, image):
            return self.net(image, torch.zeros(len(image), 1))

    small = prune(Wrapped(), 0.3, input_size=16)
    assert small.net(X, torch.ones(2, 1)).shape == (2, 2) and small.net.conv.out_channels < 8
