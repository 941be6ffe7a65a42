"""The pieces of a net, as pruning sees it: groups of units, and who reads and makes them.

All units lie in one flat array (see `units`); a group is a slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["stream", "bottleneck", "edge", "sibling"]
KINDS: tuple[Kind, ...] = ("stream", "bottleneck", "edge", "sibling")
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Group:
    """Units of one kind in one module; `name` is the module whose channels they are.

    stream: a conv's filters (an MFM unit has `siblings` filters, but for the `alone` units that have
    one left, and makes `survivors` channels); bottleneck: conv1's filters; edge: the channels of a
    reader's norm; sibling: what enters an MFM 2/1, on new maps (`mfm`) or on what is read (`read`).
    """

    kind: Kind
    name: str
    start: int
    size: int
    siblings: int = 1
    survivors: int = 1
    alone: int = 0

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

    `owner` is the pair of each sibling, `second` the sibling that is second in each pair, or its
    first where that stands alone; `positions` are the stream positions that the siblings make or
    read. All count from the start of `group`.
    """

    group: Group
    owner: Positions
    second: Positions
    positions: Positions

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

    def agree(self, keep: Mask, whole: Group) -> None:
        """A pair goes where both siblings went, and siblings go with their pair (of `whole`)."""
        first, second = self.halves(keep)
        keep[whole.units] &= first | second
        keep[self.group.units] &= keep[whole.units][self.owner]


@dataclass(frozen=True)
class Part:
    """A stem, dense layer, transition or classifier: what it reads and what it makes.

    `positions` are the stream positions that it reads (edge i reads positions[i]); `offset` is
    where its own channels begin in the stream that it writes. `block` counts dense blocks from 1:
    the one that it is in, or that a transition or classifier reads; 0 = the stem. `siblings` are
    those of the stream units of an MFM 2/1, `sides` those of the edges where what is read competes
    (edge i then reads positions[i] and its rival).
    """

    name: str
    edges: Group | None
    bottleneck: Group | None
    stream: Group | None
    positions: Positions
    offset: int
    block: int
    siblings: Pairs | None = None
    sides: Pairs | None = None

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """In the order in which they lie in the flat array."""
        pairs = [None if p is None else p.group for p in (self.sides, self.siblings)]
        found = (self.edges, pairs[0], self.bottleneck, self.stream, pairs[1])
        return tuple(group for group in found if group is not None)

    @property
    def first_conv(self) -> str:
        """The conv (or classifier) that reads behind the norm."""
        if self.is_dense_layer:
            return f"{self.name}.conv1"
        return self.name if self.stream is None else f"{self.name}.conv"

    @cached_property
    def readings(self) -> tuple[Group, Positions]:
        """What reads one stream channel each: edges, or their sides where they compete."""
        assert self.edges is not None
        if self.sides is None:
            return self.edges, self.positions
        return self.sides.group, self.sides.positions

    @property
    def is_dense_layer(self) -> bool:
        return ".denseblock" in self.name

    def made(self) -> Positions:
        """Stream positions by unit: (survivors, units)."""
        assert self.stream is not None
        count = self.stream.size * self.stream.survivors
        return self.offset + np.arange(count).reshape(self.stream.survivors, -1)


@dataclass(frozen=True)
class Stream:
    """The channels inside one dense block; `writer` is the stem or transition before it."""

    width: int
    writer: Part
    layers: tuple[Part, ...]
    reader: Part

    @property
    def readers(self) -> tuple[Part, ...]:
        return (*self.layers, self.reader)

    @property
    def producers(self) -> tuple[Part, ...]:
        return (self.writer, *self.layers)

    def makers(self) -> Positions:
        """The stream unit that makes each channel, (width,)."""
        makers = np.empty(self.width, dtype=np.intp)
        for part in self.producers:
            assert part.stream is not None
            makers[part.made()] = np.arange(part.stream.start, part.stream.units.stop)
        return makers
