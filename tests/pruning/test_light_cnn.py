"""Pruned Light CNNs equal masked ones, whose masks stand where plain functions read."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import strategies as st
from light_cnn_oracle import (
    BUILDERS,
    SHALLOW,
    SMALL,
    check_contract,
    distinct,
    kept_units,
    light_cnn_configs,
)
from properties import counted, feasible
from torch import nn

import prune_dn
from prune_dn.errors import PruningError
from prune_dn.models import (
    LightCNN,
    LightCNNConfig,
    MaxFeatureMap,
    light_cnn_9,
    light_cnn_29,
)


@counted(
    light_cnn_configs(),
    st.lists(st.sampled_from([0.1, 0.3, 0.6]), min_size=2, max_size=2),
    st.sampled_from(["channels", "params", "macs"]),
    st.sampled_from(["random", "l1", "l2", "fpgm", "lamp"]),
    st.sampled_from(["global", "local"]),
    rounds=2,
)
def test_pruned_equals_masked_over_rounds(
    config: LightCNNConfig, ratios: list[float], unit: str, criterion: str, scope: str
) -> int:
    net = distinct(LightCNN(config))
    for done, ratio in enumerate(ratios):
        request = {
            "pruning_ratio": ratio, "unit": unit, "criterion": criterion, "scope": scope, "seed": done,
        }  # fmt: skip
        found = feasible(functools.partial(prune_dn.prune, net), request, {"cannot bring": {}})
        if found is None:
            return done
        small, asked = found
        assert isinstance(small, LightCNN)
        check_contract(net, small)
        whole, left = (getattr(prune_dn.count(n), unit) for n in (net, small))
        assert left <= (1 - asked["pruning_ratio"]) * whole
        net = small
    return len(ratios)


@pytest.mark.parametrize("criterion", ["activation", "taylor", "fisher"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_criteria_that_read_images(builder, criterion) -> None:
    net = distinct(builder(4, **SMALL))
    images = torch.randn(6, 1, 32, 32).double()
    batches = [(images, torch.tensor([0, 1, 2, 3, 0, 1]))]
    small = prune_dn.prune(net, 0.3, criterion=criterion, compensate="none", calibration=batches)
    check_contract(net, small)
    assert kept_units(net, small) != kept_units(net, prune_dn.prune(net, 0.3))


@pytest.mark.parametrize("builder", BUILDERS)
def test_half_goes_without_a_word_more(builder) -> None:
    net = distinct(builder(4, **SMALL)).float().train()
    before = copy.deepcopy(net.state_dict())
    small = prune_dn.prune(net, 0.5)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    convs = [
        sum(m.out_channels for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (net, small)
    ]
    assert convs[1] <= convs[0] / 2 and convs[1] > convs[0] * 0.4
    assert prune_dn.count(small).channels == convs[1]
    loss = small(torch.randn(2, 1, 32, 32)).square().sum()
    loss.backward()
    assert small.training and all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in net.parameters())
    torch.optim.SGD(small.parameters(), lr=0.01).step()
    assert torch.isfinite(small(torch.randn(2, 1, 32, 32))).all()
    again = prune_dn.prune(net, 0.5, criterion="l2", input_size=32)
    assert again.config == small.config


def test_the_unit_that_is_read_least_goes() -> None:
    """Importance is the sum over all readers of a trunk; the makers' own weights say nothing."""
    net = distinct(light_cnn_29(4, **SHALLOW))
    readers = ("block1.0.conv1.filter", "group1.conv_a.filter")
    with torch.no_grad():
        for name in readers:
            net.get_submodule(name).weight[:, 4] *= 1e-3
        net.conv1.filter.weight[4] *= 100
    small = prune_dn.prune(net, 0.01, scope="local", protect=["block3", "block4", "group*", "fc*"])
    assert kept_units(net, small)["conv1.filter"] == set(range(6))  # group1 reads it, so it stays
    small = prune_dn.prune(net, 0.01, protect=["group2", "block3", "block4", "group3", "group4"])
    kept = kept_units(net, small)
    assert kept["conv1.filter"] == kept["block1.0.conv2.filter"] == set(range(6)) - {4}


