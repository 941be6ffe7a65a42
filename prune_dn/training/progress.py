"""What a person sees while a net trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Display:
    """A progress bar on a terminal, one line an epoch elsewhere, nothing when not shown."""

    def __init__(self, name: str, steps: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
            transient=True,
        )
        self.name = name
        self.task = self.bar.add_task(name, total=steps, completed=done, figures="")

    def step(self, loss: float, accuracy: float, images_per_second: float) -> None:
        figures = f"loss {loss:.3f}  accuracy {accuracy:.1%}  {images_per_second:.0f} images/s"
        self.bar.update(self.task, advance=1, figures=figures)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        self.say(
            f"{self.name} {row['epoch']}/{epochs}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.1%}  val {row['val_accuracy']:.1%}  "
            f"{row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def display(name: str, steps: int, done: int, shown: bool) -> Iterator[Display]:
    """Show progress inside."""
    shown_display = Display(name, steps, done, shown)
    with shown_display.bar:
        yield shown_display
