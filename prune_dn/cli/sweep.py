"""The command that carries out a sweep."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prune_dn.base.console import say, show
from prune_dn.cli import options
from prune_dn.cli.options import example


@example(
    "sweep recipes/criteria_sweep.yaml --workers 2",
    "sweep recipes/criteria_sweep.yaml --storage postgresql://me@host/sweeps --output-dir runs/grid",
)
def sweep(
    recipe: options.RecipePath,
    sets: options.Sets = None,
    output_dir: options.OutputDir = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes on this machine.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            help="A database that others join by the same command.  [default: sweep.db in the output folder]"
        ),
    ] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    as_json: options.AsJson = False,
) -> None:
    """Try many values of a recipe's parameters, by its part `sweep`; a stopped sweep goes on."""
    import json

    from prune_dn.run.sweep import go, open_sweep, work
    from prune_dn.run.sweep_report import records_of, rows_of, table_of, write_sweep_report

    given = list(sets or ())
    if output_dir is not None:
        given.append(f"output_dir={json.dumps(str(output_dir))}")
    asked = open_sweep(recipe, given, storage)
    if worker:
        work(asked)
        return
    try:
        trials = go(asked, workers)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"trials that ended, and phases of the others, are kept in {asked.folder}; the same command goes on"
        ) from stop
    records = records_of(trials)
    path = write_sweep_report(asked, records)
    table = table_of(rows_of(records, asked.section.objectives), asked.section.objectives)
    facts: dict[str, Any] = {"storage": asked.storage.split("@")[-1], "trials": records}
    show(facts, as_json, table=table, lines={"trials": len(records)})
    if not as_json:
        say(f"report: {path}", error=True)
