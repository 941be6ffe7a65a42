"""Sweeps: the same figures as single runs, none lost when a process is killed, none counted twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from prune_dn.cli import main
from prune_dn.errors import RecipeError
from prune_dn.run import pipeline
from prune_dn.run.recipe_file import load_recipe, parse_recipe
from prune_dn.run.sweep import PROCESS, counted, go, open_sweep, study_of
from prune_dn.run.sweep_report import records_of, rows_of, write_sweep_report

RECIPE = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: digits, image_size: 8, limit: 64}
train: {epochs: 1, batch_size: 16, learning_rate: 0.05}
prune: {pruning_ratio: 0.4, unit: macs, recalibrate_batches: 2}
export: {onnx: false, state_dict: false}
report: {batch_sizes: [2], repeats: 1}
sweep:
  parameters: {prune.pruning_ratio: [0.3, 0.6], seed: [0, 1]}
  objectives: [val_accuracy, macs]
  heartbeat: 1
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_a_trial_is_a_run(recipe: Path, tmp_path: Path) -> None:
    """With the figures of a run of its own, and the dense net trained once for each seed."""
    sweep = open_sweep(recipe, [], None)
    records = records_of(go(sweep, 1))
    assert [(r["parameters"]["seed"], r["parameters"]["prune.pruning_ratio"]) for r in records] == [
        (0, 0.3), (1, 0.3), (0, 0.6), (1, 0.6)
    ]  # fmt: skip
    for record in records[1:3]:
        sets = [f"{key}={json.dumps(value)}" for key, value in record["parameters"].items()]
        alone = pipeline.run(
            load_recipe(
                recipe, [*sets, "sweep=null", f"output_dir={tmp_path}/alone-{record['number']}"]
            ),
            progress=False,
        )
        last = list(alone.metrics["stages"].values())[-1]
        for name in ("val_accuracy", "test_accuracy", "macs", "params"):
            assert record["figures"][name] == last[name]
        assert (
            record["figures"]["dense_val_accuracy"]
            == alone.metrics["stages"]["dense"]["val_accuracy"]
        )
    assert len(list((sweep.folder / "dense").glob("*/dense.safetensors"))) == 2
    assert records_of(go(sweep, 1)) == records  # nothing is left to do

    path = write_sweep_report(sweep, records)
    assert [
        json.loads(line) for line in (sweep.folder / "sweep.jsonl").read_text().splitlines()
    ] == records
    assert "± " in path.read_text() and (sweep.folder / "sweep.png").stat().st_size > 1000


def test_rows_are_means_over_seeds_and_the_best_are_not_beaten() -> None:
    records = [
        {"parameters": {"a": a, "seed": seed}, "number": 0, "state": "complete", "folder": "", "error": None,
         "figures": {"val_accuracy": accuracy + seed / 100, "macs": macs, "test_accuracy": 0.5, "params": 1}}
        for a, accuracy, macs in [(1, 0.9, 10), (2, 0.8, 5), (3, 0.7, 7), (4, 0.9, 10)]
        for seed in (0, 1, 5)
    ]  # fmt: skip
    records.append({**records[0], "figures": None, "error": "no"})
    rows = rows_of(records, ("val_accuracy", "macs"))
    assert [(row.parameters["a"], row.n) for row in rows] == [(1, 3), (2, 3), (3, 3), (4, 3)]
    assert rows[0].mean["val_accuracy"] == pytest.approx(0.92)
    assert rows[0].spread["val_accuracy"] == pytest.approx(statistics.stdev([0.9, 0.91, 0.95]))
    assert [row.best for row in rows] == [True, True, False, True]


def _combinations(trials: list[Any]) -> Counter[str]:
    return Counter(json.dumps(t.params, sort_keys=True) for t in trials)


def _kill_one_of_two(recipe: Path, storage: str | None) -> None:
    """Two processes; the first is killed while it works. The other takes its trial up again."""
    sweep = open_sweep(recipe, [], storage)
    with study_of(sweep) as study:
        killed = _kill_a_worker(recipe, storage, study)
        every, states = study.get_trials(), optuna.trial.TrialState
    trials = counted(every, states)
    assert all(t.state == states.COMPLETE for t in trials)
    assert set(_combinations(trials).values()) == {1} and len(trials) == 4
    assert [t.params for t in every if t.state == states.FAIL] == [killed]
    rows = rows_of(records_of(trials), sweep.section.objectives)
    assert [row.n for row in rows] == [2, 2]


def _kill_a_worker(recipe: Path, storage: str | None, study: Any) -> Any:
    """The parameters of the trial in the middle of which the first of two processes was killed."""
    command = [sys.executable, "-m", "prune_dn", "sweep", str(recipe), "--worker"]
    command += [] if storage is None else ["--storage", storage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = optuna.trial.TrialState.RUNNING
    workers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    try:
        killed = None
        while killed is None:
            assert workers[0].poll() is None, "it ended before it could be killed"
            for trial in study.get_trials(deepcopy=False, states=[running]):
                if trial.user_attrs.get(PROCESS, "").endswith(f":{workers[0].pid}"):
                    workers[0].send_signal(signal.SIGKILL)
                    killed = trial.params
                    break
            time.sleep(0.01)
        assert workers[0].wait() == -signal.SIGKILL
        assert workers[1].wait(timeout=300) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return killed


def test_a_killed_process_loses_no_trial(recipe: Path) -> None:
    _kill_one_of_two(recipe, None)


@pytest.fixture
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if (p / "initdb").exists()]
    if not found and not shutil.which("initdb"):
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    bin_ = found[-1] if found else Path(shutil.which("initdb") or "").parent
    user: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.geteuid() == 0:  # it does not run as root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user["user"] = "postgres"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run: dict[str, Any] = {"check": True, "capture_output": True, "cwd": folder, **user}
    subprocess.run([bin_ / "initdb", "-D", folder / "db", "-A", "trust", "-U", "me", "-N"], **run)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    ctl = [bin_ / "pg_ctl", "-D", folder / "db", "-w"]
    subprocess.run(
        [*ctl, "-o", options, "-l", folder / "log", "start"], **{**run, "capture_output": False}
    )
    try:
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*ctl, "-m", "immediate", "stop"], **run)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_process_loses_no_trial_in_postgres(recipe: Path, postgres: str) -> None:
    _kill_one_of_two(recipe, postgres)


def test_two_processes_make_as_many_trials_as_asked(recipe: Path) -> None:
    asked = (
        "sweep={parameters: {prune.pruning_ratio: {low: 0.2, high: 0.7}, prune.round_to: {low: 1, high: 2}}, "
        "sampler: tpe, trials: 5, heartbeat: 1}"
    )
    code = main(["sweep", str(recipe), "--workers", "2", "--set", asked, "--json"])
    assert code == 0
    lines = [json.loads(x) for x in Path("runs/tiny/sweep.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(line["state"] == "complete" for line in lines)
    for line in lines:
        assert 0.2 <= line["parameters"]["prune.pruning_ratio"] <= 0.7
        assert line["parameters"]["prune.round_to"] in (1, 2)


def test_what_fails_stands_in_the_table(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio that no cut meets is an error of its trial, not of the sweep."""
    asked = "sweep.parameters={prune.pruning_ratio: [0.3, 0.99], seed: [0]}"
    assert main(["sweep", str(recipe), "--set", asked, "--set", "prune.min_channels=4"]) == 0
    text = Path("runs/tiny/sweep.md").read_text()
    assert "Failed" in text and "cannot bring macs" in text
    assert "0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["sweep=null"], "has no part sweep"),
        (["sweep.parameters={prune.ratio: [0.5]}"], "ratio"),
        (["sweep.parameters={prune.pruning_ratio: [0.5, 2]}"], "must lie in"),
        (["sweep.parameters={prune.pruning_ratio: []}"], "needs a list of different values"),
        (["sweep.parameters={seed: [1, 1]}"], "needs a list of different values"),
        (["sweep.parameters={output_dir: [a, b]}"], "cannot vary within a sweep"),
        (["sweep.parameters={prune.pruning_ratio: {low: 0.2, high: 0.5}}"], "a grid has no end"),
        (["sweep.parameters={prune.pruning_ratio: {low: 0.5, high: 0.5}}", "sweep.sampler=tpe",
          "sweep.trials=2"], "low must be below high"),
        (["sweep.sampler=tpe"], "trials is missing"),
        (["sweep.trials=4"], "trials has no effect on a grid"),
        (["sweep.objectives=[accuracy]"], "choose 'val_accuracy'"),
        (["sweep.stop_hopeless=true"], "needs one objective"),
    ],
)  # fmt: skip
def test_bad_sweeps(recipe: Path, sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        open_sweep(recipe, sets, None)
    assert not Path("runs").exists()


def test_storages_and_folders_that_cannot_be_used(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="is no address of a database"):
        open_sweep(recipe, [], "here.db")
    unknown = open_sweep(recipe, [], "postgresql://me:secret@127.0.0.1:1/none")
    with (
        pytest.raises(RecipeError, match=r"the storage .* cannot be used") as error,
        study_of(unknown),
    ):
        pass
    assert "secret" not in str(error.value)
    with pytest.raises(RecipeError, match="holds a sweep of another recipe"):
        open_sweep(recipe, ["sweep.heartbeat=2"], None)
    with pytest.raises(RecipeError, match="has a part sweep: use `prune-dn sweep`"):
        pipeline.run(parse_recipe(RECIPE))


def test_hopeless_trials_are_stopped(recipe: Path) -> None:
    """After a few whole ones, what is worse than their median after the cut is not fine-tuned."""
    asked = [
        "sweep={parameters: {prune.pruning_ratio: [0.1, 0.11, 0.12, 0.13, 0.9], seed: [0]}, stop_hopeless: true}",
        "finetune={epochs: 1, batch_size: 16, learning_rate: 0.05}",
        "train.epochs=4",
        "data.limit=600",
    ]
    trials = go(open_sweep(recipe, asked, None), 1)
    states = {t.params["prune.pruning_ratio"]: t.state.name for t in trials}
    assert states.pop(0.9) == "PRUNED" and set(states.values()) == {"COMPLETE"}
