"""A layer whose output is an operand of a sum is refitted so that the sum is what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prune_dn.pruning.patches import patches_of
from prune_dn.pruning.refit import refit_
from prune_dn.pruning.sums import Summand, find_summands


class Residual(nn.Module):
    """A sum whose skip connection no refit can reach, written in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.branch = nn.Conv2d(4, 4, 3, padding=1, bias=form == "bare")
        self.norm = nn.Identity() if form == "bare" else nn.BatchNorm2d(4)
        if isinstance(self.norm, nn.BatchNorm2d):
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)
            nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.gain: Tensor
        self.register_buffer("gain", torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = x * self.gain
        out: Tensor = self.norm(self.branch(x))
        if self.form == "in place":
            out += skip
            return out.relu_()
        if self.form == "method":
            return skip.add(out).relu()
        return torch.relu(out + skip)


@pytest.mark.parametrize("form", ["operator", "in place", "method", "bare"])
def test_the_sum_is_fitted_as_least_squares_fits_it(form: str) -> None:
    torch.manual_seed(0)
    dense = Residual(form).eval()
    images = torch.randn(32, 4, 8, 8)
    small = copy.deepcopy(dense)
    small.gain.copy_(torch.tensor([0.5, 0.0, 1.2, 1.0]).view(1, 4, 1, 1))

    def total(net: Residual) -> Tensor:
        return (net.norm(net.branch(images)) + images * net.gain).movedim(1, -1).flatten(0, 2)

    with torch.no_grad():
        target = total(dense)
        before = (total(small) - target).square().sum()
        refit_(small, dense, {}, set(), (images[:16], images[16:]))
        after = (total(small) - target).square().sum()
        rows = patches_of(small.branch, images, None)
        ones = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        lacks = target - (images * small.gain).movedim(1, -1).flatten(0, 2)
        best = (ones @ torch.linalg.lstsq(ones, lacks).solution - lacks).square().sum()
    # A 3x3 conv holds the identity, so the sum can be had entirely; the ridge keeps a little.
    assert best < 1e-6 * before
    assert after < 1e-3 * before


def test_the_operand_is_the_layer_with_more_weights_and_nothing_else_reads_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.shared, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.narrow(x) + self.wide(x)  # sum 0
            read_twice = self.shared(first)
            second = first + read_twice  # sum 1
            third = self.last(second) * 2 + read_twice  # sum 2: a product is no operand of it
            third = third + 1.0  # no sum of two tensors
            out: Tensor = third + torch.relu(third)  # sum 3
            return out

    net = Net().eval()
    layers = ["wide", "narrow", "shared", "last"]
    found = find_summands(net, layers, torch.zeros(1, 3, 4, 4))
    assert found == {0: Summand("wide", None, 1)}
    assert find_summands(net, ["narrow"], torch.zeros(1, 3, 4, 4)) == {
        0: Summand("narrow", None, 0)
    }


def test_means_alone_leave_the_weights_before_a_sum() -> None:
    dense = Residual("operator").eval()
    small = copy.deepcopy(dense)
    small.gain.mul_(0.5)
    refit_(small, dense, {}, set(), (torch.randn(8, 4, 8, 8),), weights=False)
    assert torch.equal(small.branch.weight, dense.branch.weight)
