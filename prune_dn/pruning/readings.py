"""What each layer loses with each channel that it reads, by a criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.data.batches import Batches
from prune_dn.errors import PruningError
from prune_dn.graph.types import NONE, Reader
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.criteria import CRITERIA, Reading, Scores, check_losses, judge, needs_images
from prune_dn.pruning.parts import STAYS, Mask, Positions
from prune_dn.pruning.patches import Convolution, Transposed, kernel_matrix, taps_of
from prune_dn.pruning.siblings import competing
from prune_dn.pruning.statistics import Gram, Wins
from prune_dn.pruning.units import Units


@dataclass(frozen=True)
class _Read:
    """A layer, the class of each of its inputs, counted from 0 in the order in which they are read, and
    the unit of each class, STAYS where it has none."""

    reader: Reader
    local: Positions
    units: Positions

    @property
    def is_plain(self) -> bool:
        """Whether each input is of another class, as everywhere but behind a flattened map."""
        return len(self.units) == len(self.local)


def of_readers(
    model: nn.Module,
    units: Units,
    criterion: str,
    calibration: Batches | None,
    generator: torch.Generator,
) -> Scores:
    """The sum over the layers that read a unit themselves: of edges, and where nothing is selected."""
    if criterion == "bn_scale":
        return _scales(model, units)
    everyone = list(_reads(units))
    layers = {read.reader.layer: model.get_submodule(read.reader.layer) for read in everyone}
    owners = {r.reader.layer: torch.from_numpy(r.local) for r in everyone if not r.is_plain}
    seed = generator.initial_seed()
    found = observe(model, list(layers), criterion, calibration, seed, owners)
    scores = np.zeros(units.size)
    for read in everyone:
        layer = layers[read.reader.layer]
        statistics = found.pop(read.reader.layer, None)
        losses = np.zeros(len(read.units))
        for classes, reading in _readings(model, layer, read, statistics, generator):
            np.add.at(losses, classes, judge(reading, criterion))
        goes = read.units != STAYS
        scores[read.units[goes]] += losses[goes]
    return scores


def judged(model: nn.Module, units: Units, criterion: str) -> Mask:
    """Which units the criterion can judge: by a norm on them, a rival, or a layer that reads them.

    What only training runs makes, or reads, is not judged.
    """
    if CRITERIA[criterion].need is Wins:
        return competing(units)
    found = np.zeros(units.size, dtype=bool)
    for read in _reads(units):
        found[read.units[read.units != STAYS]] = True
    if criterion == "bn_scale":
        normed = _normed(model, units)
        found &= normed
    for pairs in (p for p in units.pairs if p.reader is not None):
        found[pairs.group.units] = True
    goes = units.source != STAYS
    source, reads = units.source[goes], units.reads[goes]
    found[source] |= found[reads]
    uses, made = units.graph.uses(), ~units.is_channel
    for producer in units.graph.producers:
        if producer.layer in uses:
            mine = units.unit(producer.channels)
            made[mine[mine != STAYS]] = True
    found &= made
    for pairs in (p for p in units.pairs if p.maker is not None):
        found[pairs.group.units] = found[pairs.whole.units][pairs.owner]
    return found


def observe(
    model: nn.Module,
    layers: list[str],
    criterion: str,
    calibration: Batches | None,
    seed: int,
    owners: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What the criterion needs to know of the inputs of each layer; empty = nothing.

    `owners` are those of `collect`.
    """
    need = CRITERIA[criterion].need
    if need is None:
        return {}
    if calibration is None:
        raise needs_images(criterion)
    return dict(collect(model, layers, calibration, need, owners=owners, seed=seed))


def kernels(layer: nn.Module) -> Tensor:
    """The weight of a conv or linear layer by what it reads: (outputs, inputs, kernel, kernel).

    Of a grouped conv, outputs are those of one group; the last axis is 1 unless the kernel has two.
    """
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, Transposed):
        weight = weight.transpose(0, 1)
    elif isinstance(layer, Convolution):
        weight = torch.cat(weight.chunk(layer.groups), dim=1)
    kernel = weight.shape[2:] if weight.ndim == 4 else (-1, 1)
    return weight.reshape(*weight.shape[:2], *kernel).float()


def _reads(units: Units) -> Iterator[_Read]:
    """All layers that eval mode runs and that read a unit, in the order in which they run."""
    uses = units.graph.uses()
    edges = {s.reader.layer: s for s in units.selections}
    for reader in units.graph.readers:
        if reader.layer not in uses:
            continue
        if reader.layer in edges:
            selection = edges[reader.layer]
            local = selection.edge_at
            found = np.arange(selection.edges.start, selection.edges.units.stop)
        else:
            ids, own = reader.channels, -1 - np.arange(len(reader.channels))
            classes = np.where(ids == NONE, own, units.graph.ties[ids])
            _, first, inverse = np.unique(classes, return_index=True, return_inverse=True)
            place = np.argsort(np.argsort(first))
            local, found = place[inverse.ravel()], units.unit(ids[np.sort(first)])
        if (found != STAYS).any():
            yield _Read(reader, local, found)


