"""What can be cut: stream channels, edges and bottleneck channels, per stream.

All units of a net lie in one flat array, group by group. A boolean array over it, `keep`, says
what stays; `close` draws the exact consequences; `after` turns it into a `DenseNetConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from prune_dn.models import DenseNetConfig
from prune_dn.models.config import Indices, LayerConfig, TransitionConfig
from prune_dn.models.mfm import MFM_KINDS
from prune_dn.profiling import Widths

Kind = Literal["stream", "bottleneck", "edge"]
KINDS: tuple[Kind, ...] = ("stream", "bottleneck", "edge")
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Group:
    """Units of one kind in one module; `name` is the module whose channels they are.

    stream: a conv's filters (an MFM unit has `siblings` filters and makes `survivors` channels);
    bottleneck: conv1's filters; edge: the channels of a reader's norm.
    """

    kind: Kind
    name: str
    start: int
    size: int
    siblings: int = 1
    survivors: int = 1

    @property
    def units(self) -> slice:
        """Where the units lie in the flat array."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Part:
    """A stem, dense layer, transition or classifier: what it reads and what it makes.

    `positions` are the stream positions that it reads (edge i reads positions[i]); `offset` is
    where its own channels begin in the stream that it writes. `block` counts dense blocks from 1:
    the one that it is in, or that a transition or classifier reads; 0 = the stem.
    """

    name: str
    edges: Group | None
    bottleneck: Group | None
    stream: Group | None
    positions: Positions
    offset: int
    block: int

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


