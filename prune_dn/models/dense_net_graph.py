"""The channels of a DenseNet as a graph, and the config of what a cut leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from prune_dn.errors import ConfigError
from prune_dn.graph.types import (
    NONE,
    OUTPUT,
    Block,
    Competition,
    Follower,
    Graph,
    Ids,
    Op,
    Producer,
    Reader,
)
from prune_dn.models.config import DenseNetConfig, Indices, LayerConfig, TransitionConfig
from prune_dn.models.families import default_image_size
from prune_dn.models.mfm import MFM_KINDS, maps_left, operands_of, owners
from prune_dn.models.sizes import ImageSize, sides

Kept = Mapping[str, Sequence[int]]


def dense_net_graph(config: DenseNetConfig, image_size: ImageSize | None = None) -> Graph:
    """All channels of the net that `config` describes, with the pixels of one image.

    `image_size` as in `prune_dn.count`.

    >>> from prune_dn.models import densenet40
    >>> graph = dense_net_graph(densenet40().config)
    >>> graph.readers[1].layer, len(graph.readers[1].channels)
    ('features.denseblock1.denselayer1.conv1', 24)
    """
    return _Drawing(config, image_size).graph()


class _Drawing:
    """A graph that is being drawn, from the stem to the classifier."""

    def __init__(self, config: DenseNetConfig, image_size: ImageSize | None) -> None:
        self.config = config
        self.count = 0
        self.producers: list[Producer] = []
        self.readers: list[Reader] = []
        self.followers: list[Follower] = []
        self.ops: list[Op] = []
        self.ties: list[Ids] = []
        self.competitions: list[Competition] = []
        self.blocks: list[Block] = []
        sizes = sides(default_image_size(config) if image_size is None else image_size)
        stem_area, areas = _pixels(config, *sizes)
        stem = 3 if config.stem == "cifar" else 7
        image = np.full(config.in_channels, NONE)
        self._read("features.conv0", image, None, None, stem, stem_area)
        stream = self._produce("features.conv0", config.num_init_features)
        if config.stem == "imagenet":
            self._norm("features.norm0", stream, stem_area)
        for b, (layers, area) in enumerate(zip(config.blocks, areas, strict=True), start=1):
            for layer in layers:
                made = self._layer(f"features.denseblock{b}.{layer.name}", layer, stream, area)
                stream = np.concatenate([stream, made])
            if b <= len(config.transitions):
                transition, name = config.transitions[b - 1], f"features.transition{b}"
                self._select(name, f"{name}.conv", f"{name}.norm", stream, transition, 1, area)
                stream = self._make(name, f"{name}.conv", transition)
        last = LayerConfig("", 1, None, config.classifier_indices, None, config.classifier_rivals)
        self._select("", "classifier", "features.norm5", stream, last, 0, area)
        self.answers = self._produce("classifier", config.num_classes)

    def graph(self) -> Graph:
        ties = np.arange(self.count)
        for column in self.ties:
            ties[column] = column.min(axis=0)
        return Graph(
            tuple(self.producers),
            tuple(self.readers),
            tuple(self.followers),
            tuple(self.ops),
            ties,
            dict.fromkeys(self.answers.tolist(), OUTPUT),
            (),
            competitions=tuple(self.competitions),
            blocks=tuple(self.blocks),
        )

    def _layer(self, name: str, layer: LayerConfig, stream: Ids, area: int) -> Ids:
        kernel = 3 if layer.bottleneck is None else 1
        self._select(name, f"{name}.conv1", f"{name}.norm1", stream, layer, kernel, area)
        if layer.bottleneck is None:
            self.blocks.append(Block(name, (f"{name}.conv1",)))
            return self._make(name, f"{name}.conv1", layer)
        narrow = self._produce(f"{name}.conv1", layer.bottleneck)
        self._norm(f"{name}.norm2", narrow, area)
        self._read(f"{name}.conv2", narrow, f"{name}.norm2", None, 3, area)
        self.blocks.append(Block(name, (f"{name}.conv1", f"{name}.conv2")))
        return self._make(name, f"{name}.conv2", layer)

    def _select(
        self,
        name: str,
        layer: str,
        norm: str,
        stream: Ids,
        part: LayerConfig | TransitionConfig,
        kernel: int,
        area: int,
    ) -> None:
        """A norm and the layer behind it read what they select of the stream, or its competition."""
        indices, rivals = part.input_indices, part.rival_indices
        read = stream if indices is None else stream[list(indices)]
        if rivals is not None:
            module = f"{name}.read" if name else "read"
            results = self._new(len(read))
            operands = np.stack([read, stream[list(rivals)]])
            self.competitions.append(Competition(module, operands, results[None], None, layer))
            read = results
        self._norm(norm, read, area)
        self._read(layer, read, norm, stream, kernel, area)

    def _make(self, name: str, conv: str, part: LayerConfig | TransitionConfig) -> Ids:
        """The filters of a layer's last conv, and the maps that join the stream."""
        filters = self._produce(conv, part.filters)
        if part.mfm is None:
            return filters
        survivors = MFM_KINDS[part.mfm][1]
        results = self._new(part.out_channels).reshape(survivors, -1)
        operands = operands_of(filters, part.mfm, part.mfm_alone)
        if survivors == 2:  # no sibling of three can go alone
            self.ties += [operands, results]
        self.competitions.append(Competition(f"{name}.mfm", operands, results, conv, None))
        return results.ravel()

    def _new(self, count: int) -> Ids:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _produce(self, layer: str, count: int) -> Ids:
        self.producers.append(Producer(layer, self._new(count)))
        return self.producers[-1].channels

    def _read(
        self, layer: str, ids: Ids, select: str | None, stream: Ids | None, kernel: int, area: int
    ) -> None:
        self.readers.append(Reader(layer, ids, select, stream, area))
        taps = (kernel, kernel) if kernel else ()
        self.ops.append(Op(layer, taps, 1, area if kernel else 1, bias=not kernel))

    def _norm(self, layer: str, ids: Ids, area: int) -> None:
        self.followers.append(Follower(layer, ids, params=2, pixels=area, is_norm=True))


