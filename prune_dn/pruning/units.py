"""What can be cut: channels, edges and siblings, of any net that has a graph.

All units of a net lie in one flat array, group by group, in the order in which the net runs. A boolean
array over it, `keep`, says what stays; `close` draws the exact consequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from prune_dn.graph.classes import Classes, channel_classes
from prune_dn.graph.types import NONE, Competition, Graph, Ids, Reader
from prune_dn.pruning.config import Kind
from prune_dn.pruning.parts import STAYS, Block, Group, Mask, Pairs, Positions, Scores, Selection


class Units:
    """All units of the net whose channels `graph` describes.

    `unit_of` is the channel unit of each id, `sibling_of` the sibling that it is, STAYS where there is
    none. `is_read` marks channel units of which some layer reads all that is left. `connection` is the
    number of the connection that each edge belongs to, NONE for all other units: the edges from what one
    layer makes to one reader. What competes before a reader has none, as two layers may make it. `moved`
    says which unit lies in the new net where each would lie in its old order (see `arrange`).
    """

    def __init__(self, graph: Graph, places: Mapping[str, Positions] | None = None) -> None:
        """`places` as `paired` gives them."""
        self.graph, self._places = graph, places or {}
        self.groups: list[Group] = []
        self.selections: list[Selection] = []
        self.pairs: list[Pairs] = []
        self.size = 0
        self._whole, groups = channel_classes(graph)
        self.unit_of, self.sibling_of = (np.full(len(graph.ties), STAYS) for _ in range(2))
        readers = {reader.layer: reader for reader in graph.readers}
        made = {c.maker: c for c in graph.competitions if c.maker is not None}
        read = {c.reader: c for c in graph.competitions if c.reader is not None}
        starting: dict[str, list[Classes]] = {}
        for classes in groups:
            starting.setdefault(classes.maker, []).append(classes)
        several = self._read_often()
        by_layer: dict[str, list[Group]] = {}
        for producer in graph.producers:
            name, start = producer.layer, len(self.groups)
            reader = readers.get(name)
            if reader is not None and reader.stream is not None:
                self._select(reader, read.get(name))
            for classes in starting.get(name, ()):
                self._channels(classes, made.get(name), several)
            if name in made and len(made[name].operands) == 2:
                self._siblings(made[name])
            by_layer[name] = self.groups[start:]
        self.blocks = [
            Block(
                block.name,
                block.layers,
                tuple(group for layer in block.layers for group in by_layer[layer]),
                next(g for g in by_layer[block.layers[-1]] if g.kind == "stream"),
            )
            for block in graph.blocks
        ]
        self._index(graph)

    def of_kinds(self, kinds: tuple[str, ...]) -> Mask:
        """Which units may be asked for by these names, (units,): `connection` stands for its edges."""
        names = np.array([group.kind for group in self.groups])[self.group_of]
        found: Mask = np.isin(names, kinds)
        return found | (self.connection != NONE) if "connection" in kinds else found

    def unit(self, ids: Ids) -> Positions:
        """The channel unit of each id; STAYS where it belongs to none."""
        return np.where(ids == NONE, STAYS, self.unit_of[ids])

    def made_by(self, ids: Ids) -> Positions:
        """What goes alone of each id that a layer makes: the sibling, or else the channel unit."""
        sibling = self.sibling_of[ids]
        return np.where(sibling == STAYS, self.unit_of[ids], sibling)

    def close(self, keep: Mask) -> Mask:
        """Draw the exact consequences of a cut, until nothing more follows.

        An edge of a cut channel goes; where what is read competes, the channel's side of its pair.
        What both siblings left goes, and siblings go with what they make up. A block with nothing to
        read, no bottleneck or no output goes whole. A channel that nobody reads goes.
        """
        keep = keep.copy()
        while True:
            before = np.count_nonzero(keep)
            for pairs in self.pairs:
                if pairs.maker is not None:
                    pairs.agree(keep)
            keep[self.reads] &= (self.source == STAYS) | keep[self.source]
            for pairs in self.pairs:
                if pairs.reader is not None:
                    pairs.agree(keep)
            if self.blocks:
                sums = np.concatenate([[0], np.cumsum(keep)])
                left = sums[self._stops] - sums[self._starts]
                empty = np.bincount(self._owners, left == 0, len(self.blocks)) > 0
                keep &= ~(empty[self.block_of] & (self.block_of >= 0))
            read = self.is_read.copy()
            source = self.source[keep[self.reads]]
            read[source[source != STAYS]] = True
            keep &= read | ~self.is_channel
            if np.count_nonzero(keep) == before:
                return keep

    def outputs(self, layer: str, ids: Ids, keep: Mask) -> Positions:
        """Which outputs of a layer stay, in their new order: of pairs the first ones, then the second."""
        pairs = next((p for p in self.pairs if p.maker == layer), None)
        if pairs is None:
            return self.kept(self.made_by(ids), keep)
        firsts, seconds = pairs.left(keep)
        return np.concatenate([firsts, seconds[seconds != firsts]])

    def inputs(self, reader: Reader, keep: Mask) -> Positions:
        """Which inputs of a layer stay, in their new order."""
        selection = next((s for s in self.selections if s.reader is reader), None)
        if selection is None:
            return self.kept(self.unit(reader.channels), keep)
        place = np.full(selection.edges.size, len(selection.edge_at))
        order, _ = self.selected(selection, keep)
        place[order] = np.arange(len(order))
        kept = np.flatnonzero(keep[selection.edges.start + selection.edge_at])
        return kept[np.argsort(place[selection.edge_at[kept]], kind="stable")]

    def kept(self, units: Positions, keep: Mask) -> Positions:
        """Which channels stay of a tensor, in their new order; `units` are theirs."""
        left = np.flatnonzero((units == STAYS) | keep[units])
        mine = units[left]
        moved = np.where(mine == STAYS, STAYS, self.moved[mine])
        kept = (
            left.copy()
        )  # the n-th channel that is a unit comes where that is wanted for the n-th time
        kept[np.argsort(moved, kind="stable")] = left[np.argsort(mine, kind="stable")]
        return kept

    def selected(self, selection: Selection, keep: Mask) -> tuple[Positions, Positions]:
        """The edges of a reader that stay, counted from their start, in their new order: by what they read
        first; and where that lies in what is left of the stream."""
        stream = self.kept(selection.stream, keep)
        place = np.zeros(len(selection.stream), dtype=np.int64)
        place[stream] = np.arange(len(stream))
        kept = np.flatnonzero(keep[selection.edges.units])
        firsts = kept if selection.sides is None else selection.sides.left(keep)[0]
        found = place[selection.positions[firsts]]
        order = np.argsort(found, kind="stable")
        return kept[order], found[order]

    def paired(self, scores: Scores) -> tuple[Units, Positions]:
        """The units of which each block of a grouped convolution gives up one at a time.

        What has the same place in the order of `scores` in all blocks becomes one unit. Also gives the new
        unit of each of these, (units,).
        """
        places = {}
        for group in self.groups:
            if group.blocks > 1:
                order = np.argsort(scores[group.units].reshape(group.blocks, -1), 1, "stable")
                places[group.name] = np.argsort(order, axis=1).ravel()
        if not places:
            return self, np.arange(self.size)
        table = Units(self.graph, places)
        new = [mine.start + places.get(mine.name, np.arange(mine.size)) for mine in table.groups]
        return table, np.concatenate(new)

    def _group(self, kind: Kind, name: str, size: int, **more: int) -> Group:
        group = Group(kind, name, self.size, size, **more)
        self.groups.append(group)
        self.size += size
        return group

    def _read_often(self) -> Mask:
        """Whether several layers read a class, or a reader selects from it: it is of a stream."""
        often, once = (np.zeros(len(self._whole), dtype=bool) for _ in range(2))
        for reader in self.graph.readers:
            ids = reader.channels if reader.stream is None else reader.stream
            classes = np.unique(self._whole[ids[ids != NONE]])
            often[classes] |= once[classes] | (reader.stream is not None)
            once[classes] = True
        return often

    def _select(self, reader: Reader, competition: Competition | None) -> None:
        """The edges of a reader, one for each id that it reads."""
        assert reader.select is not None and reader.stream is not None
        ids = reader.channels
        ids = np.where(ids == NONE, -1 - np.arange(len(ids)), ids)
        _, first, edge_at = np.unique(ids, return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))  # in the order in which they are read
        first, edge_at = np.sort(first), place[edge_at.ravel()]
        edges = self._group("edge", reader.select, len(first))
        where = {int(c): i for i, c in reversed(list(enumerate(reader.stream.tolist())))}
        sides = None
        if competition is None:
            read = reader.channels[first]
        else:
            leads, rivals = competition.operands
            paired = np.flatnonzero(leads != rivals)
            read = np.concatenate([leads, rivals[paired]])
            sides = self._pairs(competition, edges, paired)
        positions = np.array([where[int(c)] for c in read], dtype=np.int64)
        self.selections.append(
            Selection(
                reader, edges, sides, positions, self.unit(read), self.unit(reader.stream), edge_at
            )
        )

    def _channels(self, classes: Classes, competition: Competition | None, often: Mask) -> None:
        rows, more = classes.rows, {"blocks": len(classes.rows)}
        place = np.arange(rows.size)
        if classes.name in self._places:
            place = self._places[classes.name]
        if competition is not None:
            leads, *others = competition.operands
            more["siblings"], more["survivors"] = len(others) + 1, len(competition.results)
            more["alone"] = int(np.sum(leads == others[0]))
        kind: Kind = "stream" if often[rows].any() or classes.is_tied else "bottleneck"
        group = self._group(kind, classes.name, int(place.max()) + 1, **more)
        unit = np.full(len(self._whole), STAYS)
        unit[rows.ravel()] = group.start + place
        found = unit[self._whole]
        self.unit_of = np.where(found == STAYS, self.unit_of, found)

    def _siblings(self, competition: Competition) -> None:
        units = self.unit(competition.results[0])
        whole = next(g for g in self.groups if g.start <= units[0] < g.start + g.size)
        leads, rivals = competition.operands
        paired = np.flatnonzero(leads != rivals)
        pairs = self._pairs(competition, whole, paired)
        operands = np.concatenate([leads, rivals[paired]])
        self.sibling_of[operands] = np.arange(pairs.group.start, self.size)

    def _pairs(self, competition: Competition, whole: Group, paired: Positions) -> Pairs:
        """`paired`: the pairs that have a second sibling, in the order of the seconds."""
        count = whole.size
        group = self._group("sibling", competition.module, count + len(paired))
        second = np.arange(count)
        second[paired] = count + np.arange(len(paired))
        owner = np.concatenate([np.arange(count), paired])
        pairs = Pairs(group, whole, owner, second, competition.maker, competition.reader)
        self.pairs.append(pairs)
        return pairs

    def _makers(self) -> Positions:
        """The number of the first layer that makes each id, (ids,)."""
        maker = np.full(len(self.graph.ties), NONE)
        for number, producer in enumerate(self.graph.producers):
            maker[producer.channels] = number
        for competition in self.graph.competitions:
            if competition.maker is not None:
                maker[competition.results] = maker[competition.operands[0, 0]]
        return maker[self.graph.ties]

    def _index(self, graph: Graph) -> None:
        """Flat arrays over all units."""
        reads = [np.arange(s.readings.start, s.readings.units.stop) for s in self.selections]
        empty = [np.zeros(0, dtype=np.int64)]
        self.reads = np.concatenate([*reads, *empty])  # what reads one channel each
        self.source = np.concatenate([*(s.sources for s in self.selections), *empty])  # and which
        self.is_channel, self.is_read = (np.zeros(self.size, dtype=bool) for _ in range(2))
        self.group_of = np.repeat(np.arange(len(self.groups)), [g.size for g in self.groups])
        for group in self.groups:
            self.is_channel[group.units] = group.kind in ("stream", "bottleneck")
        for reader in graph.readers:
            if reader.stream is None:
                units = self.unit(reader.channels)
                self.is_read[units[units != STAYS]] = True
        self.moved = np.arange(self.size)
        self.connection = np.full(self.size, NONE)
        maker = self._makers()
        for number, selection in enumerate(self.selections):
            if selection.sides is None:
                assert selection.reader.stream is not None
                made = maker[selection.reader.stream[selection.positions]]
                self.connection[selection.edges.units] = number * len(graph.producers) + made
        # The block that each unit belongs to, and whose output it is; -1 = none.
        self.block_of, self.output_of = (np.full(self.size, -1) for _ in range(2))
        self._starts, self._stops, self._owners = (np.zeros(0, dtype=np.int64) for _ in range(3))
        spans = [(g, n) for n, block in enumerate(self.blocks) for g in block.groups]
        if spans:
            self._starts = np.array([g.start for g, _ in spans])
            self._stops = np.array([g.units.stop for g, _ in spans])
            self._owners = np.array([n for _, n in spans])
        for group, number in spans:
            self.block_of[group.units] = number
        for number, block in enumerate(self.blocks):
            self.output_of[block.output.units] = number


def layers(units: Units) -> Iterator[tuple[str, Positions, Positions]]:
    """Each layer with weights, and which unit each of its outputs and inputs is."""
    readers = {reader.layer: reader for reader in units.graph.readers}
    selections = {s.reader.layer: s for s in units.selections}
    for producer in units.graph.producers:
        name, reader = producer.layer, readers[producer.layer]
        selection = selections.get(name)
        if selection is None:
            inputs = units.unit(reader.channels)
        else:
            inputs = selection.edges.start + selection.edge_at
        yield name, units.made_by(producer.channels), inputs
