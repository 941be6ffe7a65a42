"""Long work says what it does, how far it is and how long it takes: on stderr, where a command switched it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 30.0  # seconds between two lines about one step where there is no terminal
_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def shown(on: bool = True) -> Iterator[None]:
    """Inside, `step` writes to stderr; elsewhere it is silent, so that a library call prints nothing."""
    token = _shown.set(on)
    try:
        yield
    finally:
        _shown.reset(token)


def columns() -> tuple[Any, ...]:
    """The columns of a bar; `figures` is a field of each task."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )


@contextmanager
def step(name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A step of long work: a bar on a terminal, elsewhere a line when it begins, and one when it took long.

    Call what it yields after each of `total` parts; None = nobody knows how many there are.

    >>> with step("scores", 2) as advance:
    ...     for batch in range(2):
    ...         advance()
    """
    if not _shown.get():
        yield lambda: None
        return
    console, start, done = Console(stderr=True), time.perf_counter(), 0
    if console.is_terminal:
        with Progress(*columns(), console=console, transient=True) as bar:
            task = bar.add_task(name, total=total, figures="")
            yield lambda: bar.update(task, advance=1)
        return

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    said = start

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = time.perf_counter()
        if total and done < total and now - said > _EVERY:
            said = now
            left = (now - start) / done * (total - done)
            say(f"{name}: {done} of {total}, about {left:.0f} s left")

    say(f"{name} ..." if total is None else f"{name}: {total:,} parts ...")
    yield advance
    say(f"{name}: done in {time.perf_counter() - start:.1f} s")
