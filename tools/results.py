"""Results of a long comparison: JSON lines that outlive a killed run, and tables in the docs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prune_dn.base.files import write_text

Row = dict[str, Any]


def measured(path: Path, keys: Iterable[Row], measure: Callable[[Row], Row]) -> Iterator[Row]:
    """A row per key, from the file where it is there, else measured and kept at once.

    A row holds its key and what `measure` gave; one with an "error" is measured again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The last line may be half a line, of a run that was killed while it wrote.
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if line.endswith("}")]
    write_text(path, "".join(line + "\n" for line in lines))
    rows = [row for row in map(json.loads, lines) if "error" not in row]
    for key in keys:
        wanted = json.loads(json.dumps(key))
        found = next((row for row in rows if wanted.items() <= row.items()), None)
        if found is None:
            found = {**wanted, **measure(key)}
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
        yield found


def chosen(names: Iterable[str], patterns: Iterable[str], what: str) -> list[str]:
    """The names that match a pattern. Ends the program for a pattern that matches none."""
    every = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in every):
            raise SystemExit(f"no {what} matches {pattern!r}; choose from {', '.join(every)}")
    return [n for n in every if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end name -->` in a document."""
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    document = path.read_text(encoding="utf-8")
    head, found, rest = document.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no lines {start.strip()!r} ... {end!r} to write between")
    write_text(path, head + start + text + end + tail)
