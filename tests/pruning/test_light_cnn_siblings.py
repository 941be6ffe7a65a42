"""Single filters of a Light CNN's pairs, and who wins, against plain functions and pixels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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
    slow,
)
from properties import counted, feasible
from torch import Tensor

import prune_dn
from prune_dn.errors import PruningError
from prune_dn.models import LightCNN, LightCNNConfig, MFMConfig, light_cnn_9, light_cnn_29

IMAGES = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(1)).double()
siblings = functools.partial(prune_dn.prune, units=["sibling"])


def gone_filters(net: LightCNN, small: LightCNN) -> dict[str, set[int]]:
    """Which filters of `net` are not in `small`, known by their biases."""
    state, left = net.state_dict(), small.state_dict()
    return {
        name: {
            number
            for number, bias in enumerate(state[f"{name}.bias"].tolist())
            if bias not in left[f"{name}.bias"].tolist()
        }
        for name in net.config.named()
    }


def partner(layer: MFMConfig) -> dict[int, int]:
    """The rival of each filter that has one."""
    paired = [unit for unit in range(layer.units) if unit not in layer.alone]
    seconds = {unit: layer.units + place for place, unit in enumerate(paired)}
    return {**seconds, **{second: first for first, second in seconds.items()}}


def check_siblings(net: LightCNN, small: LightCNN) -> None:
    """One of each pair at most is gone, and who had it as a rival stands alone, exactly."""
    gone = gone_filters(net, small)
    for name, layer in net.config.named().items():
        rivals, left = partner(layer), small.config.named()[name]
        assert left.units == layer.units
        assert all(number in rivals and rivals[number] not in gone[name] for number in gone[name])
        alone = {min(number, rivals[number]) for number in gone[name]} | set(layer.alone)
        assert set(left.alone) == alone
    config = net.config
    x = torch.randn(2, config.in_channels, config.image_size, config.image_size).double()
    with torch.no_grad():
        found, wanted, plain = small(x), slow(net, x, gone=gone), slow(small, x)
    near = 1e-10 * (1 + wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=0, atol=near)
    torch.testing.assert_close(found, plain, rtol=0, atol=near)


@counted(
    light_cnn_configs(),
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.4, 0.8])), min_size=2, max_size=2),
    st.sampled_from(["channels", "params", "macs"]),
    st.sampled_from(["random", "l1", "l2", "mfm_win_rate"]),
    st.sampled_from(["global", "local"]),
    rounds=2,
)
def test_pruned_equals_masked_over_rounds_of_both_grains(
    config: LightCNNConfig,
    rounds: list[tuple[bool, float]],
    unit: str,
    criterion: str,
    scope: str,
) -> int:
    net = distinct(LightCNN(config))
    images = torch.randn(3, config.in_channels, config.image_size, config.image_size)

    def ask(single: bool, **request: Any) -> LightCNN:
        if single:
            request["units"] = ["sibling"]
        if criterion == "mfm_win_rate":
            request |= {"calibration": [images], "compensate": "none"}
        return prune_dn.prune(net, **request)

    for done, (single, ratio) in enumerate(rounds):
        request = {
            "single": single, "pruning_ratio": ratio, "unit": unit, "criterion": criterion,
            "scope": scope, "seed": done,
        }  # fmt: skip
        other_grain = {"single": not single}
        found = feasible(ask, request, {"cannot bring": other_grain, "no filters": other_grain})
        if found is None:
            return done
        small, asked = found
        (check_siblings if asked["single"] else check_contract)(net, small)
        whole, left = (getattr(prune_dn.count(n), unit) for n in (net, small))
        assert left <= (1 - asked["pruning_ratio"]) * whole
        net = small
    return len(rounds)


def made(net: LightCNN, name: str) -> Tensor:
    """What the filters of a layer make of the images, (images, filters, pixels)."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _, x, y: seen.append(y))
    with torch.no_grad():
        net(IMAGES)
    handle.remove()
    return seen[0].reshape(*seen[0].shape[:2], -1)


def others(net: LightCNN, *free: str) -> list[str]:
    """Every layer but these, for `protect`."""
    return [name for name in net.config.named() if name not in free]


@pytest.mark.parametrize("name", ["group1.conv.filter", "block1.0.conv2.filter", "fc.filter"])
def test_who_wins_least_goes_first(name) -> None:
    """A margin is the mean of max(0, x_i - x_j), and of each pair the lesser one may go."""
    net = distinct(light_cnn_29(4, **SHALLOW))
    x, units = made(net, name), net.config.named()[name].units
    margins = (x - x.roll(units, 1)).clamp_min(0).mean((0, 2))
    lose = [unit + units * int(margins[unit] >= margins[unit + units]) for unit in range(units)]
    order = sorted(lose, key=lambda number: (float(margins[number]), number))
    each = net.get_submodule(name).weight[0].numel() + 1
    for count in (1, 3, units):
        small = siblings(
            net,
            (count - 0.5) * each / prune_dn.count(net).params,
            unit="params",
            criterion="mfm_win_rate",
            compensate="none",
            calibration=IMAGES.split(4),
            protect=others(net, name),
        )
        assert gone_filters(net, small)[name] == set(order[:count])
        check_siblings(net, small)


