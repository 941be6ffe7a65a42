"""The contract: a pruned net equals the dense net with masks on each reader's activated input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import masked, randomise_
from properties import counted, feasible
from strategies import alone, rivalries

from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, DenseNetConfig, LayerConfig, TransitionConfig, densenet
from prune_dn.pruning import CRITERIA, Plan, apply_plan, make_plan
from prune_dn.pruning.config import KINDS
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units


@st.composite
def configs(draw: st.DrawFn) -> DenseNetConfig:
    """Small, uneven DenseNets: basic and bottleneck layers, MFM anywhere, both stems."""
    kinds = st.sampled_from([None, None, "2/1", "2/1", "3/2"])

    def read(width: int):
        return draw(rivalries(width)) if width > 1 and draw(st.booleans()) else (None, None)

    width = init = draw(st.integers(1, 5))
    blocks, transitions = [], []
    count = draw(st.integers(1, 3))
    for b in range(count):
        layers = []
        for i in range(draw(st.integers(1, 3))):
            mfm = draw(kinds)
            out = draw(st.integers(1, 4)) * (2 if mfm == "3/2" else 1)
            narrow = draw(st.none() | st.integers(1, 5))
            leads, rivals = read(width)
            single = draw(alone(out, mfm))
            name = f"denselayer{i + 1}"
            layers.append(LayerConfig(name, out, narrow, leads, mfm, rivals, single))
            width += out
        blocks.append(tuple(layers))
        if b < count - 1:
            mfm = draw(kinds)
            leads, rivals = read(width)
            width = draw(st.integers(1, 4)) * (2 if mfm == "3/2" else 1)
            single = draw(alone(width, mfm))
            transitions.append(TransitionConfig(width, leads, mfm, rivals, single))
    leads, rivals = read(width)
    return DenseNetConfig(
        num_init_features=init,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        num_classes=3,
        in_channels=draw(st.sampled_from([1, 3])),
        stem=draw(st.sampled_from(["cifar", "imagenet"])),
        classifier_indices=leads,
        classifier_rivals=rivals,
    )


requests = st.fixed_dictionaries(
    {
        "pruning_ratio": st.floats(0.02, 0.9),
        "unit": st.sampled_from(["channels", "params", "macs"]),
        "criterion": st.sampled_from(sorted(CRITERIA)),
        "scope": st.sampled_from(["global", "local"]),
        "units": st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True),
        "min_channels": st.integers(1, 2),
        "round_to": st.sampled_from([1, 1, 1, 2, 3]),
        "seed": st.integers(0, 3),
    }
)


def images(net: DenseNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    side = 32 if net.config.stem == "imagenet" else 8
    return torch.randn(3, net.config.in_channels, side, side, generator=generator).double()


def plan_for(net: DenseNet, request: dict[str, Any]) -> Plan | None:
    """A plan near the request; None where nothing of the net can go."""
    x = images(net)

    def ask(**request: Any) -> Plan:
        batches = [(x, torch.arange(3))] if CRITERIA[request["criterion"]].need else None
        return make_plan(net, input_size=x.shape[-1], calibration=batches, **request)

    found = feasible(ask, request)
    return None if found is None else found[0]


@counted(configs(), requests, requests, st.integers(0, 99), rounds=2)
def test_masked_equals_pruned_over_two_rounds(config, first, second, seed) -> int:
    net = DenseNet(config).double().eval()
    randomise_(net, seed)
    x = images(net)
    for done, request in enumerate((first, second)):
        plan = plan_for(net, request)
        if plan is None:
            return done
        small = apply_plan(net, plan)
        assert small.config != net.config
        expected = masked(net, plan)(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-9, atol=1e-9)
        net = small
    return 2


@counted(configs(), requests, st.integers(0, 99))
def test_masked_equals_pruned_in_training_mode(config, request, seed) -> int:
    net = DenseNet(config).double().train()
    randomise_(net, seed)
    plan = plan_for(net, request)
    if plan is None:
        return 0
    small, reference = apply_plan(net, plan), masked(net, plan)
    x = images(net)
    torch.testing.assert_close(small(x), reference(x), rtol=1e-7, atol=1e-7)
    small(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(
        small.classifier.bias.grad, reference.classifier.bias.grad, rtol=1e-6, atol=1e-6
    )
    return 1


@counted(configs(), requests)
def test_the_plan_describes_what_surgery_makes(config, request) -> int:
    net = DenseNet(config).eval()
    randomise_(net, 1)
    before = copy.deepcopy(net.state_dict())
    plan = plan_for(net, request)
    if plan is None:
        return 0
    small = apply_plan(net, plan)
    assert small.config == plan.config_after
    assert DenseNetConfig.from_json(small.config.to_json()) == small.config
    assert Plan.from_json(plan.to_json()) == plan
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == plan.achieved["after"]["params"]
    fresh = DenseNet(small.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    return 1


def cut_of(units: Units, only: str | None, share: float, seed: int) -> np.ndarray | None:
    """What stays of any cut whatever that leaves a net; None where 30 draws give none."""
    generator = np.random.default_rng(seed)
    needed = [
        group.units
        for group in units.groups
        if group.kind in ("edge", "stream") and units.block_of[group.start] < 0
    ]
    for share_ in np.linspace(share, 0.95, 30):
        drawn = generator.random(units.size) < share_
        for group in units.groups:
            if only not in (None, group.kind):
                drawn[group.units] = True
        keep = units.close(drawn)
        if not keep.all() and all(keep[some].any() for some in needed):
            return keep
    return None


@counted(
    configs(), st.integers(0, 99), st.lists(st.floats(0.3, 0.9), min_size=2, max_size=2), st.data(),
    rounds=2,
)  # fmt: skip
def test_masked_equals_pruned_whatever_goes(config, seed, shares, data) -> int:
    """Any cut whatever, also what no plan would cut: both siblings, sides, whole layers."""
    net = randomise_(DenseNet(config).double().eval(), seed)
    x = images(net)
    for done, share in enumerate(shares):
        units = Units(net.config.graph())
        kinds = sorted({group.kind for group in units.groups if group.size > 1})
        keep = cut_of(units, data.draw(st.sampled_from([*kinds, None])), share, seed)
        if keep is None:
            return done
        plan = plan_of(subject(net), units, keep)
        small = apply_plan(net, plan)
        torch.testing.assert_close(small(x), masked(net, plan)(x), rtol=1e-9, atol=1e-9)
        assert Plan.from_json(plan.to_json()) == plan
        net = small
    return len(shares)


@given(configs(), st.data())
def test_closing_is_idempotent_and_only_cuts(config, data) -> None:
    units = Units(config.graph())
    drawn = data.draw(st.lists(st.booleans(), min_size=units.size, max_size=units.size))
    keep = np.array(drawn, dtype=bool)
    closed = units.close(keep)
    assert (closed <= keep).all()
    assert (units.close(closed) == closed).all()


def test_a_plan_for_another_net_is_refused() -> None:
    one = densenet([2], 4, stem="cifar", num_classes=3)
    other = densenet([3], 4, stem="cifar", num_classes=3)
    with pytest.raises(PruningError, match="made for a DenseNet of another shape"):
        apply_plan(other, make_plan(one, 0.3))
