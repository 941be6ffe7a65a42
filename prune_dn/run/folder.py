"""The folder of a run: whose recipe it holds, which phases are done, and the figures so far."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from prune_dn.base.console import finite, plain
from prune_dn.base.files import read_text, same_file, write_text
from prune_dn.base.processes import process_state
from prune_dn.base.yaml_lines import parse
from prune_dn.errors import DataError, PruneDNError, RecipeError
from prune_dn.run.files import (
    LOCK,
    RECIPE,
    artefacts,
    is_run_folder,
    remove_artefacts_,
    remove_leftovers_,
)
from prune_dn.run.metrics import FORMAT, read_metrics
from prune_dn.run.recipe import Recipe, to_yaml
from prune_dn.training.config import WITHOUT_EFFECT

# Values of a recipe with which a run may go on when they are others.
WITHOUT_EFFECT_ON_THE_RUN = {"output_dir", "data.download"}
WITHOUT_EFFECT_ON_THE_RUN |= {f"{x}.{key}" for x in ("train", "finetune") for key in WITHOUT_EFFECT}
DATA_FORMAT = "prune_dn.data.datasets/1"
REMEDY = "choose a new output_dir (--output-dir), or replace it with --overwrite"


class RunFolder:
    """State of one run: its path and `metrics`, which are saved after each phase.

    `contents` are those of its data (`Datasets.contents`): they are kept in data.json, and a run does
    not go on with others.

    A phase that is recorded and whose files all exist is not run again. When one has to run, what
    came after it no longer counts. Only the main process writes; all see the same answers.
    """

    def __init__(
        self, recipe: Recipe, contents: Mapping[str, str], *, overwrite: bool = False
    ) -> None:
        self.path = Path(recipe.output_dir)
        self.is_main = process_state().is_main_process
        self.metrics: dict[str, Any] = {"format": FORMAT, "phases": {}}
        self._visited: list[str] = []
        self._lock = contextlib.ExitStack()
        problem = None
        if self.is_main:
            try:
                self._open(recipe, contents, overwrite)
            except PruneDNError as error:
                problem = type(error)(plain(error))
        problem, self.metrics = self.agree((problem, self.metrics))
        if problem:
            self.close()
            raise problem

    def agree(self, value: Any) -> Any:
        """The main process's value, in every process."""
        return broadcast_object_list([value])[0]

    def done(self, phase: str, files: Iterable[str]) -> bool:
        """Is this phase recorded, with all its files there?"""
        here = phase in self.metrics["phases"] and all((self.path / f).exists() for f in files)
        if not self.agree(here):
            done = self.metrics["phases"]
            self.metrics["phases"] = {p: done[p] for p in self._visited if p in done}
            return False
        self._visited.append(phase)
        return True

    def record(self, phase: str, seconds: float) -> None:
        """Note that a phase is done and save the metrics."""
        self._visited.append(phase)
        self.metrics["phases"][phase] = {"seconds": round(seconds, 2)}
        self.write_json("metrics.json", self.metrics)

    def write_json(self, name: str, data: Any) -> None:
        """Write one JSON file, atomically, from the main process."""
        self.write(name, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write one text file, atomically, from the main process."""
        if self.is_main:
            write_text(self.path / name, text)

    def close(self) -> None:
        """Let another run use the folder."""
        self._lock.close()

    def _open(self, recipe: Recipe, contents: Mapping[str, str], overwrite: bool) -> None:
        """Take the folder, or say why not."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_kind()
            if not self._lock.enter_context(_locked(self.path / LOCK)):
                raise RecipeError(
                    f"output_dir {self.path} is in use by another run; wait for it to end"
                )
            self._check_inputs(recipe)
            if overwrite:
                remove_artefacts_(self.path)
            else:
                self._check_recipe(recipe)
                self._check_data(contents)
            remove_leftovers_(self.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"output_dir {self.path} cannot be used: {reason}") from error
        self.write(RECIPE, to_yaml(recipe))
        self.write_json("data.json", {"format": DATA_FORMAT, "contents": dict(contents)})
        with contextlib.suppress(FileNotFoundError):
            self.metrics = read_metrics(self.path / "metrics.json")

    def _check_kind(self) -> None:
        """Refuse a folder of something else in which files have names of ours."""
        if is_run_folder(self.path):
            return
        found = [file.name for file in artefacts(self.path)]
        if found:
            raise RecipeError(
                f"{self.path} holds {found[0]} but no {RECIPE}: it is not the folder of a run, so "
                "nothing here is written over; choose another output_dir (--output-dir)"
            )
        if (self.path / RECIPE).exists():
            raise RecipeError(
                f"{self.path} holds a {RECIPE} that no run left, which would be written over; choose "
                "another output_dir (--output-dir)"
            )

    def _check_inputs(self, recipe: Recipe) -> None:
        """Refuse to write over what the recipe reads."""
        read = {"model.checkpoint": recipe.model.checkpoint}
        if recipe.prune is not None:
            read["prune.ratios"] = recipe.prune.ratios
        for key, file in read.items():
            if file is not None and any(same_file(file, x) for x in artefacts(self.path)):
                raise RecipeError(
                    f"{key} {file} is a file of output_dir {self.path}, where the run would write "
                    "over it; choose another output_dir (--output-dir)"
                )

    def _check_recipe(self, recipe: Recipe) -> None:
        file = self.path / RECIPE
        if not file.exists():
            return
        try:
            document = parse(read_text(file))
            problem = document.problems[0][1] if document.problems else ""
        except (OSError, ValueError) as error:
            problem = str(error)
        if problem or not isinstance(document.value, dict):
            raise RecipeError(
                f"{file}, the recipe of the run in this folder, cannot be read "
                f"({problem or 'it is no mapping'}); restore it, or {REMEDY}"
            )
        there = _flat(document.value)
        here = _flat(parse(to_yaml(recipe)).value)
        changed = [k for k in dict.fromkeys([*here, *there]) if here.get(k) != there.get(k)]
        changed = [k for k in changed if k not in WITHOUT_EFFECT_ON_THE_RUN]
        if changed:
            raise RecipeError(
                f"{self.path} holds a run of another recipe (other values of: "
                f"{', '.join(changed)}); {REMEDY}"
            )

    def _check_data(self, contents: Mapping[str, str]) -> None:
        """Refuse to go on with other data than the run began with: its figures would not compare."""
        file = self.path / "data.json"
        remedy = "start again with --overwrite, or in a new output_dir (--output-dir)"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["contents"]
            kinds = {
                "gone": [name for name in before if name not in contents],
                "new": [name for name in contents if name not in before],
                "changed": [x for x in before if contents.get(x, before[x]) != before[x]],
            }
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file}, the list of the data that the run began with, cannot be read "
                f"({type(error).__name__}); {remedy}"
            ) from error
        different = [
            f"{len(names):,} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for kind, names in kinds.items()
            if names
        ]
        if different:
            raise DataError(
                f"the data is not what the run in {self.path} began with: {'; '.join(different)}; "
                f"restore it, or {remedy}"
            )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts: dict[str, Any] = {}
        for key, inner in value.items():
            parts.update(_flat(inner, f"{path}.{key}" if path else key))
        return parts
    return {path: value}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file while the process lives; False when another process holds it."""
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
