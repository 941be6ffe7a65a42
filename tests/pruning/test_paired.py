"""Grouped convolutions give up equally many channels of each group, the least important first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import counted
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.pruning.budget import Budget, choose
from prune_dn.pruning.planning import paired
from prune_dn.pruning.rates import COUNTED, Costing
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(8, 10, 1), nn.ReLU(), nn.Flatten(), nn.Linear(10 * 36, 4),
    )  # fmt: skip


UNITS = Units(subject(net(), 6).graph)


def test_the_groups_of_the_grouped_convolution_are_blocks() -> None:
    found = [(group.name, group.size, group.blocks) for group in UNITS.groups]
    assert found == [("0", 12, 4), ("2", 8, 4), ("4", 10, 1)]


@given(st.integers(0, 999))
def test_what_has_the_same_place_in_all_blocks_goes_together(seed) -> None:
    rng = np.random.default_rng(seed)
    scores, may_go = rng.random(UNITS.size), np.ones(UNITS.size, dtype=bool)
    units, place, summed, _ = paired(UNITS, scores, may_go)
    assert [group.size for group in units.groups] == [3, 2, 10]
    assert summed.sum() == pytest.approx(scores.sum())
    for old, new in zip(UNITS.groups, units.groups, strict=True):
        rows = place[old.units].reshape(old.blocks, -1)
        assert (np.sort(rows, 1) == np.arange(new.start, new.units.stop)).all()
        if old.blocks > 1:  # in each block by rising score
            ranked = np.take_along_axis(
                scores[old.units].reshape(rows.shape), np.argsort(rows, 1), 1
            )
            assert (np.diff(ranked, axis=1) >= 0).all()
    for rates in COUNTED.values():  # and costs what its channels cost
        every = np.ones(UNITS.size, dtype=bool)
        mine, theirs = (Costing(u).each(every[: u.size], rates).unit for u in (UNITS, units))
        np.testing.assert_allclose(np.bincount(place, mine, units.size), theirs)


@counted(
    st.integers(0, 999), st.sampled_from(sorted(COUNTED)), st.floats(0.5, 0.95),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]),
)  # fmt: skip
def test_blocks_stay_equal_and_widths_are_multiples(seed, unit, share, step, least) -> int:
    rng = np.random.default_rng(seed)
    units, place, scores, _ = paired(UNITS, rng.random(UNITS.size), np.ones(UNITS.size, dtype=bool))
    whole = Costing(units).total(np.ones(units.size, dtype=bool), COUNTED[unit])
    may_go = np.ones(units.size, dtype=bool)
    while True:  # the smallest cut that is possible from there
        try:
            budget = Budget(share * whole, unit, COUNTED[unit], None, least, step)
            keep = choose(units, scores, may_go, budget)
            break
        except PruningError:
            share += 0.02
            if share >= 1:
                return 0
    assert Costing(units).total(keep, COUNTED[unit]) <= share * whole
    for group in UNITS.groups:
        stays = keep[place][group.units].reshape(group.blocks, -1).sum(1)
        assert len(set(stays.tolist())) == 1
        left = int(stays.sum())
        assert left >= min(least, group.size) and (left % step == 0 or left == group.size)
    return 1


def test_one_block_that_may_not_go_holds_the_others() -> None:
    may_go = np.ones(UNITS.size, dtype=bool)
    may_go[[0, 1]] = False  # two of the three channels of the first group of conv 2's inputs
    units, _, _, may = paired(UNITS, np.random.default_rng(1).random(UNITS.size), may_go)
    assert may[units.groups[0].units].sum() == 1
