"""Train or fine-tune: one plain loop on Accelerate."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import write_text
from prune_dn.data.datasets import Datasets
from prune_dn.errors import TrainingError
from prune_dn.training.config import FitConfig
from prune_dn.training.precision import in_float32
from prune_dn.training.progress import display
from prune_dn.training.run import Run
from prune_dn.training.state import load_state, save_state, state_path


@dataclass(frozen=True)
class FitResult:
    """One row an epoch, the last validation accuracy, the time, and what the user should know."""

    history: list[dict[str, Any]]
    val_accuracy: float
    seconds: float
    notices: list[str]


@usual_defaults()
@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: nn.Module,
    datasets: Datasets,
    config: FitConfig,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    teacher: nn.Module | None = None,
    resume: bool = True,
    name: str = "train",
    progress: bool = True,
) -> FitResult:
    """Train `model` in place; it ends with the last weights, or their moving average (EMA).

    What is in half precision is trained in float32 and rounded back at the end.

    Device, precision and processes are Accelerate's: `accelerate launch` or torchrun work. With an
    `output_dir` each epoch is logged to `name`.jsonl, and a run that was stopped goes on from
    `name`.state.pt with the result of a run that was not. `teacher` serves `config.distillation`.

    Raises TrainingError when nothing would train, the loss is not finite, or the state in
    `output_dir` belongs to other settings; DataError when model and data do not fit.
    """
    with in_float32(model, teacher):
        run = Run(model, datasets, config, seed, teacher, name)
        folder = None if output_dir is None else Path(output_dir)
        accelerator, start, went_on = run.accelerator, time.perf_counter(), 0
        if folder is not None and resume:
            run.restore(load_state(state_path(folder, name), run.fingerprint))
            went_on = run.epoch
            if accelerator.is_main_process and run.history:
                _write_log(folder / f"{name}.jsonl", run.history)  # a kill can have come before it
        if config.tensorboard:
            _start_tensorboard(accelerator, folder, name)
        with (
            run,
            display(name, run.steps, run.step, progress and accelerator.is_main_process) as shown,
        ):
            while run.epoch < config.epochs and run.step < run.steps:
                row = run.train_epoch(shown)
                if went_on:
                    row["resumed"], went_on = True, 0
                run.history.append(row)
                shown.epoch(row, config.epochs)
                accelerator.log(
                    {k: v for k, v in row.items() if isinstance(v, float)}, step=run.epoch
                )
                if folder is not None and accelerator.is_main_process:
                    save_state(state_path(folder, name), run.state())
                    _write_log(folder / f"{name}.jsonl", run.history)
                accelerator.wait_for_everyone()
            notices = run.notices()
            for notice in notices:
                shown.say(f"notice: {notice}")
        for tracker in accelerator.trackers:  # end_training would end the group of processes too
            tracker.finish()
        accuracy = run.history[-1]["val_accuracy"]
        return FitResult(run.history, accuracy, time.perf_counter() - start, notices)


def _start_tensorboard(accelerator: Accelerator, folder: Path | None, name: str) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainingError(
            "tensorboard: true needs the package: pip install prune_dn[tensorboard]"
        )
    if folder is None:
        raise TrainingError("tensorboard: true needs an output_dir to write to")
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.init_trackers(name)


def _write_log(path: Path, history: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in history))
