"""A sweep: many runs of one recipe, by Optuna, on any number of processes and machines."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from prune_dn.base.console import say
from prune_dn.base.files import read_text, write_text
from prune_dn.base.runtimes import extra
from prune_dn.errors import PruneDNError, RecipeError
from prune_dn.run.pipeline import run
from prune_dn.run.recipe import Recipe, to_yaml
from prune_dn.run.recipe_file import load_recipe
from prune_dn.run.sweep_section import MAXIMISED, Range, SweepSection

ERROR, FOLDER, FIGURES, SURPLUS, PROCESS = "error", "folder", "figures", "surplus", "process"
_RETRIES = 5  # of a trial whose process was lost


@dataclass(frozen=True)
class Sweep:
    """A recipe with a sweep, as its file and the settings beside it say it."""

    path: Path
    sets: tuple[str, ...]
    recipe: Recipe
    storage: str

    @property
    def section(self) -> SweepSection:
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def name(self) -> str:
        """Of the study: one for each recipe, whatever its output_dir."""
        text = to_yaml(self.recipe.model_copy(update={"output_dir": "-"}))
        return f"{self.folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def trial(self, parameters: dict[str, Any]) -> Recipe:
        """The recipe of one trial, in a folder named after its parameters. Raises RecipeError."""
        told = json.dumps(parameters, sort_keys=True)
        name = hashlib.sha256(told.encode()).hexdigest()[:12]
        given = [f"{key}={json.dumps(value)}" for key, value in parameters.items()]
        where = [f"output_dir={json.dumps(str(self.folder / 'trials' / name))}", "sweep=null"]
        return load_recipe(self.path, [*self.sets, *given, *where])


def open_sweep(path: Path, sets: Sequence[str], storage: str | None) -> Sweep:
    """Read a recipe with a sweep, and check each value of its parameters in the recipe.

    `storage` is a database of Optuna (`postgresql://...`, `mysql://...`), None = an SQLite file in the output
    folder. Raises RecipeError for what is wrong, and for a folder that holds another sweep.
    """
    recipe = load_recipe(path, sets)
    if recipe.sweep is None:
        raise RecipeError(f"{path} has no part sweep: say what varies in it, or use `prune-dn run`")
    if storage is None:
        storage = f"sqlite:///{Path(recipe.output_dir).absolute()}/sweep.db"
    elif "://" not in storage:
        raise RecipeError(
            f"--storage {storage!r} is no address of a database, such as postgresql://user@host/name"
        )
    found = Sweep(path, tuple(sets), recipe, storage)
    first = {
        key: values.low if isinstance(values, Range) else values[0]
        for key, values in found.section.parameters.items()
    }
    for key, values in found.section.parameters.items():
        ends = (values.low, values.high) if isinstance(values, Range) else values
        for value in ends:
            found.trial({**first, key: value})
    _take_folder(found)
    return found


def _take_folder(sweep: Sweep) -> None:
    file, told = sweep.folder / "sweep.yaml", to_yaml(sweep.recipe)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_text(file, told)
        elif read_text(file) != told:
            raise RecipeError(
                f"{sweep.folder} holds a sweep of another recipe ({file}); choose a new output_dir (--output-dir)"
            )
    except OSError as error:
        raise RecipeError(f"output_dir {sweep.folder} cannot be used: {error.strerror}") from error


@contextmanager
def study_of(sweep: Sweep) -> Iterator[Any]:
    """The study in the storage while the block runs, made by whoever comes first. Raises RecipeError where there is no connection."""
    optuna = extra("optuna", "sweep")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    section = sweep.section
    samplers = {
        "grid": optuna.samplers.RandomSampler,
        "random": optuna.samplers.RandomSampler,
        "tpe": optuna.samplers.TPESampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are experimental there
            storage = optuna.storages.RDBStorage(
                sweep.storage,
                engine_kwargs=_engine(sweep.storage),
                heartbeat_interval=section.heartbeat,
                grace_period=3 * section.heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                    max_retry=_RETRIES
                ),
            )
            study = optuna.create_study(
                storage=storage,
                study_name=sweep.name,
                sampler=samplers[section.sampler](),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
                if section.stop_hopeless
                else optuna.pruners.NopPruner(),
                directions=["maximize" if MAXIMISED[o] else "minimize" for o in section.objectives],
                load_if_exists=True,
            )
    except Exception as error:  # whatever a database driver raises
        raise RecipeError(
            f"the storage {sweep.storage.split('@')[-1]} cannot be used: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    try:
        if section.sampler == "grid":
            for one in section.combinations():
                study.enqueue_trial(one, skip_if_exists=True)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _engine(storage: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}


def work(sweep: Sweep) -> None:
    """Carry out trials until none is left, those of lost processes too."""
    with study_of(sweep) as study:
        _work(sweep, study)


def _work(sweep: Sweep, study: Any) -> None:
    optuna = extra("optuna", "sweep")
    states = optuna.trial.TrialState

    def objective(trial: Any) -> Sequence[float]:
        if _surplus(sweep, trial, states):
            trial.set_user_attr(SURPLUS, True)
            raise optuna.TrialPruned
        parameters = {
            key: _suggest(trial, key, values) for key, values in sweep.section.parameters.items()
        }
        try:
            figures = _carry_out(sweep, trial, parameters, optuna)
        except PruneDNError as error:
            trial.set_user_attr(ERROR, str(error))
            raise
        trial.set_user_attr(FIGURES, figures)
        return [figures[name] for name in sweep.section.objectives]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        while True:
            optuna.storages.fail_stale_trials(study)
            trials = study.get_trials(deepcopy=False)
            if any(t.state == states.WAITING for t in trials) or _more(sweep, trials, states):
                study.optimize(objective, n_trials=1, catch=(PruneDNError,))
            elif any(t.state == states.RUNNING for t in trials):
                time.sleep(min(sweep.section.heartbeat, 5) / 5)
            else:
                return


def counted(trials: Sequence[Any], states: Any) -> list[Any]:
    """The trials that count: not those of lost processes, which were taken up again, and no surplus."""
    return [
        t
        for t in trials
        if SURPLUS not in t.user_attrs and (t.state != states.FAIL or ERROR in t.user_attrs)
    ]


def _more(sweep: Sweep, trials: Sequence[Any], states: Any) -> bool:
    wanted = sweep.section.trials
    return wanted is not None and len(counted(trials, states)) < wanted


def _surplus(sweep: Sweep, trial: Any, states: Any) -> bool:
    """Whether a trial is one too many, as several processes may ask for the last one at once."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    if frozen.params or "fixed_params" in frozen.system_attrs:
        return False
    wanted = sweep.section.trials
    before = [t for t in trial.study.get_trials(deepcopy=False) if t.number < trial.number]
    return wanted is None or len(counted(before, states)) >= wanted