def test_a_unit_is_worth_what_its_pairs_differ_by() -> None:
    """Margins of two siblings add up to the mean of |x_i - x_j|, and those of a trunk's makers too."""
    net = distinct(light_cnn_29(4, **SHALLOW))
    worth = torch.zeros(6).double()
    with (
        torch.no_grad()
    ):  # unit 4 hardly competes in the first maker, 2 in the other, which is small
        for name, unit in (("conv1.filter", 4), ("block1.0.conv2.filter", 2)):
            layer = net.get_submodule(name)
            layer.weight[unit + 6] = layer.weight[unit]
            layer.bias[unit + 6] = layer.bias[unit] + 1e-6
        layer.weight.mul_(0.01)
        layer.bias.mul_(0.01)
    for name in ("conv1.filter", "block1.0.conv2.filter"):
        first, second = made(net, name).chunk(2, dim=1)
        worth += (first - second).abs().mean((0, 2))
    protect = ["group2", "block3", "block4", "group3", "group4"]
    small = prune_dn.prune(
        net,
        0.01,
        scope="local",
        criterion="mfm_win_rate",
        compensate="none",
        calibration=[IMAGES[:2], IMAGES[2:]],
        protect=protect,
    )
    kept = kept_units(net, small)
    assert int(worth.argmin()) == 4
    assert kept["conv1.filter"] == set(range(6)) - {4}
    assert len(kept["block1.0.conv1.filter"]) == 6


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_siblings_share_what_their_unit_is_worth(criterion, power) -> None:
    """In proportion to what the filters weigh; the unit's score is what its readers weigh."""
    net = distinct(light_cnn_9(4, **SMALL))
    name, units = "features.2.conv_a.filter", 6
    own = net.get_submodule(name).weight.flatten(1).norm(p=power, dim=1)
    read = net.get_submodule("features.2.conv.filter").weight.transpose(0, 1).flatten(1)
    pairs = own.view(2, units)
    score = (read.norm(p=power, dim=1) * pairs / pairs.sum(0)).flatten()
    lose = [unit + units * int(pairs[0, unit] >= pairs[1, unit]) for unit in range(units)]
    first, second = sorted(lose, key=lambda number: float(score[number].detach()))[:2]
    small = siblings(net, 1e-5, unit="params", criterion=criterion, protect=others(net, name))
    assert gone_filters(net, small)[name] == {first}
    two = 1.5 / prune_dn.count(net).channels
    small = siblings(net, two, criterion=criterion, protect=others(net, name))
    assert gone_filters(net, small)[name] == {first, second}


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_loser_can_go(builder, tmp_path) -> None:
    """What is left is plain, of half the filters; it can be cut on by whole units, and saved."""
    net = distinct(builder(4, **SMALL))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole = prune_dn.count(net)
    convs = (whole.channels, whole.channels // 2)
    plain = siblings(
        net,
        0.5,
        criterion="mfm_win_rate",
        compensate="none",
        calibration=[IMAGES],
        protect=[net.config.places()[-1].name],
    )
    check_siblings(net, plain)
    assert prune_dn.count(plain).channels == convs[1] == convs[0] / 2
    assert all(layer.filters == layer.units for layer in plain.config.layers[:-1])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    small = prune_dn.prune(plain, 0.3, criterion="l2")
    check_contract(plain, small)
    prune_dn.save(small.float(), tmp_path / "small.safetensors")
    again = prune_dn.load(tmp_path / "small.safetensors")
    assert again.config == small.config
    x = IMAGES.float()
    assert torch.equal(again.eval()(x), small(x))


def ragged(net: LightCNN, alone: dict[str, tuple[int, ...]]) -> LightCNN:
    """A new net in which these units have one filter."""
    layers = [
        MFMConfig(layer.units, alone.get(name, layer.alone))
        for name, layer in net.config.named().items()
    ]
    return distinct(LightCNN(dataclasses.replace(net.config, layers=tuple(layers))))


def test_what_stands_alone_stays_where_only_winning_counts() -> None:
    net = light_cnn_9(4, **SMALL)
    some = ragged(net, {"features.2.conv_a.filter": (0, 1, 2), "fc1.filter": tuple(range(12))})
    small = prune_dn.prune(
        some, 0.5, criterion="mfm_win_rate", compensate="none", calibration=[IMAGES]
    )
    check_contract(some, small)
    kept = kept_units(some, small)
    assert kept["features.2.conv_a.filter"] > {0, 1, 2} != set(range(6))
    assert len(kept["features.2.conv_a.filter"]) < 6
    assert kept["fc1.filter"] == set(range(12))
    none = ragged(net, {name: tuple(range(x.units)) for name, x in net.config.named().items()})
    with pytest.raises(PruningError, match="judges only what competes, and this net has no MFM"):
        prune_dn.prune(none, 0.1, criterion="mfm_win_rate", compensate="none", calibration=[IMAGES])
    with pytest.raises(PruningError, match=r"units=\['sibling'\]: this net has none of them"):
        siblings(none, 0.1)


def test_protected_layers_rounding_and_least_width() -> None:
    net = distinct(light_cnn_29(4, **SHALLOW))
    small = siblings(net, 0.2, criterion="random", protect=["block*", "fc"])
    for name, layer in small.config.named().items():
        assert name.startswith(("conv1", "group")) or not layer.alone
    small = siblings(net, 0.2, round_to=4, criterion="random")
    for layer, old in zip(small.config.layers, net.config.layers, strict=True):
        assert layer.filters % 4 == 0 or layer == old
    small = siblings(net, 0.2, min_channels=12)  # which counts units: all of them stay
    assert [x.units for x in small.config.layers] == [x.units for x in net.config.layers]
    assert any(x.alone for x in small.config.layers)


def test_refusals() -> None:
    net = distinct(light_cnn_29(4, **SHALLOW))
    for options, message in (
        ({}, r"cannot bring channels from \d+ down to .* \(50.0% fewer\); ask for less"),
        ({"criterion": "mfm_win_rate"}, "needs calibration images"),
        ({"criterion": "bn_scale"}, "no norm with a scale"),
        ({"protect": ["*"]}, "leaves no channels"),
    ):
        with pytest.raises(PruningError, match=message):
            prune_dn.prune(net, 0.9, **{"units": ["sibling"], **options})
