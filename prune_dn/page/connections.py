"""The connections of a net: how many channels of which layer each layer reads, and what they weigh."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_dn.graph.types import Graph, Reader

Pair = tuple[str, str]  # (reader, source), by the names of their layers


@dataclass(frozen=True)
class Connections:
    """Who reads whom in one net.

    `channels` are how many channels of a source a reader reads, `weights` the share of the reader's
    output that they account for (see `weights_of`; empty where the weights are not known).
    """

    channels: Mapping[Pair, int]
    weights: Mapping[Pair, float]


@dataclass(frozen=True)
class Stream:
    """A tensor that several layers read and several layers fill, such as that of a dense block.

    `readers` and `sources` are names of layers in the order in which they run.
    """

    name: str
    readers: tuple[str, ...]
    sources: tuple[str, ...]


def connections(graph: Graph, model: nn.Module | None = None) -> Connections:
    """The connections of a net, with their weights where the net itself is given.

    >>> from prune_dn.models import densenet
    >>> graph = densenet([2], growth_rate=4, num_init_features=8, num_classes=2, stem="cifar").config.graph()
    >>> connections(graph).channels["classifier", "features.denseblock1.denselayer2.conv2"]
    4
    """
    known = _Sources(graph)
    channels: dict[Pair, int] = {}
    for reader in graph.readers:
        read = {base for channel in reader.channels.tolist() for base in known.bases(channel)}
        found = Counter(name for base in read for name in known.makers(base))
        channels.update({(reader.layer, name): n for name, n in found.items()})
    weights = {} if model is None else weights_of(graph, model)
    return Connections(channels, weights)


def weights_of(graph: Graph, model: nn.Module) -> dict[Pair, float]:
    """The share of each reader's output that comes from each source; the shares of a reader sum to 1.

    A channel counts with its weights' sum of squares times the variance of what the reader sees of it.
    Behind a batch norm of its own that is the variance of a rectified normal variable with the norm's
    bias as mean and its weight as standard deviation; without one all channels count alike.
    Channels count as independent. Where two channels compete each has half.
    """
    known = _Sources(graph)
    found: dict[Pair, float] = {}
    for reader in graph.readers:
        shares = _shares(reader, model)
        if shares is None:
            continue
        for channel, share in zip(reader.channels.tolist(), shares.tolist(), strict=True):
            bases = known.bases(channel)
            for base in bases:
                makers = known.makers(base)
                for name in makers:
                    pair = (reader.layer, name)
                    part = share / len(bases) / len(makers)
                    found[pair] = found.get(pair, 0.0) + part
    return found


def streams(graph: Graph, found: Connections) -> tuple[Stream, ...]:
    """The streams whose readers do not all read the same sources, in the order in which they run.

    What a chain of layers or the sums of a residual net connect is no map: all read all.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for reader, source in found.channels:
        parent[root(f"reads {reader}")] = root(f"makes {source}")
    together: dict[str, list[Pair]] = {}
    for pair in found.channels:
        together.setdefault(root(f"reads {pair[0]}"), []).append(pair)
    makers = [producer.layer for producer in graph.producers]
    mapped: list[Stream] = []
    for pairs in together.values():
        readers = tuple(dict.fromkeys(reader for reader, _ in pairs))
        sources = {source for _, source in pairs}
        if len(readers) > 1 and len(sources) > 1 and len(pairs) < len(readers) * len(sources):
            ordered = tuple(name for name in makers if name in sources)
            mapped.append(Stream(_name(graph, readers, len(mapped)), readers, ordered))
    return tuple(mapped)


class _Sources:
    """Which layers make what a layer reads, by the ids of its channels."""

    def __init__(self, graph: Graph) -> None:
        self.ties = graph.ties.tolist()
        self.pairs: dict[int, tuple[int, ...]] = {}  # what competes before a reader
        layers: dict[int, list[str]] = {}
        of_filter: dict[int, str] = {}
        for producer in graph.producers:
            for channel in producer.channels.tolist():
                of_filter[channel] = producer.layer
        for one in graph.competitions:
            for unit in range(one.operands.shape[1]):
                operands = tuple(dict.fromkeys(one.operands[:, unit].tolist()))
                for result in one.results[:, unit].tolist():
                    if one.reader is None:
                        of_filter[result] = of_filter[operands[0]]
                    else:
                        self.pairs[result] = operands
        for channel, layer in of_filter.items():
            layers.setdefault(self.ties[channel], []).append(layer)
        self.layers = {tie: tuple(dict.fromkeys(names)) for tie, names in layers.items()}

    def bases(self, channel: int) -> tuple[int, ...]:
        """The channels of the stream that stand behind what a layer reads; none of the net's input."""
        if channel < 0:
            return ()
        return self.pairs.get(channel, (channel,))

    def makers(self, channel: int) -> tuple[str, ...]:
        """The layers that make a channel: several where a sum ties theirs."""
        return self.layers.get(self.ties[channel], ())


def _shares(reader: Reader, model: nn.Module) -> Tensor | None:
    """What each position of a reader weighs in its output, (inputs,); None where its weight is not known."""
    try:
        layer = model.get_submodule(reader.layer)
        norm = None if reader.select is None else model.get_submodule(reader.select)
    except AttributeError:
        return None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    squares = weight.detach().double().square()
    if getattr(layer, "transposed", False):
        sums = squares.flatten(1).sum(1)
    else:
        groups = getattr(layer, "groups", 1)
        sums = squares.flatten(2).sum(2) if weight.ndim > 2 else squares
        sums = sums.unflatten(0, (groups, -1)).sum(1).flatten()
    if len(sums) != len(reader.channels):
        return None
    scale = getattr(norm, "weight", None)
    shift = getattr(norm, "bias", None)
    if isinstance(scale, Tensor) and isinstance(shift, Tensor) and len(scale) == len(sums):
        sums = sums * rectified_variance(shift.detach().double(), scale.detach().double().abs())
    total = sums.sum()
    return (sums / total).cpu() if total > 0 else None


def rectified_variance(mean: Tensor, deviation: Tensor) -> Tensor:
    """The variance of max(x, 0) for normal x.

    >>> half = rectified_variance(torch.tensor(0.0), torch.tensor(1.0))
    >>> round(half.item(), 4), round(0.5 - 1 / (2 * math.pi), 4)
    (0.3408, 0.3408)
    """
    safe = deviation.clamp_min(torch.finfo(deviation.dtype).tiny)
    z = mean / safe
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    below = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    first = mean * below + deviation * density
    second = (mean.square() + deviation.square()) * below + mean * deviation * density
    return (second - first.square()).clamp_min(0)


def _name(graph: Graph, readers: Iterable[str], number: int) -> str:
    """The block that most of the readers belong to, or the number of the stream."""
    names = set(readers)
    parents = Counter(
        block.name.rpartition(".")[0] for block in graph.blocks if names.intersection(block.layers)
    )
    common = parents.most_common(1)
    return common[0][0] if common and common[0][0] else f"stream {number + 1}"
