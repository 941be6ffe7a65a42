"""The recursion against least squares itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_dn.pruning import elimination
from prune_dn.pruning.elimination import elimination_losses


def refit_error(x: torch.Tensor, y: torch.Tensor, keep: list[int], block: int) -> float:
    if not keep:
        return float(y.square().sum())
    columns = torch.cat([torch.arange(c * block, (c + 1) * block) for c in keep])
    solution = torch.linalg.lstsq(x[:, columns], y).solution
    return float((y - x[:, columns] @ solution).square().sum())


@given(st.integers(1, 12), st.sampled_from([1, 4, 9]), st.integers(1, 5), st.integers(0, 99))
def test_losses_are_those_of_refitting_by_brute_force(channels, block, outputs, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * channels * block, channels * block, generator=g).double()
    weight = torch.randn(channels * block, outputs, generator=g).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "RIDGE", 0.0)
        losses = elimination_losses(x.T @ x, weight, block)
    left, spent, highest = list(range(channels)), 0.0, 0.0
    while left:  # brute force: refit without each of those left, take the cheapest
        trials = {d: refit_error(x, x @ weight, [e for e in left if e != d], block) for d in left}
        c = min(trials, key=lambda d: trials[d])
        highest = max(highest, trials[c] - spent)
        assert float(losses[c]) == pytest.approx(highest, rel=1e-5, abs=1e-7)
        spent = trials[c]
        left.remove(c)


def test_twins_are_cheap_once() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=g).double()
    x = torch.cat([x, x[:, :1]], 1)
    losses = elimination_losses(x.T @ x / 50, torch.ones(5, 2).double(), 1)
    cheap, dear = sorted([float(losses[0]), float(losses[4])])
    assert cheap < 0.1 < 1 < dear


def test_dead_and_singular_inputs_are_free() -> None:
    gram = torch.zeros(6, 6)
    gram[0, 0] = 1.0
    losses = elimination_losses(gram, torch.ones(6, 1), 1)
    assert torch.isfinite(losses).all()
    assert losses.argmax() == 0
    assert float(losses[1:].max()) < 1e-2
    assert float(elimination_losses(torch.zeros(4, 4), torch.ones(4, 1), 2).max()) < 1e-30
