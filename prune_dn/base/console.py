"""Print what a command found: one JSON document, or a table and lines."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from prune_dn.errors import WriteError


def plain(text: object) -> str:
    """Text in one line on which no terminal acts: what cannot be printed is escaped.

    >>> plain("a\\nb\\x1b[31m\\u202e")
    'a\\\\nb\\\\x1b[31m\\\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: str, *, error: bool = False) -> None:
    """Write lines to stdout, or stderr; whatever is not `plain` is escaped, but for their ends.

    Raises WriteError where stdout takes nothing: it is closed, or what it goes to is full. A pipe
    that nobody reads any more is a BrokenPipeError, which ends a command without a word.
    """
    try:
        typer.echo("\n".join(map(plain, text.split("\n"))), err=error)
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise WriteError(f"cannot write to stdout: {problem.strerror or problem}") from problem


class _Closed(io.TextIOBase):
    """A stdout that is closed: nothing can be written to it. `kept` has its number meanwhile."""

    def __init__(self, kept: io.IOBase) -> None:
        self.kept = kept

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


def open_standard_streams_() -> None:
    """Put something in the place of stdin, stdout and stderr where they are closed.

    Otherwise the next files that are opened get their numbers, and what libraries print. Writing to
    such a stdout is an error; what goes to such a stderr is lost.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            stream = os.fdopen(number, "r" if name == "stdin" else "w")
            setattr(sys, name, _Closed(stream) if name == "stdout" else stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not Unicode


def show(document: Any, as_json: bool, *, table: Any = None, lines: Any = None) -> None:
    """The document as JSON; or else a table, then `lines` as `key: value`."""
    if as_json:
        say(json.dumps(finite(document), indent=1, allow_nan=False))
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
        console = Console(width=width, markup=False, emoji=False, color_system=None)
        with console.capture() as text:
            console.print(drawn, highlight=False)
        say(text.get().rstrip("\n"))
    for line in as_lines(lines or (document if table is None else {})):
        say(line)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is one line on stderr, from the first process alone."""

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"warning: {plain(message)}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


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
