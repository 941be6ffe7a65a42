"""Which units stay because a module that they belong to is protected, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import numpy as np

from prune_dn.errors import PruningError
from prune_dn.pruning.parts import Group, Mask, Part, Stream
from prune_dn.pruning.units import Units


def protected_units(table: Units, patterns: tuple[str, ...]) -> tuple[Mask, dict[str, str]]:
    """Units that stay, and per group how many and why."""
    kept_back = np.zeros(table.size, dtype=bool)
    reasons: dict[str, list[str]] = {}
    matched = matching([name for part in table.parts() for name in _modules(part)], patterns)

    def keep_back(group: Group, which: Mask, name: str) -> None:
        if not kept_back[group.units][which].all():
            reasons.setdefault(group.name, []).append(f"{name} is protected by {matched[name]!r}")
        kept_back[group.start + np.flatnonzero(which)] = True

    for stream in table.streams:
        for part in stream.readers:
            for name in _reading_modules(part):
                if name in matched and part.edges is not None:
                    keep_back(part.edges, np.ones(part.edges.size, dtype=bool), name)
                    for producer, which in _sources(stream, part):
                        keep_back(producer, which, name)
            for name in (f"{part.name}.conv1", f"{part.name}.norm2", f"{part.name}.conv2"):
                if name in matched and part.bottleneck is not None:
                    keep_back(part.bottleneck, np.ones(part.bottleneck.size, dtype=bool), name)
        for part in stream.producers:
            assert part.stream is not None
            for name in (part.stream.name, "features.norm0" if part.edges is None else ""):
                if name in matched:
                    keep_back(part.stream, np.ones(part.stream.size, dtype=bool), name)
                    if part.siblings is not None:
                        group = part.siblings.group
                        keep_back(group, np.ones(group.size, dtype=bool), name)
    for stream in table.streams:
        for part in stream.readers:
            if part.sides is not None:
                # A side of what competes stays with the channel that it reads; the other may go.
                group, makers = part.sides.group, stream.makers()[part.sides.positions]
                stays = kept_back[makers] & ~kept_back[group.units]
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


def _sources(stream: Stream, reader: Part) -> Iterator[tuple[Group, Mask]]:
    """The units that make what a reader reads."""
    read = np.zeros(stream.width, dtype=bool)
    read[reader.readings[1]] = True
    for producer in stream.producers:
        assert producer.stream is not None
        which: Mask = np.any(read[producer.made()], axis=0)
        if which.any():
            yield producer.stream, which


def _reading_modules(part: Part) -> tuple[str, ...]:
    if part.name == "classifier":
        return ("features.norm5", "classifier")
    if part.is_dense_layer:
        return (f"{part.name}.norm1", f"{part.name}.conv1")
    return (f"{part.name}.norm", f"{part.name}.conv")


def _modules(part: Part) -> tuple[str, ...]:
    if part.edges is None:
        return ("features.conv0", "features.norm0")
    inner = () if part.bottleneck is None else (f"{part.name}.norm2", f"{part.name}.conv2")
    return (*_reading_modules(part), *inner)


def _ancestry(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]
