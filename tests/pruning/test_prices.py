"""Prices against brute force, and costs against the counter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import counted

from prune_dn.measure.profiling import count
from prune_dn.models import densenet
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.parts import Group, Mask
from prune_dn.pruning.prices import Market
from prune_dn.pruning.rates import COUNTED, Costing, Rates
from prune_dn.pruning.units import Units

MFM = {"denseblock1.denselayer2": "2/1", "transition1": "3/2"}
BOTTLENECKS = densenet([2, 3, 1], 6, bn_size=2, stem="imagenet", num_classes=5).config
BASIC = densenet([2, 2], 6, bn_size=None, stem="cifar", num_classes=5, mfm=MFM).config
_SKIPPED = {"denseblock2.denselayer1": "2/1", "transition1": "2/1", "classifier": "2/1"}
COMPETING = densenet(
    [2, 2], 6, bn_size=2, stem="cifar", num_classes=5, mfm={"*": "2/1"}, mfm_skipped=_SKIPPED
).config
NETS = st.sampled_from([BOTTLENECKS, BASIC, COMPETING])
TIMES = Rates(0, 0, 2e-3, 3e-3, 0.5, 0.25, 0.125, 100.0, 1000.0)


def random_cut(units: Units, seed: int) -> Mask:
    keep = np.random.default_rng(seed).random(units.size) < 0.7
    for group in units.groups:
        keep[group.start] = True
    return units.close(keep)


@given(NETS, st.integers(0, 10_000))
def test_the_sum_over_parts_is_what_the_counter_counts(config, seed) -> None:
    units = Units(config.graph(40))
    keep = random_cut(units, seed)
    counted = count(config.after(indices_of(units, keep)), 40)
    for unit, rates in COUNTED.items():
        assert Costing(units).total(keep, rates) == getattr(counted, unit)


@counted(NETS, st.integers(0, 10_000), st.data())
def test_a_unit_saves_what_it_costs(config, seed, data) -> int:
    """A single cut, nothing falling out with it: the difference of two totals."""
    units = Units(config.graph(40))
    keep = random_cut(units, seed)
    market = Market(units, np.ones(units.size), np.ones(units.size, dtype=bool))
    compared = 0
    for group in units.groups:
        alive = group.start + np.flatnonzero(keep[group.units])
        if len(alive):
            unit = data.draw(st.sampled_from(alive.tolist()))
            compared += saves_what_it_costs(units, market, keep, group, unit)
    return int(4 * compared >= len(units.groups))


def saves_what_it_costs(units: Units, market: Market, keep: Mask, group: Group, unit: int) -> bool:
    """Whether it could be compared."""
    without = keep.copy()
    without[unit] = False
    closed = units.close(without)
    gone = np.zeros(units.size, dtype=bool)
    if group.kind == "stream":
        gone[units.reads[units.source == unit]] = True
    for pairs in units.pairs:
        if pairs.maker is not None and pairs.whole == group:  # its siblings go with it
            gone[pairs.group.start + np.flatnonzero(pairs.owner == unit - group.start)] = True
    if (closed != (without & ~gone)).any():
        return False  # a layer or a channel fell out too
    if group.kind == "stream" and group.siblings == 3:
        return False  # MFM 3/2: other channels of the unit's readers depend on it
    for rates in (*COUNTED.values(), dataclasses.replace(TIMES, gather=0, gathered=0)):
        costs = Costing(units).each(keep, rates)
        difference = Costing(units).total(keep, rates) - Costing(units).total(closed, rates)
        found = market.saved(keep, costs)[unit]
        assert found == pytest.approx(difference), (group, unit)
    return True


def test_who_competes_is_gathered_twice() -> None:
    units = Units(COMPETING.graph(40))
    everything = np.ones(units.size, dtype=bool)
    block, (last, plain) = 12 + 3 + 3, COMPETING.blocks[1]
    pixels = [40 * 40, 20 * 20]
    assert last.rival_indices and not plain.rival_indices and COMPETING.classifier_rivals
    channels = len(COMPETING.transitions[0].input_indices)
    assert channels == block / 2
    found = pixels[0] * 2 * channels
    found += pixels[1] * 2 * (len(last.input_indices) + len(COMPETING.classifier_indices))
    assert Costing(units).total(everything, Rates(gathered=1)) == found
    assert Costing(units).total(everything, Rates(gather=1)) == 3
    for selection in units.selections:
        if selection.sides is not None:  # and once, or not at all, when it is settled
            sides = selection.sides.group
            everything[sides.start + selection.edges.size : sides.units.stop] = False
    settled = units.close(everything)
    config = COMPETING.after(indices_of(units, settled))
    assert config.transitions[0].rival_indices is None
    whole = Units(config.graph(40))
    once = Costing(whole).total(np.ones(whole.size, dtype=bool), Rates(gathered=1))
    assert Costing(units).total(settled, Rates(gathered=1)) == once < found


def test_a_layer_goes_where_its_channels_no_longer_pay_for_it() -> None:
    """By brute force: at each price, is the net better off without the layer?"""
    units = Units(BOTTLENECKS.graph(40))
    generator = np.random.default_rng(1)
    harm, may_go = generator.random(units.size), np.ones(units.size, dtype=bool)
    market = Market(units, harm, may_go)
    keep = np.ones(units.size, dtype=bool)
    costs = Costing(units).each(keep, COUNTED["params"])
    block, price = units.blocks[0], market.block_prices(keep, costs)[0]
    edges_of = next(g for g in block.groups if g.kind == "edge")

    def gain(price: float) -> float:
        """What keeping the layer is worth at this price, everything else being chosen well."""
        worth = 0.0
        for unit in range(block.output.start, block.output.units.stop):
            edges = units.reads[units.source == unit]
            read = sum(max(0.0, harm[e] - price * costs.unit[e]) for e in edges)
            worth += max(0.0, read - price * costs.unit[unit])
        for edge in range(edges_of.start, edges_of.units.stop):
            worth -= min(harm[edge], price * costs.unit[edge])
        return worth - price * costs.upkeep[0]

    assert gain(price) == pytest.approx(0, abs=1e-9)
    assert gain(0.99 * price) > 0 > gain(1.01 * price)


def test_widths_in_blocks_of_channels() -> None:
    rates = Rates(weight=1, mac_kxk=1, step=16)

    def conv(inputs: int, outputs: int, what: str = "conv") -> float:
        return float(getattr(rates, what)(*map(np.array, (inputs, outputs, 9, 100))))

    assert conv(40, 12) == 9 * (40 * 12 + 48 * 16 * 100)
    assert conv(3, 17) == 9 * (3 * 17 + 3 * 32 * 100)  # pixels are not filled up
    assert conv(40, 12, "filter") == 9 * 40  # no time: one block stays one block
    assert conv(32, 32, "filter") == 9 * (32 + 32 * 100)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("config", [BOTTLENECKS, BASIC])
def test_a_layer_saves_what_it_costs(config, step) -> None:
    """The last one, which only the classifier reads: upkeep, what it reads, and its filters."""
    units = Units(config.graph(40))
    everything = np.ones(units.size, dtype=bool)
    rates = dataclasses.replace(TIMES, mac_1x1=0, gather=0, gathered=0, step=step)
    costs = Costing(units).each(everything, rates)
    market = Market(units, np.ones(units.size), everything)
    block = units.blocks[-1]
    edges = next(g for g in block.groups if g.kind == "edge")
    without = everything.copy()
    without[block.output.units] = False
    difference = Costing(units).total(everything, rates) - Costing(units).total(
        units.close(without), rates
    )
    filters = market.saved(everything, costs)[block.output.units].sum()
    found = costs.upkeep[-1] + costs.reading[edges.units].sum() + filters
    assert found == pytest.approx(difference)


def test_a_gather_raises_the_price_of_the_first_edges() -> None:
    units = Units(BOTTLENECKS.graph(40))
    keep = np.ones(units.size, dtype=bool)
    market = Market(units, np.random.default_rng(2).random(units.size), keep)
    costs = Costing(units).each(keep, TIMES)
    alone = market.prices(keep, dataclasses.replace(costs, gather=0 * costs.gather))
    price = market.prices(keep, costs)
    for number, edges in enumerate(selection.edges for selection in units.selections):
        lowest = price[edges.units].min()
        harm, cost = market.harm[edges.units], costs.unit[edges.units]
        if np.isinf(lowest):
            assert cost.sum() <= costs.gather[number]
        else:  # what has gone at that price saves exactly the gather
            gone = np.maximum(lowest * cost - harm, 0).sum()
            assert gone == pytest.approx(lowest * costs.gather[number])
        assert (price[edges.units] == np.maximum(alone[edges.units], lowest)).all()
