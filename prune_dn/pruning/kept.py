"""Between units that stay and `keep_indices`, the channels that stay in each module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from prune_dn.errors import ConfigError, PruningError
from prune_dn.models.families import family_of
from prune_dn.pruning.arrange import arranged_as
from prune_dn.pruning.config import Kind
from prune_dn.pruning.parts import Group, Mask, Positions
from prune_dn.pruning.subject import Config, NetShape
from prune_dn.pruning.units import Units

Kept = dict[str, tuple[int, ...]]


def indices_of(table: Units, keep: Mask) -> Kept:
    """What stays in each module that loses channels or changes their order."""
    return {
        group.name: tuple(kept.tolist())
        for group, kept in kept_channels(table, keep)
        if not np.array_equal(kept, np.arange(group.channels))
    }


def kept_channels(table: Units, keep: Mask) -> Iterator[tuple[Group, Positions]]:
    """For each group those channels of its module that stay, in their new order.

    The order is that of the table (see `arrange`). It changes where a sibling goes: the one that is left becomes the first of its pair, and
    where what is read competes the pairs lie in the order of their first position.
    """
    pairs = {found.group.name: found for found in table.pairs}
    makers = {found.maker: found for found in table.pairs if found.maker is not None}
    selections = {s.edges.name: s for s in table.selections}
    sides = {s.sides.group.name: s for s in table.selections if s.sides is not None}
    for group in table.groups:
        kept = np.flatnonzero(keep[group.units])
        if group.kind == "edge":
            kept, _ = table.selected(selections[group.name], keep)
        elif group.kind == "sibling" or (group.name in makers and table.is_channel[group.start]):
            found = pairs[group.name] if group.kind == "sibling" else makers[group.name]
            firsts, seconds = found.left(keep)
            if group.name in sides:
                order = np.argsort(sides[group.name].positions[firsts])
                firsts, seconds = firsts[order], seconds[order]
            kept = np.concatenate([firsts, seconds[seconds != firsts]])
        elif group.siblings > 1:
            kept = (np.arange(group.siblings)[:, None] * group.size + kept).ravel()
        else:
            kept = table.moved[group.start + kept] - group.start
        yield group, kept


def units_of(table: Units, keep_indices: Mapping[str, Sequence[int]]) -> Mask:
    """The units that `keep_indices` leave: what `indices_of` was made from, in whatever order they name.

    Raises PruningError for names and channels that the net does not have, and where modules disagree.
    """
    keep = np.ones(table.size, dtype=bool)
    _check_known(keep_indices, (group.name for group in table.groups))
    makers = {found.maker: found for found in table.pairs if found.maker is not None}
    for group in table.groups:
        if group.name in keep_indices:
            kept = _channels(group, keep_indices[group.name])
            if group.kind == "stream" and group.name in makers:
                kept = makers[group.name].owner[kept]
            keep[group.units] = False
            keep[group.start + kept % max(group.size, 1)] = True
    for pairs in table.pairs:
        if pairs.group.name not in keep_indices:  # in plans of whole units that are older
            keep[pairs.group.units] = keep[pairs.whole.units][pairs.owner]
    _check_modules_agree(arranged_as(table, keep_indices), keep, keep_indices)
    return keep


def consistent(before: Config, after: Config, keep_indices: Mapping[str, Sequence[int]]) -> Kept:
    """`keep_indices` as `indices_of` writes them.

    Raises PruningError unless `after` is what they leave of `before`. Of a net without a config that is
    known only when the plan is applied: here only what can be told from the plan itself is checked.
    """
    for config in (before, after):
        is_config = family_of(config) is not None and not isinstance(config, nn.Module)
        if not isinstance(config, NetShape) and not is_config:
            raise PruningError(
                f"a plan is between two descriptions of nets, not a {type(config).__name__}"
            )
    if not isinstance(keep_indices, Mapping):
        raise PruningError(f"keep_indices is {keep_indices!r}; it must be a mapping")
    if isinstance(before, NetShape):
        groups = {n: Group(kind, n, 0, size) for n, kind, size in channels_of(before)}
        _check_known(keep_indices, groups)
        return {
            name: tuple(_channels(groups[name], kept).tolist())
            for name, kept in keep_indices.items()
        }
    table = Units(before.graph())
    keep = units_of(table, keep_indices)
    kept = indices_of(arranged_as(table, keep_indices), keep)
    try:
        left = before.after(kept)
    except ConfigError as error:
        raise PruningError(f"keep_indices leave no net that can be built: {error}") from error
    if left != after:
        where, found, right = _difference(_plain(after), _plain(left))
        raise PruningError(
            f"config_after is not what keep_indices leave of config_before: {where} is {found!r}, "
            f"it must be {right!r}"
        )
    return kept


def channels_of(config: Config) -> list[tuple[str, Kind, int]]:
    """Name, kind and channels of each group of units of a net."""
    if isinstance(config, NetShape):
        return [(name, kind, size) for name, (kind, size) in config.groups.items()]
    return [(g.name, g.kind, g.channels) for g in Units(config.graph()).groups]


def _plain(config: Config) -> dict[str, Any]:
    return {"family": type(config).__name__, **dataclasses.asdict(config)}  # type: ignore[arg-type]


def _check_known(keep_indices: Mapping[str, Sequence[int]], names: Iterable[str]) -> None:
    unknown = sorted({str(name) for name in keep_indices} - set(names))
    if unknown:
        raise PruningError(f"keep_indices name {unknown[0]!r}, which config_before does not have")


def _channels(group: Group, kept: Any) -> Positions:
    """The channels of a module that stay, checked one by one."""
    is_list = isinstance(kept, list | tuple) and all(type(index) is int for index in kept)
    if not is_list or len(set(kept)) < len(kept) or not all(0 <= i < group.channels for i in kept):
        raise PruningError(
            f"keep_indices of {group.name} must be different integers from 0 to {group.channels - 1}"
        )
    return np.array(kept, dtype=np.intp)


def _check_modules_agree(
    table: Units, keep: Mask, keep_indices: Mapping[str, Sequence[int]]
) -> None:
    """Raise PruningError where what goes in one module does not go in another that it belongs to."""
    lost = keep & ~table.close(keep)
    for group in table.groups:
        left = keep[group.units].reshape(group.blocks, -1).sum(axis=1).tolist()
        if len(set(left)) > 1:
            raise PruningError(
                f"keep_indices of {group.name} leave {left} channels in the {group.blocks} groups of a grouped "
                "convolution, which needs equally many in each"
            )
        if lost[group.units].any():
            raise PruningError(
                f"keep_indices disagree: {group.name} keeps what goes with what other modules lose, "
                f"its {group.kind} unit {int(np.flatnonzero(lost[group.units])[0])}"
            )
    right = indices_of(table, keep)
    for group in table.groups:
        if group.kind == "sibling" and group.name not in keep_indices:
            continue
        whole = tuple(range(group.channels))
        if tuple(keep_indices.get(group.name, whole)) != right.get(group.name, whole):
            raise PruningError(
                f"keep_indices of {group.name} are not in the order of the new net, or disagree with "
                "those of the MFM beside it"
            )


def _difference(found: Any, right: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first place where two values differ, by its path: (path, value, other value)."""
    if isinstance(found, dict) and isinstance(right, dict):
        pairs = [(f".{key}", found.get(key), right.get(key)) for key in {**right, **found}]
    elif isinstance(found, tuple) and isinstance(right, tuple) and len(found) == len(right):
        pairs = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(found, right, strict=True))]
    else:
        return where.lstrip("."), found, right
    step, a, b = next(pair for pair in pairs if pair[1] != pair[2])
    return _difference(a, b, where + step)
