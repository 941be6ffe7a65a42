"""Groups of channels that lie in the same layers, so that one score per class can be compared."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prune_dn.graph.types import NONE, Graph, Ids

OUT, IN = 0, 1


@dataclass(frozen=True)
class Member:
    """A layer whose `channels`, on its side OUT, IN or both, are the group's classes `units`."""

    layer: str
    sides: tuple[int, ...]
    channels: Tensor
    units: Tensor


@dataclass(frozen=True)
class Group:
    """`size` classes of tied channels in `blocks` equal parts that must lose equally many.

    All classes of a group lie in the same layers, equally often; `root`, its name, is the first layer that
    makes them and names no other group. Blocks are the groups of a grouped convolution.
    """

    root: str
    size: int
    blocks: int
    members: tuple[Member, ...]


def free_groups(graph: Graph) -> list[Group]:
    """The classes that may go, in the order in which they are made.

    Where a grouped convolution needs equally many channels in each of its groups, these are the blocks
    of one group; where that cannot be, because some must stay or lie in other layers too, what has the
    same place in all groups is tied.
    """
    owner, blocks = _balance(graph)
    fixed = {int(owner[c]) for c in graph.fixed}
    sides = list(_sides(graph, owner))
    where = _signatures(sides)
    made = {int(c) for _, tag, ids in sides if tag == (OUT,) for c in ids}
    keyed: dict[object, list[int]] = {}
    in_block = {int(c): number for number, rows in enumerate(blocks) for c in rows.ravel()}
    for c in sorted(where):
        if c not in fixed and c in made and c not in in_block:
            keyed.setdefault(where[c], []).append(c)
    orders = [(np.array(found), 1) for found in keyed.values()]
    orders += [(rows.ravel(), len(rows)) for rows in blocks]
    groups: list[Group] = []
    for order, count in sorted(orders, key=lambda o: o[0].min()):
        groups.append(_group(order, count, sides, {group.root for group in groups}))
    return groups


def _sides(graph: Graph, owner: Ids) -> Iterator[tuple[str, tuple[int, ...], Ids]]:
    """Each layer, side and the class at each position."""

    def classes(ids: Ids) -> Ids:
        return np.where(ids == NONE, NONE, owner[ids])

    for producer in graph.producers:
        yield producer.layer, (OUT,), classes(producer.channels)
    for reader in graph.readers:
        yield reader.layer, (IN,), classes(reader.channels)
    for follower in graph.followers:
        yield follower.layer, (OUT, IN), classes(follower.channels)


def _signatures(sides: list[tuple[str, tuple[int, ...], Ids]]) -> dict[int, tuple[object, ...]]:
    """The layers and sides in which each class lies, and how often."""
    found: dict[int, Counter[tuple[str, tuple[int, ...]]]] = {}
    for layer, tag, ids in sides:
        for c in ids.tolist():
            if c != NONE:
                found.setdefault(c, Counter())[layer, tag] += 1
    return {c: tuple(sorted(places.items())) for c, places in found.items()}


def _balance(graph: Graph) -> tuple[Ids, list[Ids]]:
    """The class of each id, and the grouped convolutions' rows of classes that can be blocks."""
    owner = graph.ties.copy()
    while True:
        fixed = {int(owner[c]) for c in graph.fixed}
        where = _signatures(list(_sides(graph, owner)))
        rows = {
            (ids.shape, owner[ids].tobytes()): owner[ids]
            for ids in graph.balanced
            if (ids != NONE).all()
        }
        held = [found for found in rows.values() if len(np.unique(found[:, 0])) > 1]
        users = Counter(int(c) for found in held for c in np.unique(found))
        wrong = [
            found
            for found in held
            if len(np.unique(found)) < found.size
            or any(users[int(c)] > 1 or int(c) in fixed for c in found.ravel())
            or len({where[int(c)] for c in found.ravel()}) > 1
        ]
        if not wrong:
            return owner, held
        for found in wrong:
            for column in owner[found].T:
                for c in np.unique(owner[column]):
                    owner[owner == c] = owner[column].min()


def _group(
    order: Ids, blocks: int, sides: list[tuple[str, tuple[int, ...], Ids]], taken: set[str]
) -> Group:
    """The group of these classes, its units in this order, with a name that is not taken."""
    unit = np.full(int(max(order.max(), *(ids.max(initial=0) for _, _, ids in sides))) + 1, NONE)
    unit[order] = np.arange(len(order))
    members = []
    for layer, tag, ids in sides:
        units = np.where(ids == NONE, NONE, unit[ids])
        channels = np.flatnonzero(units != NONE)
        if len(channels):
            found = torch.from_numpy(channels), torch.from_numpy(units[channels])
            members.append(Member(layer, tag, *found))
    makers = [m.layer for m in members if m.sides == (OUT,)]
    parts = (f"{makers[0]} (part {n})" for n in itertools.count(2))
    root = next(name for name in itertools.chain(makers, parts) if name not in taken)
    return Group(root, len(order), blocks, tuple(members))
