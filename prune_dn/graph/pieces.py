"""What a reader takes of a concatenation, without concatenating the rest: pieces of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RANGES = 2  # of one source: more are gathered from it in one go


class Piece(NamedTuple):
    """Channels `start` to `stop` of one source, or with `indices` these ones of it, in their order."""

    source: int
    start: int
    stop: int
    indices: tuple[int, ...] = ()


def pieces_of(positions: Sequence[int], widths: Sequence[int]) -> tuple[Piece, ...]:
    """The pieces that make up rising `positions` in a concatenation of sources of these widths.

    A source of which nothing is taken is left out; of any other one or two ranges are taken, or single
    channels where there are more ranges.

    >>> pieces_of([0, 1, 2, 5, 7, 9, 11], [3, 2, 2, 5])
    (Piece(source=0, start=0, stop=3, indices=()), Piece(source=2, start=0, stop=1, indices=()), \
Piece(source=3, start=0, stop=5, indices=(0, 2, 4)))
    """
    found: list[Piece] = []
    ends = np.cumsum(widths)
    owner = np.searchsorted(ends, positions, side="right")
    for source in np.unique(owner).tolist():
        mine = np.asarray(positions)[owner == source] - (ends[source] - widths[source])
        ranges = ranges_of(mine.tolist())
        if len(ranges) > RANGES:
            found.append(Piece(source, 0, widths[source], tuple(mine.tolist())))
        else:
            found += [Piece(source, start, stop) for start, stop in ranges]
    return tuple(found)


def ranges_of(positions: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges, start and stop, that rising positions fill.

    >>> ranges_of([0, 1, 2, 5, 7, 8])
    [(0, 3), (5, 6), (7, 9)]
    """
    rising = np.asarray(positions)
    starts = np.flatnonzero(np.diff(rising, prepend=-2) != 1)
    stops = np.append(starts[1:], len(rising)) - 1
    return list(zip(rising[starts].tolist(), (rising[stops] + 1).tolist(), strict=True))


def concatenated(
    sources: Sequence[Tensor], pieces: Sequence[Piece], indices: Sequence[Tensor | None]
) -> Tensor:
    """The pieces of (N, channels, ...) sources, one after the other; `indices` are theirs as tensors."""
    parts = []
    for piece, index in zip(pieces, indices, strict=True):
        part = sources[piece.source]
        if index is not None:
            part = part.index_select(1, index)
        elif (piece.start, piece.stop) != (0, part.shape[1]):
            part = part.narrow(1, piece.start, piece.stop - piece.start)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
