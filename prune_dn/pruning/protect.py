"""Which units stay because a module that they belong to is protected, and why."""

from __future__ import annotations

import fnmatch

import numpy as np

from prune_dn.errors import PruningError
from prune_dn.pruning.parts import STAYS, Mask, Positions
from prune_dn.pruning.units import Units


def protected_units(table: Units, patterns: tuple[str, ...]) -> tuple[Mask, dict[str, str]]:
    """Units that stay, and per group how many and why: those that a protected layer makes, reads or
    follows."""
    kept_back = np.zeros(table.size, dtype=bool)
    reasons: dict[str, list[str]] = {}
    matched = matching(_names(table), patterns)
    selections = {s.reader.layer: s for s in table.selections}
    siblings = {p.maker: p.group for p in table.pairs if p.maker is not None}

    def keep_back(units: Positions, name: str) -> None:
        units = np.unique(units[units != STAYS])
        fresh = units[~kept_back[units]]
        kept_back[fresh] = True
        for number in np.unique(table.group_of[fresh]):
            why = f"{name} is protected by {matched[name]!r}"
            reasons.setdefault(table.groups[number].name, []).append(why)

    for reader in table.graph.readers:
        selection = selections.get(reader.layer)
        for name in {reader.select: 0, reader.layer: 0}:
            if name in matched and selection is not None:
                keep_back(np.arange(table.size)[selection.edges.units], str(name))
                keep_back(selection.sources, str(name))
            elif name in matched:
                keep_back(table.unit(reader.channels), str(name))
    for follower in table.graph.followers:
        if follower.layer in matched:
            keep_back(table.unit(follower.channels), follower.layer)
    for producer in table.graph.producers:
        if producer.layer in matched:
            made = table.made_by(producer.channels)
            keep_back(made, producer.layer)
            keep_back(table.unit_of[producer.channels], producer.layer)
            if producer.layer in siblings:
                keep_back(np.arange(table.size)[siblings[producer.layer].units], producer.layer)
    for selection in table.selections:
        if selection.sides is not None:
            # A side of what competes stays with the channel that it reads; the other may go.
            group, makers = selection.sides.group, selection.sources
            stays = (makers != STAYS) & kept_back[makers] & ~kept_back[group.units]
            if stays.any():
                reasons.setdefault(group.name, []).append("it reads what is protected")
                kept_back[group.start + np.flatnonzero(stays)] = True
    sizes = {g.name: (int(kept_back[g.units].sum()), g) for g in table.groups}
    described = {
        name: f"{sizes[name][0]} of {sizes[name][1].size} {sizes[name][1].kind} units stay: "
        + "; ".join(dict.fromkeys(why))
        for name, why in reasons.items()
    }
    return kept_back, described


def matching(names: list[str], patterns: tuple[str, ...]) -> dict[str, str]:
    """The modules whose name, or a parent's, matches a pattern: the first one that does."""
    matched: dict[str, str] = {}
    for pattern in patterns:
        found = [
            name for name in names if any(fnmatch.fnmatchcase(n, pattern) for n in _ancestry(name))
        ]
        if not found:
            raise PruningError(
                f"protect pattern {pattern!r} matches no module; names look like "
                f"{', '.join(names[:4])}, ..., {names[-1]}"
            )
        for name in found:
            matched.setdefault(name, pattern)
    return matched


def _names(table: Units) -> list[str]:
    """The layers with weights, in the order in which they run, each behind its norm."""
    found: dict[str, None] = {}
    for reader in table.graph.readers:
        found |= dict.fromkeys(name for name in (reader.select, reader.layer) if name)
    return list(found | dict.fromkeys(f.layer for f in table.graph.followers))


def _ancestry(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]
