"""The decision: which units stay. A plan is data; `surgery` carries it out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base.files import parse_json, write_text
from prune_dn.errors import PruneDNError, PruningError
from prune_dn.models.convert import as_ours
from prune_dn.models.families import config_from, known_family
from prune_dn.models.probe import make
from prune_dn.pruning.arrange import arranged_as
from prune_dn.pruning.config import LATENCY
from prune_dn.pruning.cuts import shape_after
from prune_dn.pruning.kept import Kept, channels_of, consistent, indices_of, units_of
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.subject import Config, NetShape, Subject, subject
from prune_dn.pruning.units import Units

FORMAT = "prune_dn.plan/1"


@dataclass(frozen=True, repr=False)
class Plan:
    """What `make_plan` decided, JSON-able.

    `keep_indices` maps each module that loses channels to those that stay, in their new order: a
    conv's filters, a reader's norm's channels, or what an MFM or a competing reader lets compete
    (present numbering; empty = the whole layer goes). `requested` holds
    the arguments, `achieved` what they gave, `protected` why units could not be cut, all as JSON
    would hold them: lists, no tuples.

    Raises PruningError for parts that do not belong together.
    """

    config_before: Config
    config_after: Config
    keep_indices: Kept
    requested: dict[str, Any]
    achieved: dict[str, Any]
    protected: dict[str, str]

    def __post_init__(self) -> None:
        checked = consistent(self.config_before, self.config_after, self.keep_indices)
        object.__setattr__(self, "keep_indices", checked)
        for name in ("requested", "achieved", "protected"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        _check_records(self.achieved, self.protected)

    def __repr__(self) -> str:
        rows = self.layers
        cut = sum(row["after"] < row["before"] for row in rows)
        told = f"{cut} of {len(rows)} groups of units cut"
        if self.achieved:
            unit, (before, after) = (
                self.achieved["unit"],
                (self.achieved[x] for x in ("before", "after")),
            )
            told = f"{self.achieved['ratio']:.1%} of {unit} removed, {before['macs']:,} -> {after['macs']:,} MACs, {told}"
        return f"<Plan: {told}>"

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row per group of units: name, kind, and how many channels before and after."""
        before = channels_of(self.config_before)
        return [
            {
                "name": name,
                "kind": kind,
                "before": channels,
                "after": len(self.keep_indices.get(name, range(channels))),
            }
            for name, kind, channels in before
        ]

    def to_json(self) -> str:
        """The plan as indented JSON, with a digest of the rest; `from_json` gives back an equal plan."""
        data = {
            "format": FORMAT,
            "requested": self.requested,
            "achieved": self.achieved,
            "protected": self.protected,
            "keep_indices": self.keep_indices,
            "config_before": json.loads(self.config_before.to_json()),
            "config_after": json.loads(self.config_after.to_json()),
        }
        return json.dumps({**data, "digest": _digest(data)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote. Raises PruningError for anything else, and where it was changed.

        A plan that was written by hand, or edited, has no `digest`: its parts must belong together.
        """
        try:
            data = parse_json(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            digest = data.pop("digest", None)
            if digest is not None and digest != _digest(data):
                raise ValueError(
                    "it is not what was written: its digest differs (leave out 'digest' where you "
                    "edited it yourself)"
                )
            del data["format"]
            wrong = sorted(data.keys() ^ {field.name for field in dataclasses.fields(Plan)})
            if wrong:
                raise ValueError(
                    f"it has {'no' if wrong[0] not in data else 'an unknown'} {wrong[0]!r}"
                )
            for side in ("config_before", "config_after"):
                data[side] = _config(data[side])
            return Plan(**data)
        except (ValueError, PruneDNError) as error:
            raise PruningError(f"not a plan of prune_dn: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_text(path, self.to_json() + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises PruningError with the path when it is missing or no plan."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PruningError) as error:
            raise PruningError(f"cannot read the plan {os.fspath(path)}: {error}") from error


def plan_of(
    given: Subject,
    table: Units,
    keep: Mask,
    requested: dict[str, Any] | None = None,
    achieved: dict[str, Any] | None = None,
    protected: dict[str, str] | None = None,
) -> Plan:
    """The plan of a closed `keep`; one that was chosen by hand has nothing else to say."""
    kept = indices_of(table, keep)
    if isinstance(given.config, NetShape):
        after: Config = shape_after(given, table, keep)
    else:
        after = given.config.after(kept)
    return Plan(given.config, after, kept, requested or {}, achieved or {}, protected or {})


def planned(model: nn.Module, plan: Plan) -> tuple[Subject, Units, Mask]:
    """The net that a plan was made for, its units, and those that stay.

    Raises PruningError when the plan was made for a net of another shape, or its parts disagree.
    """
    if not isinstance(plan, Plan):
        raise PruningError(
            f"the plan is a {type(plan).__name__}; give a Plan, such as Plan.load(path)"
        )
    plan = dataclasses.replace(plan)  # its mappings may have changed since it was checked
    before = plan.config_before
    inputs = None
    if isinstance(before, NetShape):
        inputs = make(before.inputs) if as_ours(model, share=True) is None else None
    given = subject(model, None, inputs)
    if given.config != before:
        raise PruningError(
            f"this plan was made for {_named(before)} of another shape; make a new plan for this "
            "model (a plan fits only the net that it was made for, before the cut)"
        )
    table = Units(given.graph)
    keep = units_of(table, plan.keep_indices)
    return given, arranged_as(table, plan.keep_indices), keep


def _named(config: Config) -> str:
    if isinstance(config, NetShape):
        return f"a {config.model.rpartition('.')[2]}"
    return f"a {known_family(config).name}"


def _config(data: Any) -> Config:
    """The description of a net that a plan holds, by what only that kind has."""
    if not isinstance(data, dict):
        raise ValueError(f"its description of a net is {data!r:.100}")
    kind = NetShape if "tensors" in data else config_from(data)
    found: Config = kind.from_json(json.dumps(data))
    return found


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _as_json(name: str, record: Any) -> dict[str, Any]:
    """A record of a plan as it comes back from its file."""
    try:
        found = json.loads(json.dumps(record))
    except (TypeError, ValueError) as error:
        raise PruningError(f"{name} of a plan must fit into JSON: {error}") from error
    if not isinstance(found, dict):
        raise PruningError(f"{name} of a plan is {record!r}; it must be a mapping")
    return found


def _check_records(achieved: Mapping[str, Any], protected: Mapping[str, Any]) -> None:
    """Raise PruningError for figures and reasons that nobody could read."""
    for name, why in protected.items():
        if not isinstance(why, str):
            raise PruningError(f"protected[{name!r}] of a plan is {why!r}; it must be a text")
    if not achieved:  # chosen by hand
        return
    unit = achieved.get("unit")
    if unit not in (*COUNTED, LATENCY):
        raise PruningError(f"achieved['unit'] of a plan is {unit!r}; it must be what was counted")
    figures = {"ratio": achieved.get("ratio")}
    for when in ("baseline", "before", "after"):
        counted = achieved.get(when)
        if not isinstance(counted, dict):
            raise PruningError(f"achieved[{when!r}] of a plan is {counted!r}; it must be a mapping")
        figures |= {f"{when}.{key}": counted.get(key) for key in {**counted, **COUNTED, unit: 0}}
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PruningError(f"achieved {name} of a plan is {value!r}; it must be a number")
