"""What can be cut: stream channels, edges, bottleneck channels and siblings, per stream.

All units of a net lie in one flat array, group by group. A boolean array over it, `keep`, says
what stays; `close` draws the exact consequences; `after` turns it into a `DenseNetConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from prune_dn.models import DenseNetConfig
from prune_dn.models.config import Indices, LayerConfig, TransitionConfig
from prune_dn.models.mfm import MFM_KINDS
from prune_dn.pruning.parts import Group, Kind, Mask, Pairs, Part, Positions, Stream


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
                sides = self._sides("read", positions, config.classifier_rivals)
                reader = Part("classifier", edges, None, None, positions, 0, b, None, sides)
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

        An edge of a cut channel goes; where what is read competes, the channel's side of its pair.
        What both siblings left goes, and siblings go with what they make up. A layer with nothing to read, no bottleneck or no output
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

    def after(self, keep: Mask) -> DenseNetConfig:
        """The description of what a closed `keep` leaves; stream positions are renumbered."""
        blocks, transitions = [], []
        for b, stream in enumerate(self.streams):
            alive = self._alive(stream, keep)
            new_position = np.cumsum(alive) - 1
            written = np.cumsum([0, *(_made_count(part, keep) for part in stream.producers)])
            layers = []
            for i, (part, old) in enumerate(zip(stream.layers, self.config.blocks[b], strict=True)):
                if _made_count(part, keep):
                    indices, rivals = _reads(part, keep, new_position, written[i + 1])
                    mfm, alone = _competition(part, keep, old.mfm)
                    layer = replace(
                        old,
                        out_channels=_made_count(part, keep),
                        bottleneck=None
                        if part.bottleneck is None
                        else _count(keep, part.bottleneck),
                        input_indices=indices,
                        mfm=mfm,
                        rival_indices=rivals,
                        mfm_alone=alone,
                    )
                    layers.append(layer)
            blocks.append(tuple(layers))
            indices, rivals = _reads(stream.reader, keep, new_position, written[-1])
            if b < len(self.config.transitions):
                count = _made_count(stream.reader, keep)
                mfm, alone = _competition(stream.reader, keep, self.config.transitions[b].mfm)
                transitions.append(TransitionConfig(count, indices, mfm, rivals, alone))
        return replace(
            self.config,
            num_init_features=_made_count(self.streams[0].writer, keep),
            blocks=tuple(blocks),
            transitions=tuple(transitions),
            classifier_indices=indices,
            classifier_rivals=rivals,
        )

    def _group(
        self,
        kind: Kind,
        name: str,
        size: int,
        siblings: int = 1,
        survivors: int = 1,
        alone: int = 0,
    ) -> Group:
        group = Group(kind, name, self.size, size, siblings, survivors, alone)
        self.groups.append(group)
        self.size += size
        return group

    def _layer(self, block: int, layer: LayerConfig, width: int) -> Part:
        name = f"features.denseblock{block}.{layer.name}"
        positions = _positions(layer.input_indices, width)
        edges = self._group("edge", f"{name}.norm1", len(positions))
        sides = self._sides(f"{name}.read", positions, layer.rival_indices)
        narrow = None
        if layer.bottleneck is not None:
            narrow = self._group("bottleneck", f"{name}.conv1", layer.bottleneck)
        made = self._made(f"{name}.conv1" if narrow is None else f"{name}.conv2", layer)
        siblings = self._siblings(f"{name}.mfm", layer, width)
        return Part(name, edges, narrow, made, positions, width, block, siblings, sides)

    def _transition(self, block: int, transition: TransitionConfig, width: int) -> Part:
        name = f"features.transition{block}"
        positions = _positions(transition.input_indices, width)
        edges = self._group("edge", f"{name}.norm", len(positions))
        sides = self._sides(f"{name}.read", positions, transition.rival_indices)
        made = self._made(f"{name}.conv", transition)
        siblings = self._siblings(f"{name}.mfm", transition, 0)
        return Part(name, edges, None, made, positions, 0, block, siblings, sides)

    def _made(self, name: str, part: LayerConfig | TransitionConfig) -> Group:
        siblings, survivors = (1, 1) if part.mfm is None else MFM_KINDS[part.mfm]
        size, alone = part.out_channels // survivors, len(part.mfm_alone)
        return self._group("stream", name, size, siblings, survivors, alone)

    def _siblings(
        self, name: str, part: LayerConfig | TransitionConfig, offset: int
    ) -> Pairs | None:
        """Those of an MFM 2/1. (Of three siblings none can go alone.)"""
        if part.mfm != "2/1":
            return None
        paired = np.delete(np.arange(part.out_channels), list(part.mfm_alone))
        return self._pairs(name, offset + np.arange(part.out_channels), offset + paired, paired)

    def _sides(self, name: str, leads: Positions, rivals: Indices) -> Pairs | None:
        if rivals is None:
            return None
        paired = np.flatnonzero(leads != np.asarray(rivals))
        return self._pairs(name, leads, np.asarray(rivals)[paired], paired)

    def _pairs(self, name: str, firsts: Positions, seconds: Positions, paired: Positions) -> Pairs:
        """`paired`: the pairs that have a second sibling, in the order of the seconds."""
        group = self._group("sibling", name, len(firsts) + len(seconds))
        own = np.arange(len(firsts))
        second = own.copy()
        second[paired] = len(firsts) + np.arange(len(paired))
        return Pairs(
            group, np.concatenate([own, paired]), second, np.concatenate([firsts, seconds])
        )

    def _alive(self, stream: Stream, keep: Mask) -> Mask:
        """Which stream channels are made."""
        alive = np.zeros(stream.width, dtype=bool)
        for part in stream.producers:
            assert part.stream is not None
            alive[part.made()] = keep[part.stream.units]
        return alive

    def _lose_sources(self, stream: Stream, keep: Mask) -> None:
        for part in stream.producers:
            if part.siblings is not None and part.stream is not None:
                part.siblings.agree(keep, part.stream)
        alive = self._alive(stream, keep)
        for part in stream.readers:
            assert part.edges is not None
            readings, positions = part.readings
            keep[readings.units] &= alive[positions]
            if part.sides is not None:
                part.sides.agree(keep, part.edges)
            if part.is_dense_layer and not all(_count(keep, g) for g in part.groups):
                for group in part.groups:
                    keep[group.units] = False
                alive[part.made()] = False

    def _lose_readers(self, stream: Stream, keep: Mask) -> None:
        read = np.zeros(stream.width, dtype=bool)
        for part in (*reversed(stream.readers), stream.writer):
            if part.stream is not None and part is not stream.reader:
                keep[part.stream.units] &= read[part.made()].any(axis=0)
                if part.is_dense_layer and not _count(keep, part.stream):
                    for group in part.groups:
                        keep[group.units] = False
            if part.edges is not None and part is not stream.writer:
                readings, positions = part.readings
                read[positions] |= keep[readings.units]


def _positions(indices: Indices, width: int) -> Positions:
    return np.arange(width) if indices is None else np.asarray(indices, dtype=np.intp)


def _count(keep: Mask, group: Group) -> int:
    return int(np.count_nonzero(keep[group.units]))


def _made_count(part: Part, keep: Mask) -> int:
    assert part.stream is not None
    return _count(keep, part.stream) * part.stream.survivors


def _reads(part: Part, keep: Mask, new_position: Positions, width: int) -> tuple[Indices, Indices]:
    """New stream positions that a reader reads, and their rivals.

    The positions are None when all `width` of them are read as they are, the rivals when nobody
    competes (any more).
    """
    assert part.edges is not None
    if part.sides is None:
        kept = new_position[part.positions[keep[part.edges.units]]]
        return (None if len(kept) == width else tuple(kept.tolist())), None
    leads, rivals = (new_position[part.sides.positions[side]] for side in part.sides.left(keep))
    order = np.argsort(leads)
    indices, against = tuple(leads[order].tolist()), tuple(rivals[order].tolist())
    if indices != against:
        return indices, against
    return (None if len(indices) == width else indices), None


def _competition(part: Part, keep: Mask, mfm: str | None) -> tuple[str | None, tuple[int, ...]]:
    """The MFM on what a part makes, and its units that stand alone; none when all of them do."""
    if part.siblings is None:
        return mfm, ()
    firsts, seconds = part.siblings.left(keep)
    alone = np.flatnonzero(firsts == seconds)
    return (None, ()) if len(alone) == len(firsts) else (mfm, tuple(alone.tolist()))
