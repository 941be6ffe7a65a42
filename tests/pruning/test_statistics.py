"""A new statistic is one dataclass and one function: what it gives a criterion, against the net run by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import Tensor, nn

from prune_dn import make_plan, register_criterion
from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.graph import trace
from prune_dn.pruning import CRITERIA
from prune_dn.pruning.importance import importance
from prune_dn.pruning.statistics import Seen
from prune_dn.pruning.units import Units


@dataclass
class Peaks:
    """The largest value in an image, and the largest slope, on average."""

    peak: Tensor
    steep: Tensor
    slopes = "inputs"

    @staticmethod
    def add_(sums, seen) -> None:
        """Both of each unit."""
        sums["peak"] += seen.maps.amax(2).sum(0)
        slope = Seen(seen.layer, seen.slope, owner=seen.owner)
        sums["steep"] += slope.maps.abs().amax(2).sum(0)


@dataclass
class OfChannels:
    """Of each channel, whatever unit it is of."""

    first: Tensor
    slopes = None

    @staticmethod
    def add_(sums, seen) -> None:
        """The first number of each."""
        sums["first"] += seen.inputs.flatten(2)[..., 0].sum(0) if seen.x.ndim > 2 else seen.x.sum(0)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_criterion("steep_peak", need=Peaks)(lambda r: r.statistics.peak + r.statistics.steep)
    register_criterion("of_channels", need=OfChannels)(lambda r: r.statistics.first)
    yield
    del CRITERIA["steep_peak"], CRITERIA["of_channels"]


def net() -> nn.Module:
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)]
    return randomise_(nn.Sequential(*convs, *head), 0).eval()


def test_a_new_statistic_of_maps_and_behind_a_flattened_map() -> None:
    model, generator = net(), torch.Generator().manual_seed(1)
    x, labels = torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 2, 1, 1, 0, 2])
    units = Units(trace(model, x[:1]))
    batches = read_batches([(x[:4], labels[:4]), (x[4:], labels[4:])], loss="softmax")
    found = importance(model, units, "steep_peak", calibration=batches)
    for group, start, end, width in zip(units.groups, (3, 7), (3, 7), (8, 6), strict=True):
        read = model[:start](x).detach().requires_grad_()
        error = nn.functional.cross_entropy(model[end:](read), labels, reduction="sum")
        (slope,) = torch.autograd.grad(error, read)
        maps = (read.detach().reshape(6, width, -1), slope.abs().reshape(6, width, -1))
        right = sum(m.amax(2).mean(0) for m in maps)
        np.testing.assert_allclose(found[group.units], right, rtol=1e-4)
    plan = make_plan(model, 0.4, criterion="steep_peak", calibration=[(x, labels)], input_size=8)
    assert plan.requested["criterion"] == "steep_peak"
    with pytest.raises(PruningError, match=r"'steep_peak' needs .*\(images, labels\) batches"):
        make_plan(model, 0.4, criterion="steep_peak", input_size=8)


def test_a_statistic_that_is_not_of_units_is_refused() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(
        PruningError, match=r"OfChannels.first has 24 entries for 7, which reads 6 units in 24"
    ):
        make_plan(net(), 0.4, criterion="of_channels", calibration=[x])


def test_what_is_no_statistic_is_refused() -> None:
    with pytest.raises(PruningError, match=r"need .*Seen.* is no statistic: give a dataclass"):
        register_criterion("x", need=Seen)
    wrong = type("Wrong", (Peaks,), {"slopes": "weights"})
    with pytest.raises(PruningError, match="slopes of Wrong is 'weights'; it is None, 'inputs'"):
        register_criterion("x", need=wrong)
    assert "x" not in CRITERIA
