"""Print what a command found: one JSON document, or a table and lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import typer


def plain(text: object) -> str:
    """Text in one line on which no terminal acts: what cannot be printed is escaped.

    >>> plain("a\\nb\\x1b[31m\\u202e")
    'a\\\\nb\\\\x1b[31m\\\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
            drawn.add_row(*map(plain, row))
        width = None if sys.stdout.isatty() else 160
        Console(width=width, markup=False, emoji=False, highlight=False).print(drawn)
    for line in as_lines(document if table is None else lines or {}):
        typer.echo(line)


def as_lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        name = f"{indent}{plain(key)}"
        if isinstance(value, dict) and value:
            yield f"{name}:"
            yield from as_lines(value, indent + "  ")
        elif isinstance(value, (list, tuple, dict)):
            yield f"{name}: {', '.join(map(plain, value)) or 'none'}"
        elif isinstance(value, float):
            yield f"{name}: {value:.6g}"
        else:
            yield f"{name}: {value:,}" if type(value) is int else f"{name}: {plain(value)}"


def finite(value: Any) -> Any:
    """NaN and infinities are no JSON: None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
