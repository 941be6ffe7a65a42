"""A command that is stopped says what is kept, ends with the signal's exit code, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import RECIPE, Run, net, recipe, run  # noqa: F401  (fixtures)

from prune_dn.checkpoints.checkpoint import load
from prune_dn.run import inspection
from prune_dn.training.run import Run as Training

KEPT = "each finished phase and epoch is kept in {}; the same command{} goes on from there"


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """Whoever runs the tests may have had signals ignored, as `nohup` and `&` do."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raised_in_epoch(number: int, patch: pytest.MonkeyPatch, epoch: int) -> None:
    """Let the signal come during an epoch (counted from 0)."""
    train = Training.train_epoch

    def spy(self: Any, shown: Any) -> Any:
        if self.epoch == epoch:
            signal.raise_signal(number)
        return train(self, shown)

    patch.setattr(Training, "train_epoch", spy)


@pytest.mark.parametrize(
    ("number", "name", "code", "more"),
    [
        (signal.SIGINT, "Ctrl-C", 130, []),
        (signal.SIGTERM, "SIGTERM", 143, []),
        (signal.SIGHUP, "SIGHUP", 129, ["--overwrite"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "train"])
def test_run_and_train(
    run: Run,  # noqa: F811
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    name: str,
    code: int,
    more: list[str],
    command: str,
) -> None:
    command = [command, recipe, "--json", "--set", "train.epochs=2"]
    with monkeypatch.context() as patch:
        raised_in_epoch(number, patch, 1)
        stopped, out, err = run(*command, *more)
    assert (stopped, out) == (code, "")
    kept = KEPT.format("runs/tiny", ", without --overwrite," if more else "")
    assert err == f"stopped by {name}: {kept}\n"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    trained = []
    train = Training.train_epoch

    def spy(self: Any, shown: Any) -> Any:
        trained.append(self.name)
        return train(self, shown)

    monkeypatch.setattr(Training, "train_epoch", spy)
    assert run(*command)[0] == 0
    assert trained.count("train") == 1, "the first epoch was kept"
    assert run(*command, "--output-dir", "whole")[0] == 0
    first, second = (load(f"{f}/dense.safetensors").state_dict() for f in ("runs/tiny", "whole"))
    assert all(bool((first[key] == second[key]).all()) for key in first)


def test_before_the_folder_is_taken_nothing_is_promised(
    run: Run,  # noqa: F811
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prune_dn.run import pipeline

    monkeypatch.setattr(pipeline, "load_data", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert run("run", recipe) == (130, "", "stopped by Ctrl-C\n")
    assert not Path("runs/tiny").exists()


def test_finetune_keeps_nothing_and_says_so(
    run: Run,  # noqa: F811
    net: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised_in_epoch(signal.SIGTERM, monkeypatch, 0)
    code, out, err = run("finetune", net, "--epochs", 1, "--limit", 64, "-o", "t.safetensors")
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == (
        "stopped by SIGTERM: t.safetensors was not written and nothing is kept; "
        "`prune-dn run` keeps each epoch"
    )
    assert not Path("t.safetensors").exists()


def test_every_command_and_only_the_first_process_speaks(
    run: Run,  # noqa: F811
    net: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        inspection, "show_file", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert run("show", net) == (143, "", "stopped by SIGTERM\n")
    monkeypatch.setenv("RANK", "1")
    assert run("show", net) == (143, "", "")


def test_what_is_ignored_stays_ignored(
    run: Run,  # noqa: F811
    net: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under nohup."""
    facts = inspection.show_file(net)

    def show(*_: object, **__: object) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return facts

    monkeypatch.setattr(inspection, "show_file", show)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("show", net)[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_real_process_that_loads_with_workers(recipe: Path) -> None:  # noqa: F811
    """The signal goes to the whole group, as Ctrl-C does: one message, no traceback of a worker."""
    sets = ["--set", "train.epochs=100000", "--set", "train.num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prune_dn", "run", recipe.name, *sets],
        cwd=recipe.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("train 1/100000  loss ")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    lines = [line for line in err.splitlines() if not line.startswith("train ")]
    assert lines == ["stopped by Ctrl-C: " + KEPT.format("runs/tiny", "")]
