"""What each group of units bears, as `sensitivity` measured it, and the order that this gives."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_dn.base.files import parse_json, read_text
from prune_dn.errors import PruningError
from prune_dn.pruning.criteria import Scores
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.rates import COUNTED, Costing
from prune_dn.pruning.units import Units

FORMAT = "prune_dn.sensitivity/1"


@dataclass(frozen=True)
class SensitivityRow:
    """One group of units cut alone, by one ratio.

    `name` is the module whose `size` units of `kind` were cut, as in a plan; `units_cut` of them
    went for the `ratio` that was asked. `value` is what `evaluate` gave, `dense` what it gave for
    the net as it is, `drop` how much worse that makes it. `params_saved` and `macs_saved` count
    everything that fell with the units.
    """

    name: str
    kind: str
    ratio: float
    size: int
    units_cut: int
    value: float
    dense: float
    drop: float
    params_saved: int
    macs_saved: int


Ratios = str | os.PathLike[str] | Iterable[SensitivityRow]


def ratios_within(rows: Iterable[SensitivityRow], max_drop: float) -> dict[str, float]:
    """For each group the largest measured ratio whose drop is at most `max_drop`.

    A group that bears none of its ratios is not in it. Each ratio holds for its group alone: cut
    together they cost more than `max_drop`.

    >>> row = SensitivityRow("features.conv0", "stream", 0.5, 24, 12, 0.90, 0.92, 0.02, 324, 331776)
    >>> ratios_within([row], 0.05), ratios_within([row], 0.01)
    ({'features.conv0': 0.5}, {})
    """
    if not isinstance(max_drop, int | float) or not 0 <= max_drop < math.inf:
        raise PruningError(f"max_drop is {max_drop!r}; it must be a number of at least 0")
    found: dict[str, float] = {}
    for row in rows:
        if row.drop <= max_drop:
            found[row.name] = max(row.ratio, found.get(row.name, 0.0))
    return found


def read_ratios(ratios: Ratios, units: Units, kinds: tuple[str, ...]) -> list[SensitivityRow]:
    """The rows of a `sensitivity.json`, or those that `sensitivity` gave, for this net.

    Raises PruningError when the file cannot be read, when it was measured on another net, and when
    it has nothing about one of the `kinds` that this net has.
    """
    if isinstance(ratios, str | os.PathLike):
        where = os.fspath(ratios)
        rows, params = _from_file(Path(where))
    else:
        where, rows, params = "ratios", list(ratios), None
    groups = {group.name: group for group in units.groups}
    for row in rows:
        if not isinstance(row, SensitivityRow):
            raise PruningError(
                f"ratios holds {row!r:.100}; give the rows of `sensitivity`, or the path of a "
                "sensitivity.json"
            )
        _check_row(where, row)
        group = groups.get(row.name)
        size = 0 if group is None else group.size // group.blocks
        if group is None or (group.kind, size) != (row.kind, row.size):
            has = "none" if group is None else f"{size} {group.kind} units"
            raise _other_net(where, f"{row.size} {row.kind} units in {row.name}, here are {has}")
    if params is not None and params != (here := _params(units)):
        raise _other_net(where, f"{params:,} params, this net has {here:,}")
    measured = {row.kind for row in rows}
    for kind in kinds:
        if kind not in measured and any(group.kind == kind for group in units.groups):
            raise PruningError(
                f"{where} has measured no {kind} units, so ratios cannot say how many of them may "
                f"go: leave {kind!r} out of units, or run `prune-dn sensitivity` with --units "
                f"{','.join(kinds)}"
            )
    return rows


def _params(units: Units) -> int:
    return int(Costing(units).total(np.ones(units.size, dtype=bool), COUNTED["params"]))


def measured_drops(
    units: Units, scores: Scores, may_go: Mask, rows: Iterable[SensitivityRow]
) -> Scores:
    """The drop at which each unit goes, (units,): what cutting its group down to it costs.

    The least important units of a group go first. Between the measured ratios the drop rises
    linearly, from 0 at none, and it never falls again. It is infinite for units beyond the largest
    measured ratio (or the first without a figure), and for groups that were not measured.
    """
    drops = np.full(units.size, np.inf)
    points: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row.units_cut):
        points.setdefault(row.name, {0: 0.0})[row.units_cut] = row.drop
    for group in units.groups:
        cuts = points.get(group.name, {})
        known = [cut for cut in cuts if all(math.isfinite(cuts[c]) for c in cuts if c <= cut)]
        candidates = group.start + np.flatnonzero(may_go[group.units])
        order = candidates[np.argsort(scores[candidates], kind="stable")]
        if known:
            rising = np.maximum.accumulate([cuts[cut] for cut in known])
            gone = np.arange(1, len(order) + 1)
            drops[order] = np.interp(gone, known, rising, right=np.inf)
    return drops


def _from_file(path: Path) -> tuple[list[SensitivityRow], int]:
    try:
        data = parse_json(read_text(path))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        rows: list[dict[str, Any]] = data["rows"]
        for row in rows:  # a figure that was not finite is null in JSON
            row.update({key: math.nan for key, value in row.items() if value is None})
        if type(data["params"]) is not int:
            raise ValueError("its params are no integer")
        return [SensitivityRow(**row) for row in rows], data["params"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PruningError(
            f"cannot read ratios from {path}: {error}; give the sensitivity.json that "
            "`prune-dn sensitivity` wrote"
        ) from error


def _check_row(where: str, row: SensitivityRow) -> None:
    """Raise PruningError for figures that no measurement gives."""
    kinds: dict[object, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        huge = isinstance(value, int) and abs(value) >= 1 << 63
        if huge or isinstance(value, bool) or not isinstance(value, kinds[field.type]):
            wrong = f"{field.name} {value!r:.100}, which is no {field.type}"
            break
    else:
        if 0 <= row.units_cut <= row.size:
            return
        wrong = f"units_cut {row.units_cut}, of {row.size} units"
    raise PruningError(f"{where} has a row with {wrong}; run `prune-dn sensitivity` again")


def _other_net(where: str, what: str) -> PruningError:
    return PruningError(
        f"{where} was measured on another net: {what}; run `prune-dn sensitivity` on this one"
    )
