"""The files of a run: which it may leave in its folder, and whether a folder is one of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

RECIPE, LOCK = "recipe.yaml", ".lock"
PAGE, SAMPLES = "report.html", "samples.json"
# Everything else that a run may leave; --overwrite removes these and nothing else.
_FIT = r"(train|finetune(-\d+)?)"
ARTEFACTS = re.compile(
    "|".join(
        (
            r"(metrics|environment|data|samples|plan(-\d+)?)\.json",
            r"report\.(md|html)",
            r"(widths|training)\.png",
            r"(dense|pruned|(cut|recalibrated|finetuned)(-\d+)?)\.safetensors",
            r"pruned\.pt",
            r"model\.(onnx|pt2)",
            rf"{_FIT}\.(jsonl|state\.pt)",
            rf"{_FIT}/events\.out\.tfevents\..*",
        )
    )
)
_TEMPORARY = re.compile(r"\.(.+)\.[^.]+\.tmp(\.[^.]+)?")  # of files.atomic_path


def artefacts(folder: Path) -> list[Path]:
    """The files that a run left in a folder, metrics.json first: without it no phase counts as done."""
    found = [f for f in _files(folder) if ARTEFACTS.fullmatch(f.relative_to(folder).as_posix())]
    return sorted(found, key=lambda file: (file.name != "metrics.json", file))


def is_run_folder(folder: Path) -> bool:
    """Whether a run of prune_dn was here, finished or not, whatever became of its files."""
    others = (LOCK, "environment.json", "metrics.json")
    return (folder / RECIPE).exists() and any((folder / name).exists() for name in others)


def remove_artefacts_(folder: Path) -> None:
    """Remove what a run left, and folders that are empty then."""
    for file in artefacts(folder):
        file.unlink()
        if file.parent != folder and not any(file.parent.iterdir()):
            file.parent.rmdir()


def remove_leftovers_(folder: Path) -> None:
    """Remove the half-written files of a run that was killed."""
    for file in folder.iterdir():
        found = _TEMPORARY.fullmatch(file.name)
        if found and (found[1] == RECIPE or ARTEFACTS.fullmatch(found[1])):
            file.unlink()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from (file for file in path.iterdir() if file.is_file())
        elif path.is_file() or path.is_symlink():
            yield path