def test_trunks_are_one_and_inner_channels_free() -> None:
    net = distinct(light_cnn_29(4, **SHALLOW))
    kept = kept_units(net, prune_dn.prune(net, 0.5, criterion="random"))
    assert kept["conv1.filter"] == kept["block1.0.conv2.filter"]
    trunk = kept["group2.conv.filter"]
    assert trunk == kept["block3.0.conv2.filter"] == kept["block3.1.conv2.filter"]
    inner = [
        kept[f"{name}.filter"] for name in ("block3.0.conv1", "block3.1.conv1", "group3.conv_a")
    ]
    assert len({frozenset(units) for units in [trunk, *inner]}) > 2


def test_a_kernel_of_the_maps_size_is_read_by_the_linear_layer() -> None:
    """The score of a last map is the norm of its four columns in each row."""
    net = distinct(light_cnn_9(4, **SMALL))
    with torch.no_grad():
        net.fc1.filter.weight[:, 4 * 3 : 4 * 4] = 0
    others = [f"features.{i}" for i in (0, 2, 4, 6)] + ["features.7.conv_a", "fc2"]
    with pytest.raises(PruningError, match="leaves no channels"):
        prune_dn.prune(net, 0.01, protect=[*others, "fc1"])
    small = prune_dn.prune(net, 0.01, unit="params", protect=others)
    assert kept_units(net, small)["features.7.conv.filter"] == set(range(8)) - {3}
    assert small.fc1.filter.in_features == 7 * 4


@pytest.mark.parametrize("builder", BUILDERS)
def test_rounding_and_least_width(builder) -> None:
    net = distinct(builder(4, **SMALL))
    small = prune_dn.prune(net, 0.4, round_to=4, criterion="random")
    for layer, old in zip(small.config.layers, net.config.layers, strict=True):
        assert layer.units % 4 == 0 or layer.units == old.units
    small = prune_dn.prune(net, 0.2, unit="params", min_channels=5)
    assert min(layer.units for layer in small.config.layers) >= 5


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("fc2", ["fc.filter"]),
        ("fc", ["fc.filter", "group4.conv.filter"]),
        ("block1.0.conv2", ["conv1.filter", "block1.0.conv1.filter", "block1.0.conv2.filter"]),
    ],
)
def test_protected_layers_keep_all(pattern, whole) -> None:
    """One half of a pair cannot be named: a pattern means a layer, all that it makes and reads."""
    net = distinct(light_cnn_29(4, **SHALLOW))
    small = prune_dn.prune(net, 0.5, criterion="random", protect=[pattern])
    for name, units in kept_units(net, small).items():
        all_stay = len(units) == net.config.named()[name].units
        assert all_stay or name not in whole, name
    for name in whole:
        if name.startswith(pattern):
            assert torch.equal(small.get_submodule(name).weight, net.get_submodule(name).weight)


def test_mfm_knows_its_units_after_the_cut() -> None:
    net = distinct(light_cnn_9(4, **SMALL))
    small = prune_dn.prune(net, 0.5)
    mfm = [m for m in small.modules() if isinstance(m, MaxFeatureMap)]
    assert [m.units for m in mfm] == [layer.units for layer in small.config.layers]


def test_refusals() -> None:
    net = distinct(light_cnn_29(4, **SHALLOW))
    for options, message in (
        (
            {"criterion": "bn_scale"},
            "no norm with a scale is on channels of this LightCNN .* as l2",
        ),
        (
            {"criterion": "reconstruction"},
            "'reconstruction' needs calibration images: give calibration=",
        ),
        ({"units": ["edge"]}, r"units=\['edge'\]: this net has none of them"),
        ({"compensate": "mean"}, "compensate='mean' needs calibration images"),
        ({"unit": "macs", "min_channels": 6}, "cannot bring macs from"),
        ({"protect": ["nowhere"]}, "'nowhere'"),
    ):
        with pytest.raises(PruningError, match=message):
            prune_dn.prune(net, 0.9, **options)
    plan = prune_dn.make_plan(net, 0.5, unit="macs")
    assert prune_dn.apply_plan(net, plan).config == plan.config_after
