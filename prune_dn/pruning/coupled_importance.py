"""How much each unit of coupled channels matters: the sum over all that read it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from prune_dn.batches import Batches
from prune_dn.errors import PruningError
from prune_dn.graph.groups import IN, Group, Member
from prune_dn.pruning.calibration import Statistics
from prune_dn.pruning.coupled import reading_weight, widths
from prune_dn.pruning.criteria import CRITERIA, Reading, check_losses, judge
from prune_dn.pruning.patches import kernel_matrix, taps_of
from prune_dn.pruning.readings import observe


def importance(
    model: nn.Module,
    groups: list[Group],
    criterion: str,
    batches: Batches | None,
    generator: torch.Generator,
) -> list[Tensor]:
    """What goes with each unit of each group, (size,) in float64."""
    if criterion == "bn_scale":
        return [_scales(model, group) for group in groups]
    owners = _owners(model, groups)
    seed = generator.initial_seed()
    found = observe(model, list(owners), criterion, batches, seed, owners)
    if CRITERIA[criterion].need == "gram":
        return _of_whole_readers(model, groups, criterion, found, owners, generator)
    scores = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    for score, group, first in zip(scores, groups, _starts(groups), strict=True):
        for member in _reads(group):
            known = {
                key: value[first : first + group.size]
                for key, value in vars(found.get(member.layer, Statistics())).items()
                if value is not None
            }
            layer, statistics = model.get_submodule(member.layer), Statistics(**known)
            reading = _reading(layer, member, group.size, generator, statistics)
            score += torch.from_numpy(judge(reading, criterion))
    return scores


def _of_whole_readers(
    model: nn.Module,
    groups: list[Group],
    criterion: str,
    found: Mapping[str, Statistics],
    owners: Mapping[str, Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    """For criteria that judge an input beside all others of its reader: each reader at once.

    Each group of a grouped conv is a reader of its own.
    """
    sizes = [group.size for group in groups]
    total = torch.zeros(sum(sizes) + 1, dtype=torch.float64)  # the last is of no group
    for name, owner in owners.items():
        layer, known = model.get_submodule(name), found[name]
        matrix, taps = kernel_matrix(layer).float(), taps_of(layer)
        assert known.gram is not None and known.sensitivity is not None
        grams = known.gram.view(len(matrix), *known.gram.shape[-2:])
        parts = (owner.chunk(len(matrix)), matrix, grams, known.sensitivity.chunk(len(matrix)))
        for mine, weight, gram, sensitivity in zip(*parts, strict=True):
            order = mine.argsort(stable=True)
            # A unit that has several positions, as behind a flattened map, is judged as one.
            times = mine.bincount()
            copies = int(times.max()) if len(set(times[times > 0].tolist())) == 1 else 1
            columns = (order[:, None] * taps + torch.arange(taps)).flatten().to(weight.device)
            reading = Reading(
                name,
                None,
                weight[columns].T.unflatten(1, (-1, copies * taps))[..., None],
                generator,
                Statistics(gram=gram[columns][:, columns], sensitivity=sensitivity),
            )
            losses = torch.from_numpy(judge(reading, criterion))
            total.index_add_(0, mine[order[::copies]], losses)
    return list(total[:-1].split(sizes))


def scaled(model: nn.Module, groups: list[Group]) -> list[Group]:
    """The groups that `bn_scale` can judge."""
    found = [group for group in groups if _norms(model, group)]
    if found:
        return found
    raise PruningError(
        f"criterion 'bn_scale': no norm with a scale is on channels of this {type(model).__name__} "
        "that can go; choose a criterion that reads weights, such as l2, or images, such as taylor"
    )


def _reading(
    layer: nn.Module,
    member: Member,
    size: int,
    generator: torch.Generator,
    statistics: Statistics,
) -> Reading:
    """How a conv or linear layer reads the units of a group, in their order.

    A linear layer behind a flattened map reads it as a conv with a kernel of the map's size would.
    """
    channels = member.channels[member.units.argsort(stable=True)].view(size, -1)
    weight = reading_weight(layer)[:, channels].flatten(2, 3).float()
    return Reading(member.layer, None, weight, generator, statistics)


def _starts(groups: list[Group]) -> list[int]:
    """The number of each group's first unit, counted through all groups."""
    return list(itertools.accumulate((group.size for group in groups), initial=0))[:-1]


def _owners(model: nn.Module, groups: list[Group]) -> dict[str, Tensor]:
    """Of each layer that reads units, the unit of each channel that it reads, counted through all
    groups; what is of none comes after the last."""
    owners: dict[str, Tensor] = {}
    none = sum(group.size for group in groups)
    for group, first in zip(groups, _starts(groups), strict=True):
        for member in _reads(group):
            width = widths(model, member.layer)[IN]
            owner = owners.setdefault(member.layer, torch.full((width,), none))
            owner[member.channels] = first + member.units
    return owners


def _reads(group: Group) -> Iterator[Member]:
    """Each layer that reads the group, with all that it reads of it."""
    return (member for member in group.members if member.sides == (IN,))


def _scales(model: nn.Module, group: Group) -> Tensor:
    """Sum of |gamma| over the norms on each unit; of a flattened map the mean over its pixels."""
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in _norms(model, group):
        gamma = model.get_submodule(member.layer).get_parameter("weight").detach()
        copies = len(member.units) // group.size
        score.index_add_(0, member.units, gamma.abs().double().cpu()[member.channels] / copies)
    check_losses(score.numpy(), "bn_scale", group.root, group.size)
    return score


def _norms(model: nn.Module, group: Group) -> list[Member]:
    """The norms with a scale on the channels of a group."""
    return [m for m in group.members if getattr(model.get_submodule(m.layer), "affine", False)]
