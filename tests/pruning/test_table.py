"""The table's totals are those of the nets that surgery makes; savings are their differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from torch import nn

from prune_dn.graph import trace
from prune_dn.graph.groups import free_groups
from prune_dn.profiling import count, weight_uses
from prune_dn.pruning.coupled import cut
from prune_dn.pruning.table import Table

UNITS = ("channels", "params", "macs")


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
    net, size = NETS[name](), 32
    groups = free_groups(trace(net, torch.zeros(1, 3, size, size)))
    table = Table(net, groups, weight_uses(net, size))
    everything = np.ones(table.size, dtype=bool)
    rng = np.random.default_rng(0)
    checked = 0
    for share in (1.0, 0.7, 0.4):
        keep = everything.copy()
        masks = {}
        for number, group in enumerate(groups):
            width = group.size // group.blocks
            stays = rng.permutation(width) < max(round(share * width), 1)
            keep[table.units(number)] = np.tile(stays, group.blocks)
            masks[group.root] = torch.from_numpy(keep[table.units(number)])
        found = count(cut(net, groups, masks), size)
        for unit in UNITS:
            assert round(table.total(unit, keep)) == getattr(found, unit)
            checked += 1
    assert checked == 9


@pytest.mark.parametrize("unit", UNITS)
def test_savings_are_what_goes_when_one_unit_goes(unit) -> None:
    net, size = unet(), 16
    groups = free_groups(trace(net, torch.zeros(1, 3, size, size)))
    table = Table(net, groups, weight_uses(net, size))
    keep = np.ones(table.size, dtype=bool)
    keep[[1, 9]] = False
    saved = table.savings(unit, keep)
    for one in np.flatnonzero(keep):
        less = keep.copy()
        less[one] = False
        assert table.total(unit, keep) - table.total(unit, less) == pytest.approx(saved[one])
