"""The metadata of a deployed file, so that nobody has to guess its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from prune_dn.base.files import parse_json
from prune_dn.errors import ExportError

KEY = "prune_dn"  # under which a file keeps it, a JSON text
# What is taken over of a checkpoint's `info`: how pixels are read and classes are called, what it costs, which plan.
_KEPT = ("data", "params", "macs", "plan", "plan_digest", "pruned_from")


def describe(info: Mapping[str, Any] | None, **more: Any) -> str:
    """The JSON text that goes into a file: what is kept of `info`, `more`, and the version."""
    kept = {key: value for key, value in (info or {}).items() if key in _KEPT}
    told = {**kept, **more, "prune_dn_version": metadata.version("prune_dn")}
    try:
        return json.dumps(told, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"info holds what JSON cannot: {error}") from error


def parse(text: str | bytes | None, path: Path) -> dict[str, Any]:
    """What `describe` gave; empty for a file that says nothing. Raises ExportError for anything else."""
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ExportError(
            f"{path} is damaged: what it says of itself is no JSON: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} is damaged: what it says of itself is no JSON object")
    return found
