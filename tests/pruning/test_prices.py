"""Prices against brute force, and costs against the counter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import counted

from prune_dn.models import densenet
from prune_dn.profiling import count
from prune_dn.pruning.parts import Group, Mask
from prune_dn.pruning.prices import Market
from prune_dn.pruning.rates import COUNTED, Rates, total_cost, unit_costs
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
    units = Units(config)
    keep = random_cut(units, seed)
    counted = count(units.after(keep), 40)
    for unit, rates in COUNTED.items():
        assert total_cost(units, keep, rates, 40) == getattr(counted, unit)


@counted(NETS, st.integers(0, 10_000), st.data())
def test_a_unit_saves_what_it_costs(config, seed, data) -> int:
    """A single cut, nothing falling out with it: the difference of two totals."""
    units = Units(config)
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
        for stream in units.streams:
            for readings, positions in (part.readings for part in stream.readers):
                gone[readings.units] |= stream.makers()[positions] == unit
    for part in units.parts():
        if part.siblings is not None and part.stream == group:  # its siblings go with it
            gone[part.siblings.group.start + np.flatnonzero(
                part.siblings.owner == unit - group.start
            )] = True  # fmt: skip
    if (closed != (without & ~gone)).any():
        return False  # a layer or a channel fell out too
    if group.kind == "stream" and group.siblings == 3:
        return False  # MFM 3/2: other channels of the unit's readers depend on it
    for rates in (*COUNTED.values(), dataclasses.replace(TIMES, gather=0, gathered=0)):
        costs = unit_costs(units, keep, rates, 40)
        difference = total_cost(units, keep, rates, 40) - total_cost(units, closed, rates, 40)
        found = market.saved(keep, costs)[unit]
        assert found == pytest.approx(difference), (group, unit)
    return True


def test_who_competes_is_gathered_twice() -> None:
    units, everything = Units(COMPETING), np.ones(Units(COMPETING).size, dtype=bool)
    block, (last, plain) = 12 + 3 + 3, COMPETING.blocks[1]
    pixels = [40 * 40, 20 * 20]
    assert last.rival_indices and not plain.rival_indices and COMPETING.classifier_rivals
    channels = len(COMPETING.transitions[0].input_indices)
    assert channels == block / 2
    found = pixels[0] * 2 * channels
    found += pixels[1] * 2 * (len(last.input_indices) + len(COMPETING.classifier_indices))
    assert total_cost(units, everything, Rates(gathered=1), 40) == found
    assert total_cost(units, everything, Rates(gather=1), 40) == 3
    for part in units.parts():
        if part.sides is not None:  # and once, or not at all, when it is settled
            everything[part.sides.group.start + part.edges.size : part.sides.group.units.stop] = (
                False
            )
    settled = units.close(everything)
    config = units.after(settled)
    assert config.transitions[0].rival_indices is None
    once = total_cost(Units(config), np.ones(Units(config).size, dtype=bool), Rates(gathered=1), 40)
    assert total_cost(units, settled, Rates(gathered=1), 40) == once < found


def test_a_layer_goes_where_its_channels_no_longer_pay_for_it() -> None:
    """By brute force: at each price, is the net better off without the layer?"""
    units = Units(BOTTLENECKS)
    generator = np.random.default_rng(1)
    harm, may_go = generator.random(units.size), np.ones(units.size, dtype=bool)
    market = Market(units, harm, may_go)
    keep = np.ones(units.size, dtype=bool)
    costs = unit_costs(units, keep, COUNTED["params"], 40)
    layers = market.layer_prices(keep, costs)
    number = next(i for i, part in enumerate(market.parts) if part.is_dense_layer)
    part = market.parts[number]
    assert part.stream is not None and part.edges is not None

    def gain(price: float) -> float:
        """What keeping the layer is worth at this price, everything else being chosen well."""
        worth = 0.0
        for unit in range(part.stream.start, part.stream.units.stop):
            edges = np.flatnonzero(market.is_edge & (market.filters[market.source] == unit))
            read = sum(max(0.0, harm[e] - price * costs.unit[e]) for e in edges)
            worth += max(0.0, read - price * costs.unit[unit])
        for edge in range(part.edges.start, part.edges.units.stop):
            worth -= min(harm[edge], price * costs.unit[edge])
        return worth - price * costs.upkeep[number]

    price = layers[number]
    assert gain(price) == pytest.approx(0, abs=1e-9)
    assert gain(0.99 * price) > 0 > gain(1.01 * price)
    assert np.isinf(layers[[not p.is_dense_layer for p in market.parts]]).all()


def test_widths_in_blocks_of_channels() -> None:
    rates = Rates(weight=1, mac_kxk=1, step=16)
    assert rates.conv(40, 12, 3, 100) == 9 * (40 * 12 + 48 * 16 * 100)
    assert rates.conv(3, 17, 3, 100) == 9 * (3 * 17 + 3 * 32 * 100)  # pixels are not filled up
    assert rates.filter(40, 12, 3, 100) == 9 * 40  # no time: one block stays one block
    assert rates.filter(32, 32, 3, 100) == 9 * (32 + 32 * 100)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("config", [BOTTLENECKS, BASIC])
def test_a_layer_saves_what_it_costs(config, step) -> None:
    """The last one, which only the classifier reads: upkeep, what it reads, and its filters."""
    units = Units(config)
    everything = np.ones(units.size, dtype=bool)
    rates = dataclasses.replace(TIMES, mac_1x1=0, gather=0, gathered=0, step=step)
    costs = unit_costs(units, everything, rates, 40)
    market = Market(units, np.ones(units.size), everything)
    number = max(i for i, part in enumerate(market.parts) if part.is_dense_layer)
    part = market.parts[number]
    assert part.edges is not None and part.stream is not None
    without = everything.copy()
    without[part.stream.units] = False
    difference = total_cost(units, everything, rates, 40) - total_cost(
        units, units.close(without), rates, 40
    )
    filters = market.saved(everything, costs)[part.stream.units].sum()
    found = costs.upkeep[number] + costs.reading[part.edges.units].sum() + filters
    assert found == pytest.approx(difference)


def test_a_gather_raises_the_price_of_the_first_edges() -> None:
    units = Units(BOTTLENECKS)
    keep = np.ones(units.size, dtype=bool)
    market = Market(units, np.random.default_rng(2).random(units.size), keep)
    costs = unit_costs(units, keep, TIMES, 40)
    alone = market.prices(keep, dataclasses.replace(costs, gather=0 * costs.gather))
    price = market.prices(keep, costs)
    for number, part in enumerate(market.parts):
        if part.edges is None:
            continue
        lowest = price[part.edges.units].min()
        harm, cost = market.harm[part.edges.units], costs.unit[part.edges.units]
        if np.isinf(lowest):
            assert cost.sum() <= costs.gather[number]
        else:  # what has gone at that price saves exactly the gather
            gone = np.maximum(lowest * cost - harm, 0).sum()
            assert gone == pytest.approx(lowest * costs.gather[number])
        assert (price[part.edges.units] == np.maximum(alone[part.edges.units], lowest)).all()
