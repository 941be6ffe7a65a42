"""The types of a graph of channels.

Every output channel of a convolution or linear layer has one channel id, a number from 0. A tensor
inside the net carries an array of ids along its channel axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

OUTPUT = "an output of the net"  # why the channels that a net returns must stay
NONE = -1  # in an array of ids: no channel of a layer (the net's input, a constant)


@dataclass(frozen=True)
class Producer:
    """A convolution or linear layer and the ids of its outputs, (outputs,)."""

    layer: str
    channels: Ids


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer and the id at each of its input positions, (inputs,).

    `select` is the norm in front of it whose output nobody else reads, where a selection of inputs can
    be made before the norm; None = there is no such norm. `stream` are the ids of the tensor in front of
    that norm, (width,), where others read it too, so that single inputs (edges) may go; `positions` are
    its pixels.
    """

    layer: str
    channels: Ids
    select: str | None
    stream: Ids | None = None
    positions: int = 0


@dataclass(frozen=True)
class Follower:
    """A layer or bare parameter with one entry per channel, and the ids in its order, (entries,).

    A norm, PReLU, depthwise convolution, scale or shift. Each entry has `params` parameters and costs
    `macs` for one image; `pixels` are the positions that it computes. `is_norm`: a batch norm.
    """

    layer: str
    channels: Ids
    params: int = 0
    macs: int = 0
    pixels: int = 0
    is_norm: bool = False


@dataclass(frozen=True)
class Competition:
    """An MFM: in each column of `operands`, (competitors, units), ids compete; `results` come out,
    (survivors, units).

    Where a unit has one operand left, all rows name it. `reader` is the layer that reads the results
    where what is read competes; None: new maps compete, and `maker` makes them.
    """

    module: str
    operands: Ids
    results: Ids
    maker: str | None
    reader: str | None


@dataclass(frozen=True)
class Block:
    """A part that may go whole: a dense layer. `layers` are its convolutions, in the order in which they run."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """The geometry of one call of a convolution or linear layer: `pixels` are its output positions.

    `kernel` is () for a linear layer. Of a transposed convolution `pixels` are its input positions; a
    layer that runs only in training mode has none.
    """

    layer: str
    kernel: tuple[int, ...]
    groups: int
    pixels: int
    bias: bool = False


@dataclass(frozen=True)
class Graph:
    """All channels of a net.

    `ties` gives the class of each id, (ids,): the smallest id that must go together with it. `fixed`
    maps classes that must stay to the reason. `balanced` are arrays (groups, channels of a group): a
    grouped convolution needs equally many channels in each row. `unreached` are modules with weights
    that no traced forward used; `why_unreached` is why the branches for training could not be followed.
    """

    producers: tuple[Producer, ...]
    readers: tuple[Reader, ...]
    followers: tuple[Follower, ...]
    ops: tuple[Op, ...]
    ties: Ids
    fixed: Mapping[int, str]
    balanced: tuple[Ids, ...]
    unreached: tuple[str, ...] = ()
    why_unreached: str | None = None
    competitions: tuple[Competition, ...] = ()
    blocks: tuple[Block, ...] = ()

    def classes(self, ids: Ids) -> Ids:
        """The class of each id; NONE stays NONE."""
        return np.where(ids == NONE, NONE, self.ties[ids]) if len(self.ties) else ids

    def uses(self) -> dict[str, int]:
        """The number of output positions of one image to which each layer applies its weight."""
        found: dict[str, int] = {}
        for op in self.ops:
            if op.pixels:
                found[op.layer] = found.get(op.layer, 0) + op.pixels
        return found

    def why_fixed(self, layer: str) -> str | None:
        """Why no output channel of a producer may go; None if one may."""
        found = next((p for p in self.producers if p.layer == layer), None)
        if found is None:
            raise KeyError(f"{layer} makes no channels of this graph")
        reasons = [self.fixed.get(int(c)) for c in self.classes(found.channels)]
        return None if None in reasons else reasons[0]
