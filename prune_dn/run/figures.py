"""The figures of a net in a run: accuracy and cost, and how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.data.datasets import Datasets
from prune_dn.measure.latency import compare_latency
from prune_dn.measure.profiling import count
from prune_dn.pruning.config import LATENCY, Timing
from prune_dn.run.deploying import file_name
from prune_dn.run.recipe import Recipe
from prune_dn.training import evaluate


def stage_figures(model: nn.Module, data: Datasets) -> dict[str, Any]:
    """Accuracy on test and validation images, params and MACs."""
    test, val = evaluate(model, data.test), evaluate(model, data.val)
    return {
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "n_test": test.n,
        "val_accuracy": val.accuracy,
        "n_val": val.n,
        **dataclasses.asdict(count(model, data.spec.image_size)),
    }


def asked_latency(recipe: Recipe) -> Timing | None:
    """What the latency that a recipe asks for is of; None where it asks for none."""
    if recipe.prune is None or recipe.prune.unit != LATENCY:
        return None
    return recipe.prune.request().timed


def latency_rows(
    recipe: Recipe, nets: Mapping[str, nn.Module], image_size: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each net, all nets timed in turns: in the runtimes of the report, and in that of a latency budget.

    There the pruned net is the exported file in `folder`, where there is one.
    """
    wishes = [
        Timing(name, size, "fp32")
        for name in recipe.report.runtimes
        for size in recipe.report.batch_sizes
    ]
    asked = asked_latency(recipe)
    if asked is not None and asked not in wishes:
        wishes.append(asked)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in nets}
    for timing in wishes:
        models: dict[str, Any] = dict(nets)
        if timing.runtime != "eager" and "pruned" in nets:
            exported = folder / file_name(timing.runtime, timing.precision)
            models["pruned"] = exported if exported.is_file() else nets["pruned"]
        found = compare_latency(
            models,
            **timing._asdict(),
            image_size=image_size,
            repeats=recipe.report.repeats,
            max_seconds=recipe.report.max_seconds,
        )
        for name, latency in found.items():
            rows[name].append(dataclasses.asdict(latency))
    return rows
