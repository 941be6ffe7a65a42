"""The trials of a search for the largest cut, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_dn.base.files import StrPath, parse_json, read_text, write_text
from prune_dn.errors import PruningError

_FORMAT = "prune_dn.search/1"
TOLERANCE = 0.02  # share of the cost to which a search finds the largest cut


@dataclass(frozen=True)
class Trial:
    """One cut of a search, as it was measured.

    `drop` is how much worse than dense the metric is, `interval` its 95 % interval where `evaluate` gives a
    score per image. Latencies are medians in milliseconds, of both nets in turns; None where none
    was asked for, or the net cannot be exported to the runtime. `seconds` is what the trial took.
    """

    pruning_ratio: float
    value: float
    drop: float
    interval: tuple[float, float] | None
    holds: bool
    params: int
    macs: int
    latency_ms: float | None
    dense_latency_ms: float | None
    seconds: float

    def __str__(self) -> str:
        lost = f"drop {self.drop:.4g}"
        if self.interval is not None:
            lost += f" (95 % interval {self.interval[0]:.4g} to {self.interval[1]:.4g})"
        times = f"{self.macs:,} MACs"
        if self.latency_ms is not None:
            times += f", {self.latency_ms:.3f} of {self.dense_latency_ms:.3f} ms"
        return (
            f"search: pruning_ratio {self.pruning_ratio:.4f}, {times}, {self.value:.4f}, {lost}: "
            f"{'holds' if self.holds else 'too much'} ({self.seconds:.1f} s)"
        )


def digest(told: str, leaves: list[Any]) -> str:
    """A digest of what makes a search: its request as text, and tensors."""
    found = hashlib.sha256(told.encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def write_trials(path: StrPath, search: str, dense: Sequence[float], trials: list[Trial]) -> None:
    """Write the file of a search, whole."""
    told = {
        "format": _FORMAT,
        "search": search,
        "dense": mean(dense),
        "images": len(dense) if len(dense) > 1 else None,
        "trials": [asdict(trial) for trial in trials],
    }
    write_text(path, json.dumps(told, indent=1) + "\n")


def read_trials(path: StrPath, search: str, dense: Sequence[float]) -> list[Trial]:
    """The trials of an earlier call. Raises PruningError for those of another search."""
    if not Path(path).exists():
        return []
    try:
        told = parse_json(read_text(path))
        same = told["format"] == _FORMAT and told["search"] == search
        names = [field.name for field in fields(Trial)]
        trials = [_trial({name: row[name] for name in names}) for row in told["trials"]]
    except (ValueError, TypeError, KeyError) as error:
        raise PruningError(
            f"{path} is no file of a search: {error}; delete it, or name another"
        ) from error
    if not same:
        raise PruningError(
            f"{path} is of another search (another net, request or calibration images); delete it, or name "
            "another file"
        )
    if not math.isclose(told["dense"], mean(dense), rel_tol=1e-9, abs_tol=1e-12):
        raise PruningError(
            f"{path}: the dense net had {told['dense']:.6g} and now has {mean(dense):.6g}, so evaluate measures "
            "something else; delete the file, or name another"
        )
    return trials


def _trial(row: dict[str, Any]) -> Trial:
    interval = row["interval"]
    if interval is not None:
        low, high = map(float, interval)
        row["interval"] = (low, high)
    return Trial(**row)


def mean(scores: Sequence[float]) -> float:
    """The mean of scores, with an exact sum."""
    return math.fsum(scores) / len(scores)
