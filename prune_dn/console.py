"""Print what a command found: one JSON document, or a table and lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import typer


def show(document: Any, as_json: bool, *, table: Any = None, lines: Any = None) -> None:
    """The document as JSON; or else a table, then `lines` as `key: value`."""
    if as_json:
        typer.echo(json.dumps(finite(document), indent=1, allow_nan=False))
        return
    if table is not None:
        from rich.console import Console
        from rich.table import Table

        header, rows = table
        drawn = Table(box=None, pad_edge=False)
        for i, name in enumerate(header):
            drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            drawn.add_row(*map(str, row))
        Console(width=None if sys.stdout.isatty() else 160).print(drawn)
    for line in as_lines(document if table is None else lines or {}):
        typer.echo(line)


def as_lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from as_lines(value, indent + "  ")
        elif isinstance(value, (list, tuple, dict)):
            yield f"{indent}{key}: {', '.join(map(str, value)) or 'none'}"
        elif isinstance(value, float):
            yield f"{indent}{key}: {value:.6g}"
        else:
            yield f"{indent}{key}: {value:,}" if type(value) is int else f"{indent}{key}: {value}"


def finite(value: Any) -> Any:
    """NaN and infinities are no JSON: None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
