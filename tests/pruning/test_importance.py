"""Criteria against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import randomise_

from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning.importance import CRITERIA, importance, register_criterion
from prune_dn.pruning.units import Units

FORMULAS = {
    "bn_scale": lambda norm, conv, c: abs(norm.weight[c].item()),
    "l1": lambda norm, conv, c: conv.weight[:, c].abs().sum().item(),
    "l2": lambda norm, conv, c: conv.weight[:, c].flatten().norm().item(),
}


@pytest.mark.parametrize("criterion", sorted(FORMULAS))
def test_a_stream_channel_counts_for_every_reader(criterion) -> None:
    net = randomise_(densenet([2, 1], 4, bn_size=2, stem="cifar", num_classes=3), 5)
    units = Units(net.config)
    scores = importance(net, units, criterion)
    block, f = net.features.denseblock1, FORMULAS[criterion]
    by_name = {(g.kind, g.name): scores[g.units] for g in units.groups}

    for c in range(8):  # the stem: read by both layers and the transition
        expected = (
            f(block.denselayer1.norm1, block.denselayer1.conv1, c)
            + f(block.denselayer2.norm1, block.denselayer2.conv1, c)
            + f(net.features.transition1.norm, net.features.transition1.conv, c)
        )
        assert by_name["stream", "features.conv0"][c] == pytest.approx(expected, rel=1e-5)
    layer = block.denselayer2
    for c in range(8):
        narrow = by_name["bottleneck", "features.denseblock1.denselayer2.conv1"][c]
        assert narrow == pytest.approx(f(layer.norm2, layer.conv2, c), rel=1e-5)
    for c in range(4):  # layer 2 is read by the transition alone, at position 12 + c
        made = by_name["stream", "features.denseblock1.denselayer2.conv2"][c]
        edge = by_name["edge", "features.transition1.norm"][12 + c]
        assert made == pytest.approx(edge)
    last = by_name["edge", "features.norm5"]
    assert last[2] == pytest.approx(
        f(net.features.norm5, net.classifier, 2)
        if criterion != "l2"
        else net.classifier.weight[:, 2].norm().item(),
        rel=1e-5,
    )


def test_an_mfm_unit_counts_for_all_that_it_makes() -> None:
    net = densenet([1], 6, bn_size=None, stem="cifar", num_classes=3, mfm={"*": "3/2"})
    with torch.no_grad():
        net.features.norm5.weight.copy_(torch.arange(16.0))
    units = Units(net.config)
    scores = importance(net, units, "bn_scale")
    group = next(g for g in units.groups if g.name.endswith("denselayer1.conv1"))
    # 6 filters, 2 units; unit u makes channels 12 + u (maximum) and 14 + u (median)
    np.testing.assert_allclose(scores[group.units], [12 + 14, 13 + 15])


def test_registering() -> None:
    @register_criterion("constant")
    def constant(reading):
        return torch.ones(reading.weight.shape[1])

    try:
        with pytest.raises(PruningError, match="'constant' is registered already"):
            register_criterion("constant")(constant)
        net = densenet([1], 4, stem="cifar", num_classes=3)
        assert set(importance(net, Units(net.config), "constant")) == {1.0, 2.0}
        CRITERIA["constant"] = lambda reading: torch.ones(3)
        with pytest.raises(PruningError, match="gave shape"):
            importance(net, Units(net.config), "constant")
    finally:
        del CRITERIA["constant"]
