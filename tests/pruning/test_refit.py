"""A refit finds the weights that least squares finds, in layers of every kind, front to back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_dn.pruning.patches import kernel_matrix, patches_of
from prune_dn.pruning.refit import refit_


def halved(
    dense: nn.Sequential, maker: str, *followers: str, reader: str
) -> tuple[nn.Sequential, dict]:
    """`dense` without the second half of the channels of `maker`, by hand."""
    small = copy.deepcopy(dense)
    count = len(dense.get_submodule(maker).get_parameter("bias"))
    left = torch.arange(count // 2)
    for name in (maker, *followers):
        layer = small.get_submodule(name)
        for held in (layer._parameters, layer._buffers):
            for key, value in held.items():
                if value is not None and value.ndim and len(value) == count:
                    new = value.detach()[left].clone()
                    held[key] = nn.Parameter(new) if held is layer._parameters else new
    layer = small.get_submodule(reader)
    if isinstance(layer, nn.ConvTranspose2d):
        weight, layer.in_channels = layer.weight[left], count // 2
    else:
        width = layer.weight.shape[1] // count
        weight = layer.weight.unflatten(1, (count, width))[:, left].flatten(1, 2)
    layer.weight = nn.Parameter(weight.detach().clone())
    return small.eval(), dict.fromkeys((maker, *followers), left)


READERS = {
    "3x3": nn.Conv2d(8, 5, 3, padding=1),
    "strided": nn.Conv2d(8, 5, 3, stride=2),
    "transposed": nn.ConvTranspose2d(8, 5, 2, 2),
}


@pytest.mark.parametrize("kind", READERS)
def test_channels_that_others_explain_can_go_for_nothing(kind) -> None:
    """The second half of the channels are mixtures of the first half."""
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), copy.deepcopy(READERS[kind])
    ).eval()
    mix = torch.randn(4, 4)
    with torch.no_grad():
        dense[0].weight[4:] = (mix @ dense[0].weight[:4].flatten(1)).reshape(4, 3, 1, 1)
    small, kept = halved(dense, "0", "1", reader="2")
    x = tuple(torch.randn(8, 3, 8, 8) for _ in range(4))
    worse = (small(x[0]) - dense(x[0])).square().mean()
    refit_(small, dense, kept, set(), x)
    better = (small(x[0]) - dense(x[0])).square().mean()
    assert better < 1e-4 * worse


def test_the_weights_are_those_of_least_squares() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    small, kept = halved(dense, "0", reader="2")
    x = torch.randn(16, 3, 10, 10)
    refit_(small, dense, kept, set(), (x,))
    with torch.no_grad():
        rows = patches_of(small[2], small[:2](x), None)
        ones = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        target = dense(x).movedim(1, -1).flatten(0, 2)
        best = torch.linalg.lstsq(ones, target).solution
        loss = (ones @ best - target).square().sum()
        found = (small(x).movedim(1, -1).flatten(0, 2) - target).square().sum()
    # The ridge of at least 1e-4 keeps it from being the very best.
    assert loss <= found * 1.0001 and found <= 1.02 * loss
    assert kernel_matrix(small[2]).shape == (1, 27, 4)


def test_means_alone_move_into_norms_and_biases() -> None:
    dense = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    ).eval()  # fmt: skip
    small, kept = halved(dense, "0", reader="2")
    before = {k: v.clone() for k, v in small.state_dict().items()}
    x = tuple(torch.randn(16, 3, 6, 6) for _ in range(3))
    refit_(small, dense, kept, set(), x, weights=False)
    with torch.no_grad():
        every = torch.cat(x)
        torch.testing.assert_close(
            small[:4](every).mean((0, 2, 3)), dense[:4](every).mean((0, 2, 3))
        )
        torch.testing.assert_close(small(every).mean(0), dense(every).mean(0))
    changed = {k for k, v in small.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"3.running_mean", "6.bias"}


def test_a_layer_that_runs_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.both(self.both(self.a(x).relu()).relu())

    dense = Twice().eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.a.weight.mul_(1.1)
        small.both.weight.mul_(1.1)
    before = small.both.weight.clone()
    refit_(small, dense, {}, set(), (torch.randn(4, 3, 5, 5),))
    assert torch.equal(small.both.weight, before)
    torch.testing.assert_close(small.a.weight, dense.a.weight, rtol=1e-3, atol=1e-3)