class Units:
    """All units of the net that `config` describes."""

    def __init__(self, config: DenseNetConfig) -> None:
        self.config = config
        self.groups: list[Group] = []
        self.streams: list[Stream] = []
        self.size = 0
        width = config.num_init_features
        stem = self._group("stream", "features.conv0", width)
        writer = Part("features.conv0", None, None, stem, np.arange(0), 0, 0)
        for b, block in enumerate(config.blocks, start=1):
            layers = []
            for layer in block:
                layers.append(self._layer(b, layer, width))
                width += layer.out_channels
            if b <= len(config.transitions):
                reader = self._transition(b, config.transitions[b - 1], width)
            else:
                positions = _positions(config.classifier_indices, width)
                edges = self._group("edge", "features.norm5", len(positions))
                reader = Part("classifier", edges, None, None, positions, 0, b)
            self.streams.append(Stream(width, writer, tuple(layers), reader))
            if reader.stream is not None:
                width, writer = config.transitions[b - 1].out_channels, reader

    def parts(self) -> Iterator[Part]:
        """Stem, layers, transitions, classifier, in the order in which they run."""
        yield self.streams[0].writer
        for stream in self.streams:
            yield from stream.readers

    def close(self, keep: Mask) -> Mask:
        """Draw the exact consequences of a cut, until nothing more follows.

        An edge of a cut channel goes. A layer with nothing to read, no bottleneck or no output
        goes whole. A stream channel that nobody reads goes. Stem, transitions and classifier stay.
        """
        keep = keep.copy()
        while True:
            for stream in self.streams:
                self._lose_sources(stream, keep)
            before = np.count_nonzero(keep)
            for stream in reversed(self.streams):
                self._lose_readers(stream, keep)
            if np.count_nonzero(keep) == before:
                return keep

    def widths(self, keep: Mask) -> dict[str, Widths]:
        """The widths that remain; a layer that went whole is not in it."""
        widths = {}
        for part in self.parts():
            read = self.config.in_channels if part.edges is None else _count(keep, part.edges)
            made = self.config.num_classes
            if part.stream is not None:
                made = _count(keep, part.stream) * part.stream.siblings
            narrow = None if part.bottleneck is None else _count(keep, part.bottleneck)
            if made:
                widths[part.name] = Widths(read, narrow, made)
        return widths

    def after(self, keep: Mask) -> DenseNetConfig:
        """The description of what a closed `keep` leaves; stream positions are renumbered."""
        blocks, transitions = [], []
        classifier_indices: Indices = None
        for b, stream in enumerate(self.streams):
            alive = self._alive(stream, keep)
            new_position = np.cumsum(alive) - 1
            written = np.cumsum([0, *(_made_count(part, keep) for part in stream.producers)])
            layers = []
            for i, (part, old) in enumerate(zip(stream.layers, self.config.blocks[b], strict=True)):
                if _made_count(part, keep):
                    layer = replace(
                        old,
                        out_channels=_made_count(part, keep),
                        bottleneck=None
                        if part.bottleneck is None
                        else _count(keep, part.bottleneck),
                        input_indices=_indices(part, keep, new_position, written[i + 1]),
                    )
                    layers.append(layer)
            blocks.append(tuple(layers))
            indices = _indices(stream.reader, keep, new_position, written[-1])
            if b < len(self.config.transitions):
                count = _made_count(stream.reader, keep)
                old_transition = self.config.transitions[b]
                transitions.append(
                    replace(old_transition, out_channels=count, input_indices=indices)
                )
            else:
                classifier_indices = indices
        return replace(
            self.config,
            num_init_features=_made_count(self.streams[0].writer, keep),
            blocks=tuple(blocks),
            transitions=tuple(transitions),
            classifier_indices=classifier_indices,
        )

    def _group(
        self, kind: Kind, name: str, size: int, siblings: int = 1, survivors: int = 1
    ) -> Group:
        group = Group(kind, name, self.size, size, siblings, survivors)
        self.groups.append(group)
        self.size += size
        return group

    def _layer(self, block: int, layer: LayerConfig, width: int) -> Part:
        name = f"features.denseblock{block}.{layer.name}"
        positions = _positions(layer.input_indices, width)
        edges = self._group("edge", f"{name}.norm1", len(positions))
        narrow = None
        if layer.bottleneck is not None:
            narrow = self._group("bottleneck", f"{name}.conv1", layer.bottleneck)
        last = f"{name}.conv1" if narrow is None else f"{name}.conv2"
        return Part(name, edges, narrow, self._made(last, layer), positions, width, block)

    def _transition(self, block: int, transition: TransitionConfig, width: int) -> Part:
        name = f"features.transition{block}"
        positions = _positions(transition.input_indices, width)
        edges = self._group("edge", f"{name}.norm", len(positions))
        return Part(name, edges, None, self._made(f"{name}.conv", transition), positions, 0, block)

    def _made(self, name: str, part: LayerConfig | TransitionConfig) -> Group:
        siblings, survivors = (1, 1) if part.mfm is None else MFM_KINDS[part.mfm]
        return self._group("stream", name, part.out_channels // survivors, siblings, survivors)

    def _alive(self, stream: Stream, keep: Mask) -> Mask:
        """Which stream channels are made."""
        alive = np.zeros(stream.width, dtype=bool)
        for part in stream.producers:
            assert part.stream is not None
            alive[part.made()] = keep[part.stream.units]
        return alive

    def _lose_sources(self, stream: Stream, keep: Mask) -> None:
        alive = self._alive(stream, keep)
        for part in stream.readers:
            assert part.edges is not None
            keep[part.edges.units] &= alive[part.positions]
            if part.is_dense_layer and not all(_count(keep, g) for g in _groups(part)):
                for group in _groups(part):
                    keep[group.units] = False
                alive[part.made()] = False

    def _lose_readers(self, stream: Stream, keep: Mask) -> None:
        read = np.zeros(stream.width, dtype=bool)
        for part in (*reversed(stream.readers), stream.writer):
            if part.stream is not None and part is not stream.reader:
                keep[part.stream.units] &= read[part.made()].any(axis=0)
                if part.is_dense_layer and not _count(keep, part.stream):
                    for group in _groups(part):
                        keep[group.units] = False
            if part.edges is not None and part is not stream.writer:
                read[part.positions] |= keep[part.edges.units]


def _groups(part: Part) -> list[Group]:
    return [g for g in (part.edges, part.bottleneck, part.stream) if g is not None]


def _positions(indices: Indices, width: int) -> Positions:
    return np.arange(width) if indices is None else np.asarray(indices, dtype=np.intp)


def _count(keep: Mask, group: Group) -> int:
    return int(np.count_nonzero(keep[group.units]))


def _made_count(part: Part, keep: Mask) -> int:
    assert part.stream is not None
    return _count(keep, part.stream) * part.stream.survivors


def _indices(part: Part, keep: Mask, new_position: Positions, width: int) -> Indices:
    """New stream positions that a reader reads; None when it reads all `width` of them."""
    assert part.edges is not None
    kept = new_position[part.positions[keep[part.edges.units]]]
    return None if len(kept) == width else tuple(kept.tolist())
