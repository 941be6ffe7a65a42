"""The graph that a config draws is the one that tracing finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prune_dn.graph import Graph, trace
from prune_dn.models import DenseNet, densenet, densenet40, light_cnn_9, light_cnn_29_v2
from prune_dn.models.config import DenseNetConfig
from prune_dn.pruning import make_plan
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.rates import COUNTED, Costing, Rates
from prune_dn.pruning.units import Units

CONFIGS = {
    "bottlenecks": densenet([3, 2], 6, bn_size=2, stem="imagenet", num_classes=5).config,
    "basic": densenet([2, 3, 1], 5, bn_size=None, stem="cifar", num_classes=3).config,
    "densenet40": densenet40().config,
}


def drawn_and_traced(config: DenseNetConfig) -> tuple[Graph, Graph]:
    return config.graph(32), trace(DenseNet(config), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_densenet_has_the_same_units_and_costs(name) -> None:
    drawn, traced = map(Units, drawn_and_traced(CONFIGS[name]))
    assert drawn.groups == traced.groups
    assert np.array_equal(drawn.source, traced.source)
    assert np.array_equal(drawn.reads, traced.reads)
    rng = np.random.default_rng(0)
    for share in (0.9, 0.5, 0.2):
        keep = drawn.close(rng.random(drawn.size) < share)
        for rates in (*COUNTED.values(), Rates(concatenated=1, gathered=2, gather=3, normalised=1)):
            assert Costing(drawn).total(keep, rates) == Costing(traced).total(keep, rates)


@pytest.mark.parametrize("units", [["stream", "bottleneck"], ["edge"], ["stream", "edge"]])
def test_a_wrapped_densenet_is_cut_as_one_of_ours(units) -> None:
    torch.manual_seed(0)
    net = densenet([3, 2], 6, bn_size=2, stem="cifar", num_classes=5).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.2, 1.5)
    plans = [
        make_plan(each, 0.4, unit="macs", units=units, input_size=16)
        for each in (net, nn.Sequential(net))
    ]
    first, second = (plan.keep_indices for plan in plans)
    assert first and {f"0.{name}": kept for name, kept in first.items()} == second
    assert plans[0].achieved == plans[1].achieved


@pytest.mark.parametrize("build", [light_cnn_9, light_cnn_29_v2])
def test_a_light_cnn_counts_what_its_layers_have(build) -> None:
    net = build(4, image_size=48, widths=[4, 6, 8, 6, 6], embedding=8)
    units = Units(net.config.graph())
    everything = np.ones(units.size, dtype=bool)
    weights = sum(p.numel() for p in net.parameters())
    assert Costing(units).total(everything, COUNTED["params"]) == weights
    traced = trace(net, torch.zeros(1, 1, 48, 48))
    assert traced.uses() == net.config.graph().uses()


@pytest.mark.parametrize("build", [light_cnn_9, light_cnn_29_v2])
def test_what_a_cut_leaves_of_a_light_cnn(build) -> None:
    config = build(4, image_size=32, widths=[4, 6, 8, 6, 6], embedding=8).config
    units, rng = Units(config.graph()), np.random.default_rng(3)
    for share in (0.9, 0.7):
        keep = rng.random(units.size) < share
        for group in units.groups:
            keep[group.start] = True
        keep = units.close(keep)
        after = config.after(indices_of(units, keep))
        for rates in COUNTED.values():
            left = Units(after.graph())
            whole = Costing(left).total(np.ones(left.size, dtype=bool), rates)
            assert whole == Costing(units).total(keep, rates)
