"""Widths meet a budget by the shortest prefix, by share as a brute force does, or by price."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_dn.graph import trace
from prune_dn.graph.groups import free_groups
from prune_dn.profiling import weight_uses
from prune_dn.pruning.table import Table
from prune_dn.pruning.widths import Widths


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(8, 10, 1), nn.ReLU(), nn.Flatten(), nn.Linear(10 * 36, 4),
    )  # fmt: skip


def table() -> Table:
    model = net()
    return Table(model, free_groups(trace(model, torch.zeros(1, 3, 6, 6))), weight_uses(model, 6))


TABLE = table()


def widths(
    seed: int, min_channels: int = 1, round_to: int = 1
) -> tuple[Widths, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(g.size, generator=generator).double() for g in TABLE.groups]
    may_go = [torch.rand(g.size, generator=generator) < 0.9 for g in TABLE.groups]
    return Widths(TABLE, scores, may_go, min_channels, round_to), scores


@given(
    st.integers(0, 999), st.sampled_from(["channels", "params", "macs"]), st.floats(0.5, 0.95),
    st.sampled_from(["global", "local"]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_the_prefix_is_the_shortest_that_meets_the_target(seed, unit, share, scope, step) -> None:
    found, scores = widths(seed, round_to=step)
    whole = TABLE.total(unit, np.ones(TABLE.size, dtype=bool))
    target = max(share * whole, TABLE.total(unit, found.all_steps()))
    keep = found.meet_by_share(unit, target, scores, scope)
    assert TABLE.total(unit, keep) <= target
    owners = found.by_share(scores, scope)
    counts = np.array([np.bincount(owners[:n], minlength=3) for n in range(len(owners) + 1)])
    first = next(n for n, c in enumerate(counts) if TABLE.total(unit, found.keep(c)) <= target)
    assert np.array_equal(keep, found.keep(counts[first]))


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("share", [0.7, 0.85])
def test_prices_lose_less_than_random_steps(unit, share) -> None:
    ours, random = [], []
    for seed in range(12):
        found, scores = widths(seed)
        loss = torch.cat(scores).numpy()
        target = share * TABLE.total(unit, np.ones(TABLE.size, dtype=bool))
        keep = found.meet_by_price(unit, target)
        assert TABLE.total(unit, keep) <= target
        ours.append(loss[~keep].sum())
        rng = np.random.default_rng(seed)
        for _ in range(5):
            owners = rng.permutation(np.repeat(np.arange(3), [len(x) for x in found.losses]))
            steps = [np.bincount(owners[:n], minlength=3) for n in range(len(owners) + 1)]
            met = next(s for s in steps if TABLE.total(unit, found.keep(s)) <= target)
            random.append(loss[~found.keep(met)].sum())
    assert np.mean(ours) < 0.95 * np.mean(random)


@pytest.mark.parametrize(("least", "step"), [(1, 1), (2, 1), (1, 2), (3, 4)])
def test_floors_multiples_and_equal_blocks(least, step) -> None:
    found, _ = widths(1, least, step)
    keep = found.all_steps()
    for number, group in enumerate(TABLE.groups):
        stays = keep[TABLE.units(number)].reshape(group.blocks, -1).sum(1)
        assert len(set(stays.tolist())) == 1
        left = int(stays.sum())
        assert left >= least and (left % step == 0 or left == group.size)
