"""The order of a layer's channels in the new net: so that what its readers select are few ranges.

After UPSCALE (arXiv:2307.08771), which reorders for the same end. Channels of one group may lie in any
order, as all layers that know them follow; the answers stay the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prune_dn.pruning.parts import Mask, Positions
from prune_dn.pruning.units import Units

_SWEEPS = 200  # improvements of one order: each takes ranges away, so that the end comes sooner


def arranged(table: Units, keep: Mask) -> Units:
    """The table with the order that leaves the readers of a closed `keep` the fewest ranges.

    What competes, and what lies in the groups of a grouped convolution, stays in its order.
    """
    moved, free = np.arange(table.size), _free(table)
    rows: dict[int, list[Positions]] = {}
    for selection in table.selections:
        read = selection.sources[keep[selection.readings.units]]
        for number in np.unique(table.group_of[read[read >= 0]]).tolist():
            rows.setdefault(number, []).append(read)
    for number, readers in rows.items():
        group = table.groups[number]
        if free[number]:
            kept = group.start + np.flatnonzero(keep[group.units])
            reads = np.array([np.isin(kept, read) for read in readers])
            moved[kept] = kept[fewest_ranges(reads)]
    return _with(table, moved)


def arranged_as(table: Units, keep_indices: Mapping[str, Sequence[Any]]) -> Units:
    """The table with the order in which a plan names the channels that stay."""
    moved = np.arange(table.size)
    for group, is_free in zip(table.groups, _free(table), strict=True):
        named = np.array(keep_indices.get(group.name, ()), dtype=np.int64)
        if len(named) and is_free:
            moved[group.start + np.sort(named)] = group.start + named
    return _with(table, moved)


def fewest_ranges(reads: npt.NDArray[np.bool_]) -> Positions:
    """An order of channels, (channels,), in which what each reader reads are few ranges.

    `reads` (readers, channels) says who reads what. Next to each other lie channels that many readers have
    in common: a short path through the columns by how many entries differ, the nearest first, then
    improved by turning parts of it round (2-opt). The order as it is stays where nothing is gained.

    >>> fewest_ranges(np.array([[True, False, True, False], [False, False, True, True]])).tolist()
    [1, 0, 2, 3]
    """
    count = reads.shape[1]
    columns = np.concatenate([np.zeros((1, len(reads))), reads.T]).astype(np.float32)
    overlap = columns @ columns.T
    own = overlap.diagonal()
    distance = np.rint(own[:, None] + own - 2 * overlap).astype(np.int64)  # column 0: nobody reads
    path, left = [0], np.ones(count + 1, dtype=bool)
    left[0] = False
    for _ in range(count):
        nearest = np.where(left, distance[path[-1]], np.iinfo(np.int64).max)
        path.append(int(nearest.argmin()))
        left[path[-1]] = False
    best = _shortened(np.array(path), distance)
    whole = np.arange(count + 1)
    return (best if _length(best, distance) < _length(whole, distance) else whole)[1:] - 1


def _length(path: Positions, distance: Positions) -> int:
    return int(distance[path, np.roll(path, -1)].sum())


def _shortened(path: Positions, distance: Positions) -> Positions:
    """A closed path, from column 0, of which no part is better turned round."""
    for _ in range(_SWEEPS):
        ahead = np.roll(path, -1)
        step = distance[path, ahead]
        gain = step[:, None] + step - distance[np.ix_(path, path)] - distance[np.ix_(ahead, ahead)]
        gain = np.triu(gain, 1)
        first, last = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, last] <= 0:
            break
        path = path.copy()
        path[first + 1 : last + 1] = path[first + 1 : last + 1][::-1]
    return path


def _free(table: Units) -> list[bool]:
    """Whether the channels of each group may lie in any order: not where they compete, here or in a reader."""
    competing = {pairs.whole.name for pairs in table.pairs}
    for selection in table.selections:
        if selection.sides is not None:
            numbers = np.unique(table.group_of[selection.sources[selection.sources >= 0]])
            competing |= {table.groups[number].name for number in numbers}
    return [
        group.kind in ("stream", "bottleneck")
        and group.siblings == group.blocks == 1
        and group.name not in competing
        for group in table.groups
    ]


def _with(table: Units, moved: Positions) -> Units:
    found = copy.copy(table)
    found.moved = moved
    return found
