"""Ids that flow through a net: one array per tensor, moved as the tensor's own elements are moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_dn.graph.types import NONE, Ids


@dataclass(frozen=True)
class Flow:
    """The ids of a tensor's elements: `ids` broadcasts to `shape` and is 1 along constant axes.

    (N, C, H, W) features usually have ids of shape (1, C, 1, 1).
    """

    shape: tuple[int, ...]
    ids: Ids

    def axis(self) -> int | None:
        """The only axis along which ids differ; None if there are none or several."""
        varying = [d for d, size in enumerate(self.ids.shape) if size > 1]
        return varying[0] if len(varying) == 1 else None


def constant(shape: Sequence[int]) -> Flow:
    """A tensor without channels of any layer."""
    return Flow(tuple(shape), np.full((1,) * len(shape), NONE, dtype=np.int64))


def along(shape: Sequence[int], axis: int, ids: Ids) -> Flow:
    """A tensor with `ids` along one axis."""
    sizes = [1] * len(shape)
    sizes[axis] = len(ids)
    return Flow(tuple(shape), ids.reshape(sizes))


def reduced(shape: Sequence[int], ids: Ids) -> Flow:
    """`ids` with axes of size 1 wherever they do not differ."""
    for d, size in enumerate(ids.shape):
        if size > 1:
            first = ids.take([0], axis=d)
            if (ids == first).all():
                ids = first
    return Flow(tuple(shape), ids)


def reshape(flow: Flow, shape: Sequence[int]) -> Flow:
    """Row-major reshape; only the axes between the common first and last ones are spread out."""
    old, new = flow.shape, tuple(shape)
    if 0 in old:
        return constant(new)
    lead = 0
    while lead < min(len(old), len(new)) and old[lead] == new[lead]:
        lead += 1
    tail = 0
    while tail < min(len(old), len(new)) - lead and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    cut_old, cut_new = len(old) - tail, len(new) - tail
    kept = flow.ids.shape
    middle = np.broadcast_to(flow.ids, (*kept[:lead], *old[lead:cut_old], *kept[cut_old:]))
    assert math.prod(old[lead:cut_old]) == math.prod(new[lead:cut_new])
    return reduced(new, middle.reshape((*kept[:lead], *new[lead:cut_new], *kept[cut_old:])))


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes that a reshape turns into each other, in the smallest blocks."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine: list[int] = []
        theirs: list[int] = []
        have = need = 1
        while True:
            if i < len(old) and (have < need or not mine):
                have *= old[i]
                mine.append(i)
                i += 1
            elif j < len(new) and (need < have or not theirs):
                need *= new[j]
                theirs.append(j)
                j += 1
            else:
                break
        found.append((mine, theirs))
    return found


def full(flow: Flow, axis: int) -> Ids:
    """The ids with `axis` spread out to its whole size."""
    sizes = list(flow.ids.shape)
    sizes[axis] = flow.shape[axis]
    return np.broadcast_to(flow.ids, sizes)


def take(flow: Flow, axis: int, index: Ids | slice, shape: Sequence[int]) -> Flow:
    """Elements by position along an axis."""
    axis %= len(flow.shape)
    ids = full(flow, axis)
    picked = ids[(slice(None),) * axis + (index,)]
    return reduced(shape, picked) if picked.size else constant(shape)


def concatenate(flows: Sequence[Flow], axis: int, shape: Sequence[int]) -> Flow:
    """Tensors one after the other along an axis."""
    axis %= len(shape)
    spread = [full(f, axis) for f in flows if len(f.shape) == len(shape) and f.shape[axis]]
    sizes = np.max([ids.shape for ids in spread], axis=0)
    parts = []
    for ids in spread:
        wanted = sizes.copy()
        wanted[axis] = ids.shape[axis]
        parts.append(np.broadcast_to(ids, wanted))
    return reduced(shape, np.concatenate(parts, axis))
