"""What goes together in a Light CNN: MFM units, and the residual trunk of each stage."""

from __future__ import annotations

from typing import Any

import torch

from prune_dn.models import LightCNNConfig, MFMConfig
from prune_dn.pruning.coupled import IN, OUT, Group, Member


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


def width_rows(before: LightCNNConfig, after: LightCNNConfig) -> list[dict[str, Any]]:
    """One row per layer: name, kind, and how many filters before and after."""
    left = after.named()
    return [
        {"name": name, "kind": "filter", "before": layer.filters, "after": left[name].filters}
        for name, layer in before.named().items()
    ]


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
