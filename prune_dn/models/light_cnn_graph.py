"""The channels of a Light CNN as a graph, and the config of what a cut leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from prune_dn.graph.types import NONE, OUTPUT, Competition, Graph, Ids, Op, Producer, Reader
from prune_dn.models.light_cnn_config import STAGES, LightCNNConfig, MFMConfig
from prune_dn.models.mfm import maps_left, operands_of


def light_cnn_graph(config: LightCNNConfig) -> Graph:
    """All channels of the net that `config` describes: filters, and the maps that MFM makes of them.

    Maps that are added up are tied; each pixel of the last maps is an input of the linear layer.

    >>> from prune_dn.models import light_cnn_9
    >>> graph = light_cnn_graph(light_cnn_9(10, image_size=32).config)
    >>> [c.module for c in graph.competitions][:2]
    ['features.0.mfm', 'features.2.conv_a.mfm']
    """
    named, count = config.named(), 0
    producers, readers, ops, competitions = [], [], [], []
    maps: dict[str, Ids] = {}
    ties: list[tuple[Ids, Ids]] = []

    def new(size: int) -> Ids:
        nonlocal count
        count += size
        return np.arange(count - size, count)

    for place, area in zip(config.places(), _pixels(config), strict=True):
        layer = named[place.name]
        read = np.full(config.in_channels, NONE) if place.reads is None else maps[place.reads]
        if not place.kernel:
            read = read.repeat(config.side**2)
        kernel = (place.kernel,) * 2 if place.kernel else ()
        ops.append(Op(place.name, kernel, 1, area, bias=True))
        readers.append(Reader(place.name, read, None))
        filters = new(layer.filters)
        producers.append(Producer(place.name, filters))
        made = filters
        if layer.filters > layer.units:
            made, module = new(layer.units), competition_of(place.name)
            operands = operands_of(filters, "2/1", layer.alone)
            competitions.append(Competition(module, operands, made[None], place.name, None))
        if place.joins is not None:
            ties.append((maps[place.joins], made))
        else:
            maps[place.name] = made
    readers.append(Reader("fc2", made, None))
    ops.append(Op("fc2", (), 1, 1, bias=config.variant != "29_v2"))
    answers = new(config.num_classes)
    producers.append(Producer("fc2", answers))
    classes = np.arange(count)
    for trunk, tied in ties:
        classes[tied] = trunk
    return Graph(
        tuple(producers),
        tuple(readers),
        (),
        tuple(ops),
        classes,
        dict.fromkeys(answers.tolist(), OUTPUT),
        (),
        competitions=tuple(competitions),
    )


def light_cnn_after(config: LightCNNConfig, kept: Mapping[str, Sequence[int]]) -> LightCNNConfig:
    """The config of what is left of `config`: `kept` as `Plan.keep_indices`, absent = all."""
    layers = []
    named = config.named()
    left: dict[str, Ids] = {}  # maps that stay, by the layer that makes them first
    for place, layer in zip(config.places(), config.layers, strict=True):
        root = place.joins or place.name
        if layer.filters == layer.units:  # a plain layer: its filters are those maps
            filters = left.get(root, kept.get(root, range(layer.filters)))
            units, kind, single = maps_left(
                layer.units, None, (), np.asarray(filters, dtype=np.intp)
            )
        else:
            filters = kept.get(competition_of(place.name), range(layer.filters))
            rows = np.asarray(filters, dtype=np.intp)
            units, kind, single = maps_left(named[place.name].units, "2/1", layer.alone, rows)
        left.setdefault(root, units)
        alone = single if kind is not None else tuple(range(len(units)))
        layers.append(MFMConfig(len(units), alone))
    return replace(config, layers=tuple(layers))


def competition_of(name: str) -> str:
    """The MFM behind a layer."""
    return name.removesuffix("filter") + "mfm"


def _pixels(config: LightCNNConfig) -> list[int]:
    """The output positions of each layer: maps are halved before the first three stages."""
    side = config.image_size
    found = [side]
    for stage, depth in enumerate(config.blocks, start=1):
        if stage < STAGES:
            side = side // 2 if config.variant == "29_v2" else -(-side // 2)
        found += [side] * (2 * depth + 2)
    return [side**2 for side in (*found, 1)]