def _readings(
    model: nn.Module,
    layer: nn.Module,
    read: _Read,
    statistics: Any,
    generator: torch.Generator,
) -> Iterator[tuple[Positions, Reading]]:
    """How a layer reads its classes: all of them at once where that can be, else in parts.

    Parts are the groups of a grouped convolution for a Gram matrix, and classes that are read equally
    often. A linear layer behind a flattened map reads it as a conv with a kernel of the map's size would.
    """
    norm = None if read.reader.select is None else model.get_submodule(read.reader.select)
    norm = norm if isinstance(norm, _BatchNorm) and norm.affine else None
    name = read.reader.select or read.reader.layer
    everyone = np.arange(len(read.units))
    if isinstance(statistics, Gram):
        yield from _whole_readings(name, norm, layer, read, statistics, generator)
    elif read.is_plain:
        yield everyone, Reading(name, norm, kernels(layer), generator, statistics)
    else:
        weight, times = kernels(layer), np.bincount(read.local)
        order = np.argsort(read.local, kind="stable")
        for copies in np.unique(times):
            classes = everyone[times == copies]
            columns = torch.from_numpy(order[np.isin(read.local[order], classes)])
            mine = weight[:, columns].unflatten(1, (len(classes), -1)).flatten(2)[..., None]
            index = torch.from_numpy(classes)
            known = None if statistics is None else _of_classes(statistics, index, read)
            yield classes, Reading(name, None, mine, generator, known)


def _of_classes(statistics: Any, index: Tensor, read: _Read) -> Any:
    """The statistics of some classes. Raises PruningError where they are not of classes."""
    found = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
    for name, value in found.items():
        if len(value) != len(read.units):
            raise PruningError(
                f"{type(statistics).__name__}.{name} has {len(value)} entries for {read.reader.layer}, which "
                f"reads {len(read.units)} units in {len(read.local)} places: take them from `seen.maps` or "
                "`seen.per_unit`"
            )
    return replace(statistics, **{name: value[index] for name, value in found.items()})


def _whole_readings(
    name: str,
    norm: _BatchNorm | None,
    layer: nn.Module,
    read: _Read,
    statistics: Gram,
    generator: torch.Generator,
) -> Iterator[tuple[Positions, Reading]]:
    """For criteria that judge an input beside all others: each group of a conv is a reader of its own."""
    gram, sensitivity = statistics.gram, statistics.sensitivity
    if read.is_plain and int(getattr(layer, "groups", 1)) == 1:
        yield np.arange(len(read.units)), Reading(name, norm, kernels(layer), generator, statistics)
        return
    matrix, taps = kernel_matrix(layer).float(), taps_of(layer)
    grams = gram.view(len(matrix), *gram.shape[-2:])
    parts = (np.split(read.local, len(matrix)), matrix, grams, sensitivity.chunk(len(matrix)))
    for mine, weight, own, outputs in zip(*parts, strict=True):
        order = np.argsort(mine, kind="stable")
        times = np.bincount(mine)
        times = times[times > 0]
        # A class that has several positions is judged as one, if all have as many.
        copies = int(times.max()) if times.min() == times.max() else 1
        columns = torch.from_numpy((order[:, None] * taps + np.arange(taps)).ravel())
        columns = columns.to(weight.device)
        reading = Reading(
            name,
            None,
            weight[columns].T.unflatten(1, (-1, copies * taps))[..., None],
            generator,
            Gram(own[columns][:, columns], outputs),
        )
        yield mine[order[::copies]], reading


def _scales(model: nn.Module, units: Units) -> Scores:
    """|gamma| of the norm in front of each edge; where nothing is selected, the sum over the norms on a
    unit, of a flattened map the mean over its pixels (Network Slimming, arXiv:1708.06519)."""
    scores = np.zeros(units.size)
    for at, gamma in _gammas(model, units):
        goes = at != STAYS
        share = gamma[goes] / np.bincount(at[goes], minlength=units.size)[at[goes]]
        np.add.at(scores, at[goes], share)
    scores[units.is_channel & ~units.is_read] = 0
    return scores


def _normed(model: nn.Module, units: Units) -> Mask:
    found = np.zeros(units.size, dtype=bool)
    for at, _ in _gammas(model, units):
        found[at[at != STAYS]] = True
    return found


def _gammas(model: nn.Module, units: Units) -> Iterator[tuple[Positions, Scores]]:
    """The scales of each norm, and the unit of each."""
    edges = {s.reader.select: s for s in units.selections}
    for follower in units.graph.followers:
        module = model
        if follower.layer:
            parent, _, leaf = follower.layer.rpartition(".")
            module = getattr(model.get_submodule(parent), leaf)
        if not getattr(module, "affine", False):
            continue
        selection = edges.get(follower.layer)
        at = units.unit(follower.channels)
        if selection is not None:
            at = selection.edges.start + selection.edge_at
        gamma = module.get_parameter("weight").detach().abs().double().cpu().numpy()
        check_losses(gamma, "bn_scale", follower.layer, len(at))
        yield at, gamma
