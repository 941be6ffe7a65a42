"""The page of what is there already: a run, a sensitivity, a plan or a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base.files import parse_json, read_text
from prune_dn.checkpoints.checkpoint import load
from prune_dn.checkpoints.opened import open_checkpoint
from prune_dn.errors import ExportError, PruneDNError, PruningError, RecipeError
from prune_dn.measure.profiling import count
from prune_dn.models.convert import as_ours
from prune_dn.models.families import config_of
from prune_dn.page.document import Page
from prune_dn.page.document import write as write_page
from prune_dn.pruning import Plan, apply_plan
from prune_dn.run import sensitivity_report
from prune_dn.run.files import PAGE, RECIPE, SAMPLES
from prune_dn.run.metrics import read_metrics
from prune_dn.run.pages import Nets, cut_page, net_page, plan_facts, run_page
from prune_dn.run.pixels import inputs_for

logger = logging.getLogger(__name__)


def page_of(path: Path, against: Path | None = None) -> Page:
    """The page of a run's folder, a folder of `prune-dn sensitivity`, a plan (.json) or a checkpoint.

    `against` is the dense checkpoint to show beside a checkpoint, or that a plan was made for. Raises
    PruneDNError for what is none of these.
    """
    if path.is_dir():
        if against is not None:
            raise PruningError(
                "--against has no effect: a folder holds its dense net; leave it out"
            )
        if (path / "metrics.json").is_file():
            return _of_run(path)
        if (path / "sensitivity.json").is_file():
            return sensitivity_report.page(_read(path / "sensitivity.json"))
        raise PruningError(
            f"{path} is the folder of no finished phase of a run (metrics.json) and of no sensitivity "
            "(sensitivity.json); give such a folder, a plan (.json) or a checkpoint"
        )
    if path.suffix == ".json":
        return _of_plan(path, against)
    return _of_checkpoint(path, against)


def write_page_of(source: Path, against: Path | None, output: Path | None) -> dict[str, Any]:
    """Write the page of a folder, a plan or a checkpoint; without `output` in the folder or beside the file."""
    path = page_path(source) if output is None else output
    if path.suffix not in (".html", ".htm"):
        raise ExportError(f"{path}: a page is an .html file; name it {path.stem}.html")
    write_page(page_of(source, against), path)
    return {"page": str(path), "file_bytes": path.stat().st_size}


def page_path(path: Path) -> Path:
    """Where the page of a folder or of a file goes."""
    return path / PAGE if path.is_dir() else path.with_suffix(f".{PAGE}")


def _of_run(folder: Path) -> Page:
    metrics = read_metrics(folder / "metrics.json")
    if not metrics.get("stages"):
        raise RecipeError(f"the run in {folder} has finished no phase yet; wait for its first net")
    files = sorted(folder.glob("plan*.json"), key=_round)
    plans = [{"round": i, **plan_facts(Plan.load(file))} for i, file in enumerate(files, start=1)]
    recipe = read_text(folder / RECIPE) if (folder / RECIPE).is_file() else "(recipe.yaml is gone)"
    samples = _read(folder / SAMPLES) if (folder / SAMPLES).is_file() else None
    environment = _read(folder / "environment.json")
    cut = next(
        (
            p
            for name in ("pruned", "recalibrated", "cut")
            if (p := folder / f"{name}.safetensors").is_file()
        ),
        None,
    )
    first = second = None
    try:
        first = load(folder / "dense.safetensors")
        second = (
            None
            if cut is None
            else load(cut, model=None if config_of(first) is not None else first)
        )
    except PruneDNError as error:
        logger.warning("the page shows no layers of the nets: %s", error)
    nets = Nets.of(first, second, image_size=metrics["data"]["image_size"])
    return run_page(metrics, environment, plans, nets, recipe=recipe, samples=samples)


def _of_plan(file: Path, against: Path | None) -> Page:
    plan = Plan.load(file)
    if against is None:
        return cut_page(file.stem, plan, None)
    dense, info = open_checkpoint(against)
    dense = as_ours(dense) or dense
    inputs, _ = inputs_for(dense, info, None, against)
    nets = Nets.of(dense, apply_plan(dense, plan), **inputs)
    return cut_page(file.stem, plan, nets)


def _of_checkpoint(file: Path, against: Path | None) -> Page:
    facts: dict[str, Any] = {}
    nets: list[nn.Module | None] = []
    inputs: Mapping[str, Any] = {}
    for key, path in (("net", file), ("dense", against)):
        if path is None:
            nets.append(None)
            continue
        model, info = open_checkpoint(path)
        model = as_ours(model) or model
        if key == "net":
            inputs, _ = inputs_for(model, info, None, path)
        facts[key] = dataclasses.asdict(count(model, **inputs))
        nets.append(model)
    return net_page(file.name, Nets.of(nets[1], nets[0], **inputs), facts)


def _read(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise PruningError(f"{path} cannot be read: {error}") from error


def _round(file: Path) -> int:
    found = re.search(r"\d+", file.stem)
    return int(found[0]) if found else 0
