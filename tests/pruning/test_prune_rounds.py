"""Rounds without training: what is left of the first net, and what each round reaches."""

from __future__ import annotations

import pytest
import torch
from oracle import randomise_
from torch import nn

from prune_dn import PruneConfig, count, make_plan, prune
from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning.compensate import kept_of
from prune_dn.pruning.plan import planned
from prune_dn.pruning.surgery import carried_out


def made(**options) -> nn.Module:
    return randomise_(
        densenet([2, 2], 6, bn_size=2, stem="cifar", num_classes=5, **options), 3
    ).eval()


@pytest.mark.parametrize("units", [["stream", "bottleneck", "edge"], ["sibling"]])
def test_what_two_cuts_leave_of_the_first_net(units) -> None:
    net = made(mfm={"*": "2/1"} if "sibling" in units else None)
    first, kept = net, None
    for _ in range(2):
        plan = make_plan(first, 0.08, unit="macs", units=units, criterion="l2", input_size=16)
        given, table, keep = planned(first, plan)
        first = carried_out(given, table, keep)
        now = kept_of(table, keep)
        kept = now if kept is None else kept.then(now)
    stem = kept.outputs.get("features.conv0", torch.arange(12))
    assert torch.equal(first.features.conv0.weight, net.features.conv0.weight[stem])
    checked = 0
    for name, rivals in kept.rivals.items():
        size = net.get_submodule(name).weight.shape[0]
        left = kept.outputs.get(name, torch.arange(size))
        assert len(left) == len(rivals) == first.get_submodule(name).weight.shape[0]
        partner = (left + size // 2) % size
        gone = ~torch.isin(partner, left)
        assert torch.equal(rivals, torch.where(gone, partner, left))
        checked += int(gone.sum())
    assert bool(checked) == ("sibling" in units)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


def residual() -> nn.Module:
    return randomise_(Residual(), 0).eval()


@pytest.mark.parametrize("build", [made, residual])
def test_rounds_reach_the_ratio_of_the_first_net(build) -> None:
    net, g = build(), torch.Generator().manual_seed(0)
    images = [torch.randn(16, 3, 16, 16, generator=g) for _ in range(2)]
    example = {"input_size": 16}
    small = prune(net, 0.6, unit="macs", rounds=3, calibration=images, loss="mse", **example)
    left = count(small, 16).macs / count(net, 16).macs
    assert 0.34 < left <= 0.4
    again = prune(net, 0.6, unit="macs", rounds=3, calibration=images, loss="mse", **example)
    pairs = zip(small.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_rounds_are_not_for() -> None:
    net = made()
    with pytest.raises(PruningError, match="a plan is of one round"):
        make_plan(net, PruneConfig(0.5, rounds=2))
    with pytest.raises(PruningError, match="rounds above 1 and ratios do not go together"):
        prune(net, 0.5, rounds=2, ratios=[])
    with pytest.raises(PruningError, match="rounds is 0; it must be an integer from 1 to"):
        PruneConfig(0.5, rounds=0)
    with pytest.raises(PruningError, match=r"settle cuts every loser .* remove rounds"):
        PruneConfig(None, settle=True, rounds=2)
