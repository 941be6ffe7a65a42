"""What each part of a net costs: in channels, params or MACs by formula, in time by measurement.

All four are one sum with different rates, so that one plan can be priced in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prune_dn.pruning.parts import Mask, Positions, Selection
from prune_dn.pruning.prices import Costs
from prune_dn.pruning.units import Units, layers

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """Cost per weight and per counted channel, and, for one image, per multiply-add and per element.

    `norm_channel`: a channel of a batch norm, or of a convolution in a net without batch norms.
    `concatenated`: an element of the stream, for every reader (which concatenates it);
    `gathered`: an element that a reader selects; `gather`, `layer`: each one of them. The multiply-adds
    of a conv are those of widths filled up to multiples of `step`, as a runtime does that computes
    in blocks of channels (inputs below `step` are not filled up).
    """

    weight: float = 0
    norm_channel: float = 0
    mac_1x1: float = 0
    mac_kxk: float = 0
    normalised: float = 0
    concatenated: float = 0
    gathered: float = 0
    gather: float = 0
    layer: float = 0
    step: int = 1

    def conv(self, inputs: Numbers, outputs: Numbers, taps: Numbers, pixels: Numbers) -> Numbers:
        """Convolutions and linear layers without bias; `inputs` are those of one group."""
        filled = np.where(inputs >= self.step, self._filled(inputs), inputs)
        mac = np.where(taps == 1, self.mac_1x1, self.mac_kxk)
        time = filled * self._filled(outputs) * pixels * mac
        cost: Numbers = taps * (inputs * outputs * self.weight + time)
        return cost

    def filter(self, inputs: Numbers, outputs: Numbers, taps: Numbers, pixels: Numbers) -> Numbers:
        """What each filter saves that goes: no time where the filters fill one step."""
        whole = self.conv(inputs, outputs, taps, pixels)
        in_one_step = (outputs > 1) & (outputs <= self.step)
        whole = np.where(in_one_step, inputs * outputs * taps * self.weight, whole)
        cost: Numbers = whole / np.maximum(outputs, 1)
        return cost

    def _filled(self, width: Numbers) -> Numbers:
        return width if self.step == 1 else -(-width // self.step) * self.step


COUNTED = {
    "channels": Rates(norm_channel=1),
    "params": Rates(weight=1),
    "macs": Rates(mac_1x1=1, mac_kxk=1),
}


class Costing:
    """What a net and each of its units cost, with the units that a `keep` leaves."""

    def __init__(self, units: Units) -> None:
        self.units = units
        followers = units.graph.followers
        selections = {s.reader.select: s for s in units.selections}
        found = list(layers(units))
        uses = units.graph.uses()
        ops = {op.layer: op for op in units.graph.ops}
        self.outputs = _Counts(units.size, (outputs for _, outputs, _ in found))
        self.inputs = _Counts(units.size, (inputs for _, _, inputs in found))
        self.taps = np.array([math.prod(ops[name].kernel) for name, _, _ in found], dtype=float)
        self.pixels = np.array([uses.get(name, 0) for name, _, _ in found], dtype=float)
        self.conv_groups = np.array([ops[name].groups for name, _, _ in found])
        self.bias = np.array([ops[name].bias for name, _, _ in found], dtype=float)
        of_norms = any(f.is_norm for f in followers)
        self.counted = np.array([bool(ops[n].kernel) and not of_norms for n, _, _ in found])
        at: list[Positions] = []
        for follower in followers:
            selection = selections.get(follower.layer)
            ids = units.unit(follower.channels)
            at.append(ids if selection is None else selection.edges.start + selection.edge_at)
        self.follows = _Counts(units.size, at)
        self.params, self.macs = (
            np.array([getattr(f, key) for f in followers], dtype=float)
            for key in ("params", "macs")
        )
        self.normed = np.array([f.pixels if f.is_norm else 0 for f in followers], dtype=float)
        self.follower_counted = np.array(
            [f.is_norm if of_norms else f.macs > 0 for f in followers], dtype=float
        )
        self.streams = _Counts(units.size, (s.stream for s in units.selections))
        self.areas = np.array([s.reader.positions for s in units.selections], dtype=float)
        number = {name: n for n, (name, _, _) in enumerate(found)}
        self.reader = np.array([number[s.reader.layer] for s in units.selections], dtype=np.intp)
        self.first = np.array([number[b.layers[0]] for b in units.blocks], dtype=np.intp)
        self.last = np.array([number[b.layers[-1]] for b in units.blocks], dtype=np.intp)
        self.block_of_selection = np.array(
            [units.block_of[s.edges.start] for s in units.selections], dtype=np.intp
        )
        self.block_of_follower = np.array([self._inner_block(ids) for ids in at], dtype=np.intp)
        middle = [
            (number[n], b) for b, block in enumerate(units.blocks) for n in block.layers[1:-1]
        ]
        self.middle = np.array(middle, dtype=np.intp).reshape(-1, 2)

    def _inner_block(self, ids: Positions) -> int:
        """The block within which alone a follower's channels are read; -1 = none."""
        block = int(self.units.block_of[ids[0]]) if len(ids) and ids[0] >= 0 else -1
        inner = block >= 0 and self.units.output_of[ids[0]] < 0
        return block if inner and self.units.is_channel[ids[0]] else -1

    def total(self, keep: Mask, rates: Rates) -> float:
        """What the net costs that a closed `keep` leaves."""
        outputs, inputs, follows = (
            counts.left(keep) for counts in (self.outputs, self.inputs, self.follows)
        )
        inputs = inputs / self.conv_groups
        each = rates.conv(inputs, outputs, self.taps, self.pixels)
        each += outputs * (self.bias * rates.weight + self.counted * rates.norm_channel)
        found = float(each.sum()) + float((follows * self._follower(rates)).sum())
        if self.units.selections and (rates.concatenated or rates.gathered or rates.gather):
            seen = self.streams.left(keep) * (outputs[self.reader] > 0)
            found += float((rates.concatenated * seen * self.areas).sum())
            taken = self._gathered(keep, seen)
            found += float((rates.gathered * taken * self.areas + rates.gather * (taken > 0)).sum())
        return found + rates.layer * int((outputs[self.last] > 0).sum())

    def each(self, keep: Mask, rates: Rates) -> Costs:
        """What each unit, and each block however narrow, costs by itself in the net `keep` leaves."""
        units = self.units
        outputs, inputs, follows = (
            counts.left(keep) for counts in (self.outputs, self.inputs, self.follows)
        )
        inputs = inputs / self.conv_groups
        made = rates.filter(inputs, outputs, self.taps, self.pixels)
        made += self.bias * rates.weight + self.counted * rates.norm_channel
        one = np.ones_like(inputs)
        reads = rates.conv(one, outputs / self.conv_groups, self.taps, self.pixels)
        followed = self._follower(rates)
        seen = self.streams.left(keep) * (outputs[self.reader] > 0)
        each = self.outputs.spread(made) + self.inputs.spread(reads) + self.follows.spread(followed)
        each += self.streams.spread(rates.concatenated * self.areas * (outputs[self.reader] > 0))
        taken = self._gathered(keep, seen)
        reading, gather = np.zeros(units.size), np.zeros(len(units.selections))
        for number, selection in enumerate(units.selections):
            edges, read = selection.edges, float(np.count_nonzero(keep[selection.edges.units]))
            twice = 2 if taken[number] > read else 1
            each[edges.units] += rates.gathered * self.areas[number] * twice
            reading[edges.units] = each[edges.units]
            if self.block_of_selection[number] >= 0:
                block = units.blocks[self.block_of_selection[number]]
                if len(block.layers) == 1:  # what such a layer reads is counted in its filters
                    reading[edges.units] -= reads[self.reader[number]]
            if not taken[number]:
                gather[number] = rates.gather + rates.gathered * read * self.areas[number]
            if selection.sides is not None:  # where the other side stays, the norm channel stays
                pairs = selection.sides
                both = np.logical_and(*pairs.halves(keep))[pairs.owner]
                each[pairs.group.units] = each[edges.units][pairs.owner] * ~both
        for pairs in units.pairs:
            if pairs.maker is not None:
                own = each[pairs.group.units] * keep[pairs.group.units]
                each[pairs.whole.units] += np.bincount(pairs.owner, own, pairs.whole.size)
        whole = rates.conv(inputs, outputs, self.taps, self.pixels)
        filters = rates.filter(inputs, outputs, self.taps, self.pixels) * outputs
        upkeep = rates.layer + whole[self.last] - filters[self.last]
        inner = self.block_of_follower >= 0
        for blocks, cost in (
            (self.block_of_follower[inner], (follows * followed)[inner]),
            (self.middle[:, 1], whole[self.middle[:, 0]]),
            (
                self.block_of_selection[self.block_of_selection >= 0],
                (rates.concatenated * seen * self.areas)[self.block_of_selection >= 0],
            ),
        ):
            upkeep = upkeep + np.bincount(blocks, cost, len(units.blocks))
        return Costs(each, reading, upkeep, gather)

    def _follower(self, rates: Rates) -> Numbers:
        """The cost of one entry of each follower."""
        return (
            self.follower_counted * rates.norm_channel
            + self.params * rates.weight
            + self.macs * rates.mac_kxk
            + self.normed * rates.normalised
        )

    def _gathered(self, keep: Mask, seen: Numbers) -> Numbers:
        """How many channels each selection gathers: none where all of the stream is read as it is, two
        for each norm channel where what is read competes."""
        found = np.zeros(len(seen))
        for number, selection in enumerate(self.units.selections):
            read = np.count_nonzero(keep[selection.edges.units])
            found[number] = read if read < seen[number] else 0
            if _competes(selection, keep):
                found[number] = 2 * read
        return found


def _competes(selection: Selection, keep: Mask) -> bool:
    sides = selection.sides
    return sides is not None and bool(np.logical_and(*sides.halves(keep)).any())


class _Counts:
    """Lists of units, of which is counted how many stay; what belongs to no unit always does."""

    def __init__(self, size: int, lists: Iterable[Positions]) -> None:
        found = list(lists)
        self.size = size
        self.sizes = np.array([len(units) for units in found], dtype=np.intp)
        self.units = np.concatenate([*found, np.zeros(0, dtype=np.int64)]) + 1  # 0: STAYS
        self.ends = np.cumsum(self.sizes)

    def left(self, keep: Mask) -> Numbers:
        """How many of each list stay."""
        sums = np.concatenate([[0], np.cumsum(np.concatenate([[True], keep])[self.units])])
        left: Numbers = (sums[self.ends] - sums[self.ends - self.sizes]).astype(np.float64)
        return left

    def spread(self, costs: Numbers) -> Numbers:
        """The cost of an entry of each list, summed over the entries of each unit, (units,)."""
        weights = np.repeat(np.asarray(costs, dtype=np.float64), self.sizes)
        return np.bincount(self.units, weights, self.size + 1)[1:].astype(np.float64, copy=False)