def dense_net_after(config: DenseNetConfig, kept: Kept) -> DenseNetConfig:
    """The config of what is left of `config`: `kept` as `Plan.keep_indices`, absent = all.

    Stream positions are renumbered. A dense layer that keeps no filter goes whole.
    """

    def left(name: str, count: int) -> np.ndarray:
        return np.asarray(kept.get(name, range(count)), dtype=np.intp)

    stream = left("features.conv0", config.num_init_features)  # positions that stay
    num_init_features, width = len(stream), config.num_init_features
    blocks, transitions = [], []
    for b, layers in enumerate(config.blocks, start=1):
        after = []
        for layer in layers:
            name = f"features.denseblock{b}.{layer.name}"
            last = f"{name}.conv1" if layer.bottleneck is None else f"{name}.conv2"
            units, mfm, alone = maps_left(
                layer.out_channels, layer.mfm, layer.mfm_alone, left(last, layer.filters)
            )
            if len(units):
                indices, rivals = _read(layer, width, stream, left, f"{name}.norm1", f"{name}.read")
                narrow = layer.bottleneck
                after.append(
                    replace(
                        layer,
                        out_channels=len(units),
                        bottleneck=None if narrow is None else len(left(f"{name}.conv1", narrow)),
                        input_indices=indices,
                        mfm=mfm,
                        rival_indices=rivals,
                        mfm_alone=alone,
                    )
                )
            stream = np.concatenate([stream, width + units])
            width += layer.out_channels
        blocks.append(tuple(after))
        if b <= len(config.transitions):
            transition, name = config.transitions[b - 1], f"features.transition{b}"
            units, mfm, alone = maps_left(
                transition.out_channels,
                transition.mfm,
                transition.mfm_alone,
                left(f"{name}.conv", transition.filters),
            )
            indices, rivals = _read(transition, width, stream, left, f"{name}.norm", f"{name}.read")
            transitions.append(TransitionConfig(len(units), indices, mfm, rivals, alone))
            stream, width = units, transition.out_channels
    last_read = LayerConfig("", 1, None, config.classifier_indices, None, config.classifier_rivals)
    indices, rivals = _read(last_read, width, stream, left, "features.norm5", "read")
    return replace(
        config,
        num_init_features=num_init_features,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        classifier_indices=indices,
        classifier_rivals=rivals,
    )


def _read(
    part: LayerConfig | TransitionConfig,
    width: int,
    stream: np.ndarray,
    left: Callable[[str, int], np.ndarray],
    norm: str,
    module: str,
) -> tuple[Indices, Indices]:
    """New stream positions that a reader reads, and their rivals.

    The positions are None when all of the stream is read as it is, the rivals when nobody competes
    (any more). `stream` are the old positions that stay, of `width`.
    """
    new_position = np.full(width, NONE)
    new_position[stream] = np.arange(len(stream))
    leads = np.arange(width) if part.input_indices is None else np.asarray(part.input_indices)
    kept = left(norm, len(leads))
    if part.rival_indices is None:
        indices = tuple(new_position[leads[kept]].tolist())
        return (None if len(indices) == len(stream) else indices), None
    paired = np.flatnonzero(leads != np.asarray(part.rival_indices))
    owner = owners(len(leads), paired)
    operands = left(module, len(owner))
    positions = np.concatenate([leads, np.asarray(part.rival_indices)[paired]])[operands]
    firsts = new_position[positions[: len(kept)]]
    seconds = firsts.copy()
    of_first = {int(o): i for i, o in enumerate(owner[operands[: len(kept)]])}
    where = [of_first[int(o)] for o in owner[operands[len(kept) :]]]
    seconds[where] = new_position[positions[len(kept) :]]
    indices, rivals = tuple(firsts.tolist()), tuple(seconds.tolist())
    if indices != rivals:
        return indices, rivals
    return (None if len(indices) == len(stream) else indices), None


def _pixels(config: DenseNetConfig, height: int, width: int) -> tuple[int, list[int]]:
    """Output pixels of the first conv, and pixels of each block's stream.

    Raises ConfigError where the image is too small.
    """
    given, first = f"{height}x{width}", height * width
    if config.stem == "imagenet":
        first = -(-height // 2) * -(-width // 2)
        height, width = (height + 3) // 4, (width + 3) // 4
    pixels = []
    for _ in config.blocks:
        if height < 1 or width < 1:
            raise ConfigError(
                f"images of {given} pixels are too small for {len(config.blocks)} blocks with a "
                f"{config.stem} stem"
            )
        pixels.append(height * width)
        height, width = height // 2, width // 2
    return first, pixels
