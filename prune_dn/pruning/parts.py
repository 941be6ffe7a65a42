"""The pieces of a net, as pruning sees it: groups of units, who reads what, and what competes.

All units lie in one flat array (see `units`); a group is a slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from prune_dn.graph.types import Reader
from prune_dn.pruning.config import Kind

Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
STAYS = -1  # in an array of units: a channel that belongs to none


@dataclass(frozen=True)
class Group:
    """Units of one kind in one module; `name` is the module whose channels they are.

    stream: channels that several layers read, or that a reader selects from; bottleneck: channels that
    one layer reads. A unit under MFM has `siblings` filters, but for the `alone` units that have one left,
    and makes `survivors` channels. edge: the channels of a reader's norm; sibling: what enters an MFM 2/1,
    on new maps (`mfm`) or on what is read (`read`). `blocks` are the groups of a grouped convolution, each
    of which must lose equally many of the units: they lie block after block.
    """

    kind: Kind
    name: str
    start: int
    size: int
    siblings: int = 1
    survivors: int = 1
    alone: int = 0
    blocks: int = 1

    @property
    def channels(self) -> int:
        """How many channels the module has."""
        return self.size * self.siblings - self.alone

    @property
    def units(self) -> slice:
        """Where the units lie in the flat array."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Pairs:
    """The siblings of an MFM 2/1: the first of each pair, then the second of those that have one.

    `whole` are the units that the pairs make up. `owner` is the pair of each sibling, `second` the
    sibling that is second in each pair, or its first where that stands alone; both count from the start
    of their group. `maker` makes the siblings, or `reader` reads their maximum.
    """

    group: Group
    whole: Group
    owner: Positions
    second: Positions
    maker: str | None
    reader: str | None

    def halves(self, keep: Mask) -> tuple[Mask, Mask]:
        """Whether the first of each pair stays, and the second where there is one: (pairs,) twice."""
        mine, own = keep[self.group.units], np.arange(len(self.second))
        return mine[: len(own)], mine[self.second] & (self.second != own)

    def left(self, keep: Mask) -> tuple[Positions, Positions]:
        """First and second sibling of each pair that stays: the same one where it stands alone."""
        first, second = self.halves(keep)
        firsts = np.where(first, np.arange(len(first)), self.second)
        seconds = np.where(second, self.second, firsts)
        return firsts[first | second], seconds[first | second]

    def agree(self, keep: Mask) -> None:
        """A pair goes where both siblings went, and siblings go with their pair."""
        first, second = self.halves(keep)
        keep[self.whole.units] &= first | second
        keep[self.group.units] &= keep[self.whole.units][self.owner]


@dataclass(frozen=True)
class Selection:
    """A layer that may read some of a stream: edge i reads what lies at `positions[i]` of it.

    Where what is read competes (`sides`), that is the first of each pair, then the seconds of those that
    have one. `sources` are the units that make what is read, STAYS for what cannot go; `stream` those
    that make each channel of the stream. `edge_at` is the edge of each of the layer's inputs.
    """

    reader: Reader
    edges: Group
    sides: Pairs | None
    positions: Positions
    sources: Positions
    stream: Positions
    edge_at: Positions

    @cached_property
    def readings(self) -> Group:
        """What reads one channel each: edges, or their sides where they compete."""
        return self.edges if self.sides is None else self.sides.group


@dataclass(frozen=True)
class Block:
    """What may go whole: its groups, and of these the one whose channels others read."""

    name: str
    layers: tuple[str, ...]
    groups: tuple[Group, ...]
    output: Group
