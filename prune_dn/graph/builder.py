"""A graph under construction: new ids, ties between them, and reasons why some must stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.graph.flow import Flow
from prune_dn.graph.inference import held
from prune_dn.graph.selecting import can_select
from prune_dn.graph.sizes import Sizes
from prune_dn.graph.types import NONE, Follower, Graph, Ids, Op, Producer, Reader


class Builder:
    """Collects what rules find out. A layer that is called again ties its channels to those before."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reasons: dict[int, str] = {}
        self._producers: dict[str, Ids] = {}
        self._readers: dict[str, Reader] = {}
        self._followers: dict[str, Follower] = {}
        self._ops: list[Op] = []
        self._balanced: list[Ids] = []
        self.selected: dict[str, Ids] = {}  # what norms that select do so from
        self.used: set[str] = set()  # names of parameters and buffers
        self.sizes = Sizes()  # of the run that is followed
        self.counts_ops = True  # off while the same calls are seen again

    def new(self, count: int) -> Ids:
        """Ids that nobody has yet."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def tie(self, first: Ids, second: Ids, reason: str) -> None:
        """Tie ids position by position; where only one side has a channel, it must stay."""
        first, second = np.broadcast_arrays(first, second)
        pairs = np.unique(np.stack([first.ravel(), second.ravel()], 1), axis=0)
        for a, b in pairs.tolist():
            if a == NONE or b == NONE:
                self._fix(max(a, b), reason)
            elif a != b:
                self._union(a, b)

    def fix(self, ids: Ids, reason: str) -> None:
        """These channels must stay; `reason` completes "it stays because ..."."""
        for i in np.unique(ids).tolist():
            self._fix(i, reason)

    def channels(self, flow: Flow, axis: int, reason: str) -> Ids:
        """One id for each position along `axis`; several at one position are tied."""
        axis %= len(flow.shape)
        ids = flow.ids
        if ids.shape[axis] == 1 and flow.shape[axis] > 1:
            if ids.size > 1:  # they differ along another axis: a layer over that one
                self.fix(ids, reason)
            return np.full(flow.shape[axis], ids.flat[0] if ids.size == 1 else NONE)
        rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
        if rows.shape[1] > 1:
            self.tie(rows[:, :1], rows, reason)
        return rows[:, 0].copy()

    def produce(self, layer: str, count: int) -> Ids:
        """The ids of a layer's outputs, the same at every call."""
        if layer not in self._producers:
            self._producers[layer] = self.new(count)
        return self._producers[layer]

    def read(self, layer: str, ids: Ids, select: str | None) -> None:
        """`layer` reads these ids."""
        known = self._readers.get(layer)
        if known is None:
            self._readers[layer] = Reader(layer, ids, select)
            return
        self.tie(known.channels, ids, f"{layer} is called on several tensors")
        if known.select != select:
            self._readers[layer] = replace(known, select=None)

    def follow(self, layer: str, ids: Ids, pixels: int = 0) -> None:
        """`layer` has one entry for each of these ids, and computes `pixels` positions of each."""
        known = self._followers.setdefault(layer, Follower(layer, ids, pixels=pixels))
        self.tie(known.channels, ids, f"{layer} is called on several tensors")

    def balance(self, rows: Ids) -> None:
        """Each row (a group of a grouped convolution) must lose equally many."""
        self._balanced.append(rows)

    def op(self, op: Op) -> None:
        """A call of a convolution or linear layer."""
        if self.counts_ops:
            self._ops.append(op)
        elif all(known.layer != op.layer for known in self._ops):
            self._ops.append(replace(op, pixels=0))

    def unread(self) -> Ids:
        """The ids that a layer makes, no layer reads and nothing fixes."""
        read = {
            self._find(i) for r in self._readers.values() for i in r.channels.tolist() if i != NONE
        }
        read |= {self._find(i) for i in self._reasons}
        made = [i for ids in self._producers.values() for i in ids.tolist()]
        return np.array([i for i in made if self._find(i) not in read], dtype=np.int64)

    def graph(self, net: nn.Module, unreached: Iterable[str], why: str | None) -> Graph:
        """The graph of everything that was collected about `net`."""
        ties = np.array([self._find(i) for i in range(len(self._parent))], dtype=np.int64)
        fixed: dict[int, str] = {}
        for i, reason in self._reasons.items():
            fixed.setdefault(int(ties[i]), reason)
        return Graph(
            tuple(Producer(name, ids) for name, ids in self._producers.items()),
            tuple(self._with_streams(net, ties)),
            tuple(self._counted(net, follower) for follower in self._followers.values()),
            tuple(self._ops),
            ties,
            fixed,
            tuple(self._balanced),
            tuple(unreached),
            why,
        )

    def share(self, layer: str, reason: str) -> None:
        """Fix all channels that a layer reads, makes or follows."""
        found = [self._producers[layer]] if layer in self._producers else []
        for known in (self._readers.get(layer), self._followers.get(layer)):
            found += [] if known is None else [known.channels]
        for ids in found:
            self.fix(ids, reason)

    def _with_streams(self, net: nn.Module, ties: Ids) -> Iterator[Reader]:
        """The readers, with the tensor from which each may select where others read it too."""
        readers = Counter(
            int(c)
            for reader in self._readers.values()
            for c in np.unique(ties[reader.channels[reader.channels != NONE]])
        )
        norms = Counter(reader.select for reader in self._readers.values())
        for reader in self._readers.values():
            norm = self._followers.get(reader.select or "")
            if norm is None or norms[reader.select] > 1 or not can_select(held(net, norm.layer)):
                yield reader
                continue
            stream, ids = self.selected.get(norm.layer, norm.channels), norm.channels
            _, first = np.unique(reader.channels, return_index=True)
            same = np.array_equal(reader.channels[np.sort(first)], ids)
            often = NONE not in stream and max(readers[int(c)] for c in ties[stream]) > 1
            if same and (often or norm.layer in self.selected):
                yield replace(reader, stream=stream, positions=norm.pixels)
            else:
                yield reader

    def _counted(self, net: nn.Module, follower: Follower) -> Follower:
        """With what each entry has and costs."""
        layer, entries = held(net, follower.layer), len(follower.channels)
        if isinstance(layer, Tensor):
            is_parameter = isinstance(layer, nn.Parameter)
            return replace(follower, params=layer.numel() // entries if is_parameter else 0)
        own = [p.numel() for p in layer._parameters.values() if p is not None]
        uses = sum(op.pixels for op in self._ops if op.layer == follower.layer)
        taps = max(own, default=0) // entries if uses else 0
        return replace(
            follower,
            params=sum(own) // entries,
            macs=taps * uses,
            is_norm=isinstance(layer, _BatchNorm),
        )

    def _fix(self, i: int, reason: str) -> None:
        if i != NONE:
            self._reasons.setdefault(i, reason)

    def _find(self, i: int) -> int:
        root = i
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[i] != root:
            self._parent[i], i = root, self._parent[i]
        return root

    def _union(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        self._parent[b] = a
