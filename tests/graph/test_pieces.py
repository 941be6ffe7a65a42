"""What a reader takes of a concatenation: the same channels as by index, of the sources that have them."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_dn.graph.pieces import RANGES, concatenated, pieces_of


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_pieces_are_what_an_index_takes(widths: list[int], data: st.DataObject) -> None:
    width = sum(widths)
    positions = sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))
    pieces = pieces_of(positions, widths)
    sources = list(torch.randn(2, width, 3).split(widths, 1))
    indices = [torch.tensor(p.indices) if p.indices else None for p in pieces]
    found = concatenated(sources, pieces, indices)
    assert torch.equal(found, torch.cat(sources, 1)[:, positions])
    owners = [n for n, w in enumerate(widths) for _ in range(w)]
    for source in range(len(widths)):
        mine = [p for p in pieces if p.source == source]
        taken = [i - owners.index(source) for i in positions if owners[i] == source]
        breaks = sum(b - a > 1 for a, b in itertools.pairwise(taken)) + bool(taken)
        assert len(mine) == (breaks if breaks <= RANGES else 1)


def test_one_whole_source_is_not_copied() -> None:
    sources = [torch.randn(1, 2, 2), torch.randn(1, 3, 2)]
    found = concatenated(sources, pieces_of([2, 3, 4], [2, 3]), [None])
    assert found is sources[1]
