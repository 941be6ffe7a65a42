"""How much each unit of coupled channels matters: the sum over all that read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.pruning.calibration import Batches, Statistics
from prune_dn.pruning.coupled import IN, Group, Member, reading_weight
from prune_dn.pruning.importance import Reading, check_losses, judge, observe


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
    readers = {m.layer: None for group in groups for m in group.members if m.sides == (IN,)}
    found = observe(model, list(readers), criterion, batches, generator.initial_seed())
    scores = []
    for group in groups:
        score = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if member.sides == (IN,):
                layer, statistics = model.get_submodule(member.layer), found.get(member.layer)
                reading = _reading(layer, member, group.size, generator, statistics)
                score += torch.from_numpy(judge(reading, criterion))
        scores.append(score)
    return scores


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
    statistics: Statistics | None,
) -> Reading:
    """How a conv or linear layer reads the units of a group, in their order.

    A linear layer behind a flattened map reads it as a conv with a kernel of the map's size would.
    """
    channels = member.channels[member.units.argsort(stable=True)].view(size, -1)
    weight = reading_weight(layer)[:, channels].flatten(2, 3).float()
    known = {
        k: v[channels].sum(1) for k, v in vars(statistics or Statistics()).items() if v is not None
    }
    return Reading(member.layer, None, weight, generator, Statistics(**known))


def _scales(model: nn.Module, group: Group) -> Tensor:
    """Sum of |gamma| over the norms on each unit."""
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in _norms(model, group):
        gamma = model.get_submodule(member.layer).get_parameter("weight").detach()
        score.index_add_(0, member.units, gamma.abs().double().cpu()[member.channels])
    check_losses(score.numpy(), "bn_scale", group.root, group.size)
    return score


def _norms(model: nn.Module, group: Group) -> list[Member]:
    """The norms with a scale on the channels of a group."""
    return [m for m in group.members if getattr(model.get_submodule(m.layer), "affine", False)]