def _suggest(trial: Any, key: str, values: Any) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(key, list(values))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(key, values.low, values.high, log=values.log)
    return trial.suggest_float(key, values.low, values.high, log=values.log)


def _carry_out(sweep: Sweep, trial: Any, parameters: dict[str, Any], optuna: Any) -> dict[str, Any]:
    """One run; its figures. The dense net is that of all trials which train it alike."""
    recipe = sweep.trial(parameters)
    trial.set_user_attr(FOLDER, str(recipe.output_dir))
    trial.set_user_attr(PROCESS, f"{platform.node()}:{os.getpid()}")
    start = time.perf_counter()

    def watch(stage: str, figures: dict[str, Any]) -> None:
        if stage != "dense" and sweep.section.stop_hopeless:
            trial.report(
                figures["val_accuracy"], len(trial.study.trials[trial.number].intermediate_values)
            )
            if trial.should_prune():
                raise optuna.TrialPruned

    metrics = run(_with_shared_net(sweep, recipe), progress=False, watch=watch).metrics
    last = list(metrics["stages"])[-1]
    figures = {k: v for k, v in metrics["stages"][last].items() if isinstance(v, int | float)}
    rows = metrics["latency"].get("pruned") or metrics["latency"].get("dense") or []
    figures["latency"] = rows[0]["median_ms"] if rows else float("nan")
    dense = metrics["stages"]["dense"]
    figures |= {f"dense_{name}": dense[name] for name in ("val_accuracy", "test_accuracy", "macs")}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures


def _with_shared_net(sweep: Sweep, recipe: Recipe) -> Recipe:
    """The recipe from the dense net on, which is trained here unless another trial has done so."""
    if recipe.train is None or recipe.prune is None:
        return recipe
    alone = recipe.model_copy(
        update={"prune": None, "finetune": None, "output_dir": "-", "report": type(recipe.report)()}
    )
    name = hashlib.sha256(to_yaml(alone).encode()).hexdigest()[:12]
    folder = sweep.folder / "dense" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        run(alone.model_copy(update={"output_dir": str(folder)}), progress=False, only_train=True)
    model = recipe.model.from_checkpoint(str(folder / "dense.safetensors"))
    return recipe.model_copy(update={"model": model, "train": None})


def go(sweep: Sweep, workers: int) -> list[Any]:
    """Carry out the whole sweep with so many processes here; the trials that count.

    Raises PruneDNError where processes ended before the trials did.
    """
    states = extra("optuna", "sweep").trial.TrialState
    with study_of(sweep) as study:
        if workers == 1:
            _work(sweep, study)
        else:
            _processes(sweep, workers)
        trials = counted(study.get_trials(), states)
    left = [t for t in trials if t.state in (states.WAITING, states.RUNNING)]
    if left:
        raise PruneDNError(
            f"{len(left)} of {len(trials)} trials are left: the processes ended before; the same command goes on"
        )
    return trials


def _processes(sweep: Sweep, workers: int) -> None:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    environment = {"OMP_NUM_THREADS": str(max(1, cores // workers)), **os.environ}
    command = [sys.executable, "-m", "prune_dn", "sweep", str(sweep.path), "--worker"]
    command += ["--storage", sweep.storage, "--output-dir", str(sweep.folder)]
    for setting in sweep.sets:
        command += ["--set", setting]
    running = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    try:
        for process in running:
            if process.wait() < 0:
                say(
                    f"sweep: worker {process.pid} was ended by signal {-process.returncode}; its trial is taken up "
                    "again",
                    error=True,
                )
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise


logging.getLogger("alembic").setLevel(logging.ERROR)
