"""The command line: parse, call, print. Torch is imported inside the commands, so help is quick."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from prune_dn.base.console import open_standard_streams_, plain, plain_warnings, say
from prune_dn.base.console import show as _show
from prune_dn.base.signals import Stopped
from prune_dn.cli import options
from prune_dn.cli.options import app, example, read_recipe
from prune_dn.errors import PruneDNError, RecipeError, WriteError


def _version(wanted: bool) -> None:
    if wanted:
        say(f"prune-dn {metadata.version('prune_dn')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train, prune, fine-tune and export DenseNets."""


@example(
    "run recipes/quickstart.yaml", "run recipes/quickstart.yaml --set train.epochs=3 --dry-run"
)
def run(
    recipe: options.RecipePath,
    sets: options.Sets = None,
    output_dir: options.OutputDir = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, and say what it would be.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Carry out a recipe: train, prune, fine-tune, export, report. A stopped run goes on."""
    from prune_dn.run import pipeline
    from prune_dn.run.files import PAGE
    from prune_dn.run.pages import run_headline
    from prune_dn.run.report import below_table, stage_table

    read = read_recipe(recipe, sets, output_dir)
    if dry_run and overwrite:
        raise RecipeError(
            "--overwrite has no effect with --dry-run, which writes nothing; leave it out"
        )
    if dry_run:
        facts = pipeline.dry_run(read)
        _show(facts, as_json)
        return
    result = pipeline.run(read, overwrite=overwrite, progress=not as_json)
    if _is_main():
        table, lines = stage_table(result.metrics), below_table(result.metrics)
        _show(result.metrics, as_json, table=table, lines=lines)
        _say(as_json, f"report: {result.output_dir / 'report.md'}")
        _say(as_json, f"page: {result.output_dir / PAGE}")
        _say(as_json, run_headline(result.metrics))
    _part()


@example("train recipes/densenet40_cifar10.yaml --output-dir runs/dense")
def train(
    recipe: options.RecipePath,
    sets: options.Sets = None,
    output_dir: options.OutputDir = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Only the train part of a recipe; leaves dense.safetensors. `run` can go on from there."""
    from prune_dn.run import pipeline
    from prune_dn.run.report import below_table, stage_table

    read = read_recipe(recipe, sets, output_dir)
    if read.train is None:
        raise RecipeError(
            f"{plain(recipe)} has no part train, so there is nothing to do; use `run`"
        )
    result = pipeline.run(read, overwrite=overwrite, progress=not as_json, only_train=True)
    if _is_main():
        table, lines = stage_table(result.metrics), below_table(result.metrics)
        _show(result.metrics, as_json, table=table, lines=lines)
        _say(as_json, f"checkpoint: {result.output_dir / 'dense.safetensors'}")
    _part()


@example("validate recipes/quickstart.yaml")
def validate(
    recipe: options.RecipePath, sets: options.Sets = None, as_json: options.AsJson = False
) -> None:
    """Check a recipe: every mistake with its line. Nothing is read or run."""
    read = read_recipe(recipe, sets, None)
    from prune_dn.run.recipe import to_yaml

    if as_json:
        _show(read.model_dump(mode="json"), as_json)
    else:
        say(to_yaml(read).rstrip("\n"))
        say(f"{plain(recipe)} is valid", error=True)


@example("schema > recipe.schema.json")
def schema() -> None:
    """JSON Schema of recipes, for editors."""
    from prune_dn.run.recipe import json_schema

    _show(json_schema(), True)


# Registers the commands on checkpoints; here, so that help lists the ones above first.
from prune_dn.cli import (  # noqa: E402
    checkpoints,  # noqa: F401
    compare,  # noqa: F401
    deploying,  # noqa: F401
    recipes,  # noqa: F401
    report,  # noqa: F401
    sensitivity,  # noqa: F401
    sweep,  # noqa: F401
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `prune-dn`. Returns 0, 2 for bad input, 128 + n for signal n, 1 for anything else."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_standard_streams_()
    notices = logging.StreamHandler() if _is_first() else logging.NullHandler()
    notices.addFilter(_escape_)
    logging.getLogger("prune_dn").addHandler(notices)
    try:
        with plain_warnings():
            typer.main.get_command(app).main(args=given, prog_name="prune-dn")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except RecipeError as error:
        return _fail(f"error: {error}", 2, given)
    except PruneDNError as error:
        return _fail(f"error: {_one_line(error)}", 2, given)
    except Stopped as stop:
        return _fail(_one_line(stop), stop.code, given) if _is_first() else stop.code
    except OSError as error:
        return _fail(f"error: {_one_line(error)}", 1, given)
    except Exception as error:
        if _is_memory(error):
            return _fail(
                "error: out of memory: use smaller batches (batch_size), images (image_size) or "
                f"fewer of them (calibration, limit) ({_one_line(error) or 'MemoryError'})",
                1,
                given,
            )
        if _is_lost_process(error):
            return _fail(
                "error: another process of this run ended; its own message, or torchrun's, says why",
                1,
                given,
            )
        text = type(error).__name__ + (f": {_one_line(error)}" if str(error) else "")
        return _fail(
            f"unexpected error: {text}\nThis is a mistake in prune-dn or its surroundings; "
            "`prune-dn --debug ...` shows where.",
            1,
            given,
        )
    finally:
        logging.getLogger("prune_dn").removeHandler(notices)
    return 0


def _escape_(record: logging.LogRecord) -> bool:
    record.msg, record.args = plain(record.getMessage()), None
    return True


def _one_line(error: BaseException) -> str:
    """What an error says; only lines that it indents are lines of their own, not those of names."""
    return "\n  ".join(map(plain, str(error).split("\n  ")))


def _is_memory(error: Exception) -> bool:
    """Whether Python, torch or onnxruntime had too little memory; the latter two have no type for it."""
    signs = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_lost_process(error: Exception) -> bool:
    """Whether gloo or NCCL waited for a process that is no more."""
    signs = ("Connection closed by peer", "Connection reset by peer", "NCCL")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(error, RuntimeError) and any(x in str(error) for x in signs)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    with contextlib.suppress(WriteError):  # stderr is full: the code says it too
        say(message, error=True)
    return code


def _is_first() -> bool:
    """Whether this is torchrun's first process, asked without joining the others."""
    return os.environ.get("RANK", "0") == "0"


def _is_main() -> bool:
    from prune_dn.base.processes import process_state

    return bool(process_state().is_main_process)


def _part() -> None:
    """Let all processes end together: one that left early would look like a crash to torchrun."""
    from prune_dn.base.processes import process_state

    state = process_state()
    state.wait_for_everyone()
    state.destroy_process_group()


def _say(as_json: bool, text: str) -> None:
    if not as_json:
        say(text)
