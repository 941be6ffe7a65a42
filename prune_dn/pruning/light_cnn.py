"""What goes together in a Light CNN (MFM units, the residual trunk of each stage), and who competes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prune_dn.batches import Batches
from prune_dn.graph.groups import IN, OUT, Group, Member
from prune_dn.models import LightCNN, LightCNNConfig, MFMConfig
from prune_dn.pruning.coupled import reading_weight
from prune_dn.pruning.coupled_importance import importance
from prune_dn.pruning.criteria import CRITERIA, Reading, judge
from prune_dn.pruning.readings import observe
from prune_dn.pruning.siblings import shared


def light_cnn_groups(config: LightCNNConfig) -> list[Group]:
    """The MFM units of each layer, those tied that are added up; named by who makes them first.

    A unit is the filters that compete, c and c + n, and what reads their maximum. The plain
    embedding of 29_v2 is made of units too, of one filter.
    """
    named = config.named()
    members: dict[str, list[Member]] = {}
    for place, layer in zip(config.places(), config.layers, strict=True):
        members.setdefault(place.joins or place.name, []).append(_makes(place.name, layer))
        if place.reads is not None:
            pixels = 1 if place.kernel else config.side**2
            members[place.reads].append(_reads(place.name, named[place.reads].units, pixels))
    last = config.places()[-1].name
    members[last].append(_reads("fc2", named[last].units, 1))
    return [Group(root, named[root].units, 1, tuple(found)) for root, found in members.items()]


def sibling_groups(config: LightCNNConfig) -> list[Group]:
    """The filters of each layer where some compete: each is a unit of its own."""
    found = []
    for name, layer in config.named().items():
        if layer.filters > layer.units:
            each = torch.arange(layer.filters)
            found.append(Group(name, layer.filters, 1, (Member(name, (OUT,), each, each),)))
    return found


def light_cnn_scores(
    model: LightCNN,
    groups: list[Group],
    criterion: str,
    batches: Batches | None,
    generator: torch.Generator,
    siblings: bool,
) -> list[Tensor]:
    """What goes with each unit, or with each filter; infinite where a criterion or grain has no say."""
    if CRITERIA[criterion].need == "wins":
        filters = _win_scores(model, criterion, batches, generator)
        return [filters[g.root] for g in groups] if siblings else _unit_scores(groups, filters)
    if not siblings:
        return importance(model, groups, criterion, batches, generator)
    whole = light_cnn_groups(model.config)
    scores = importance(model, whole, criterion, batches, generator)
    filters = _shared_scores(model, whole, scores, criterion, generator)
    return [filters[group.root] for group in groups]


def losers(scores: Tensor) -> Tensor:
    """Which filters lose, by scores (filters,) that are infinite without a rival; of equal ones the
    second.
    """
    loses = torch.zeros(len(scores), dtype=torch.bool)
    first, second = scores.isfinite().nonzero().flatten().chunk(2)
    loses[torch.where(scores[first] < scores[second], first, second)] = True
    return loses


def width_rows(before: LightCNNConfig, after: LightCNNConfig) -> list[dict[str, Any]]:
    """One row per layer: name, kind, and how many filters before and after."""
    left = after.named()
    return [
        {"name": name, "kind": "filter", "before": layer.filters, "after": left[name].filters}
        for name, layer in before.named().items()
    ]


def _win_scores(
    model: LightCNN, criterion: str, batches: Batches | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """What each filter is worth to its MFM, (filters,) by layer; infinite where it has no rival."""
    names = {
        group.root: f"{group.root.removesuffix('.filter')}.mfm"
        for group in sibling_groups(model.config)
    }
    seed = generator.initial_seed()
    found = observe(model, list(names.values()), criterion, batches, seed)
    scores = {}
    for name, mfm in names.items():
        weight = reading_weight(model.get_submodule(name)).transpose(0, 1).float()
        reading = Reading(mfm, None, weight, generator, found[mfm])
        scores[name] = _among_rivals(
            torch.from_numpy(judge(reading, criterion)), _owners(model, name)
        )
    return scores


def _unit_scores(groups: list[Group], siblings: Mapping[str, Tensor]) -> list[Tensor]:
    """The sum over all filters of each unit that have a rival; infinite where there are none."""
    scores = []
    for group in groups:
        score, rivals = torch.zeros(group.size).double(), torch.zeros(group.size).bool()
        for member in _makers(group):
            if member.layer in siblings:
                judged = siblings[member.layer].isfinite()
                score.index_add_(0, member.units[judged], siblings[member.layer][judged])
                rivals[member.units[judged]] = True
        scores.append(score.masked_fill(~rivals, math.inf))
    return scores


def _shared_scores(
    model: LightCNN,
    groups: list[Group],
    scores: list[Tensor],
    criterion: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """What each filter has of its unit's score, by layer; infinite where it has no rival.

    In each layer of a trunk the two siblings share the whole score of their unit.
    """
    found = {}
    for group, score in zip(groups, scores, strict=True):
        for member in _makers(group):
            layer, owners = model.get_submodule(member.layer), member.units
            parts = shared(score.numpy(), owners.numpy(), layer, criterion, generator)
            found[member.layer] = _among_rivals(torch.from_numpy(parts), owners)
    return found


def _owners(model: LightCNN, name: str) -> Tensor:
    """The unit of each filter of a layer."""
    return _makes(name, model.config.named()[name]).units


def _makers(group: Group) -> Iterator[Member]:
    return (member for member in group.members if member.sides == (OUT,))


def _among_rivals(scores: Tensor, owners: Tensor) -> Tensor:
    """The scores of filters, infinite where one has its unit for itself."""
    return scores.masked_fill(owners.bincount()[owners] < 2, math.inf)


def _makes(name: str, layer: MFMConfig) -> Member:
    """The layer's filters: the first of each unit, then the seconds of those that have one."""
    units = torch.arange(layer.units)
    paired = torch.ones(layer.units, dtype=torch.bool)
    paired[list(layer.alone)] = False
    return Member(name, (OUT,), torch.arange(layer.filters), torch.cat([units, units[paired]]))


def _reads(name: str, units: int, pixels: int) -> Member:
    """All of a layer's inputs; a linear layer reads every pixel of a map."""
    owners = torch.arange(units).repeat_interleave(pixels)
    return Member(name, (IN,), torch.arange(units * pixels), owners)
