"""Classes of channels that go together, and groups of classes that lie in the same layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prune_dn.graph.types import NONE, Graph, Ids

_Places = dict[int, set[tuple[str, str]]]


@dataclass(frozen=True)
class Classes:
    """Classes that lie in the same layers: (blocks, classes of a block).

    `maker` is the first layer that makes them; `name` is that, too, or names the part of it.
    `is_tied`: several layers make them. Blocks, the groups of a grouped convolution, must lose equally
    many.
    """

    name: str
    maker: str
    rows: Ids
    is_tied: bool


def channel_classes(graph: Graph) -> tuple[Ids, list[Classes]]:
    """The class of each id, and groups of the classes that may go, in the order in which they are made.

    What competes on new maps belongs to the class of what comes out. Where a grouped convolution needs
    equally many channels in each of its groups, these are the blocks of one group; where that cannot be,
    because some must stay or lie in other layers too, what has the same place in all groups is tied.
    Readers that can select do not tell classes apart: they may read any of them.
    """
    owner = graph.ties.copy()
    for competition in graph.competitions:
        if competition.maker is not None:
            owner[competition.operands] = owner[competition.results[0]]
            owner[competition.results] = owner[competition.results[0]]
    while True:
        places = _places(graph, owner)
        rows, wrong = _balanced(graph, owner, places)
        if not wrong:
            break
        for found in wrong:
            for column in owner[found].T:
                owner[np.isin(owner, column)] = column.min()
    return owner, list(_groups(graph, owner, places, rows))


def _places(graph: Graph, owner: Ids) -> _Places:
    """The layers in which each class lies, and on which side."""
    found: _Places = {}
    choosy = {r.select for r in graph.readers if r.stream is not None}
    layers = [(p.layer, "makes", p.channels) for p in graph.producers]
    layers += [(r.layer, "reads", r.channels) for r in graph.readers if r.stream is None]
    layers += [(f.layer, "is", f.channels) for f in graph.followers if f.layer not in choosy]
    for layer, side, ids in layers:
        for c in np.unique(owner[ids[ids != NONE]]).tolist():
            found.setdefault(c, set()).add((layer, side))
    return found


def _balanced(graph: Graph, owner: Ids, places: _Places) -> tuple[list[Ids], list[Ids]]:
    """The rows of classes that can be blocks, and those that cannot."""
    fixed = {int(owner[c]) for c in graph.fixed}
    rows = {
        (ids.shape, owner[ids].tobytes()): owner[ids]
        for ids in graph.balanced
        if (ids != NONE).all()
    }
    held = [found for found in rows.values() if len(np.unique(found[:, 0])) > 1]
    users = np.bincount([c for found in held for c in np.unique(found)], minlength=len(owner))
    wrong = [
        found
        for found in held
        if len(np.unique(found)) < found.size
        or any(users[c] > 1 or c in fixed for c in found.ravel().tolist())
        or len({frozenset(places[c]) for c in found.ravel().tolist()}) > 1
    ]
    return held, wrong


def _groups(graph: Graph, owner: Ids, places: _Places, blocks: list[Ids]) -> Iterator[Classes]:
    fixed = {int(owner[c]) for c in graph.fixed}
    in_block = {int(c) for rows in blocks for c in rows.ravel()}
    keyed: dict[object, list[int]] = {}
    for c in sorted(places):
        made = any(side == "makes" for _, side in places[c])
        if c not in fixed and c not in in_block and made:
            keyed.setdefault(frozenset(places[c]), []).append(c)
    orders = [np.array([found]) for found in keyed.values()] + blocks
    taken: set[str] = set()
    for rows in sorted(orders, key=lambda rows: int(rows.min())):
        mine = places[int(rows[0, 0])]
        makers = [p.layer for p in graph.producers if (p.layer, "makes") in mine]
        parts = (f"{makers[0]} (part {n})" for n in itertools.count(2))
        name = next(name for name in itertools.chain(makers, parts) if name not in taken)
        taken.add(name)
        yield Classes(name, makers[0], rows, len(makers) > 1)
