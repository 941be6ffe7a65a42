"""Totals are those of the nets that surgery makes; savings are their differences."""

from __future__ import annotations

import numpy as np
import pytest
import torchvision.models as zoo
from torch import nn

from prune_dn.measure.profiling import count
from prune_dn.pruning.cuts import cut_net
from prune_dn.pruning.rates import COUNTED, Costing
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units


def unet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.PReLU(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip


NETS = {
    "resnet18": lambda: zoo.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: zoo.mobilenet_v3_small(num_classes=5),
    "without norms": unet,
}


@pytest.mark.parametrize("name", NETS)
def test_totals_are_those_of_the_cut_net(name) -> None:
    given = subject(NETS[name](), 32)
    units = Units(given.graph)
    costing, everything = Costing(units), np.ones(units.size, dtype=bool)
    whole = count(given.model, 32)
    rng = np.random.default_rng(0)
    for share in (1.0, 0.7, 0.4):
        keep = everything.copy()
        for group in units.groups:
            width = group.size // group.blocks
            stays = rng.permutation(width) < max(round(share * width), 1)
            keep[group.units] = np.tile(stays, group.blocks)
        left = count(cut_net(given, units, units.close(keep)), 32)
        for unit, rates in COUNTED.items():
            saved = costing.total(everything, rates) - costing.total(keep, rates)
            assert getattr(whole, unit) - round(saved) == getattr(left, unit)


@pytest.mark.parametrize("unit", COUNTED)
def test_savings_are_what_goes_when_one_unit_goes(unit) -> None:
    units = Units(subject(unet(), 16).graph)
    costing, keep = Costing(units), np.ones(units.size, dtype=bool)
    keep[[1, 9]] = False
    saved = costing.each(keep, COUNTED[unit]).unit
    assert len(np.flatnonzero(keep)) > 10
    for one in np.flatnonzero(keep):
        less = keep.copy()
        less[one] = False
        difference = costing.total(keep, COUNTED[unit]) - costing.total(less, COUNTED[unit])
        assert difference == pytest.approx(saved[one])
