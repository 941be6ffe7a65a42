"""The command `report`: the page of what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_dn.base.console import show as _show
from prune_dn.cli import options
from prune_dn.cli.options import example


@example(
    "report runs/quickstart",
    "report runs/quickstart/plan.json --against runs/quickstart/dense.safetensors -o plan.html",
)
def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|FILE",
            help="The folder of a run or of a sensitivity, a plan, or a checkpoint.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="The dense checkpoint to show beside a checkpoint or a plan."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: report.html in a folder, or beside a file."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the page of what is there: tables, charts and the map of the connections in one HTML file."""
    from prune_dn.run.page_files import write_page_of

    _show(write_page_of(source, against, output), as_json)
