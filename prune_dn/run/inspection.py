"""What a checkpoint or a plan holds: figures out, nothing written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base.runtimes import Precision, Runtime
from prune_dn.checkpoints.opened import open_checkpoint
from prune_dn.deploy.formats import is_deployed
from prune_dn.errors import ExportError, PruningError
from prune_dn.measure.cross_check import cross_check
from prune_dn.measure.latency import measure_latency
from prune_dn.measure.profiling import count, count_per_layer
from prune_dn.models.answers import path_of
from prune_dn.models.examples import in_channels
from prune_dn.models.families import config_of, known_family
from prune_dn.pruning import Plan
from prune_dn.run.deploying import profile_file
from prune_dn.run.pixels import describe_inputs, inputs_for, say_inputs

Table = tuple[list[str], list[list[str]]]


def profile_checkpoint(
    checkpoint: Path,
    image_size: int | None,
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    ema: bool = False,
    model: str | None = None,
    verify: bool = False,
    runtime: Runtime = "eager",
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Params, MACs and channels by layer, and measured latency; with `verify` also MACs by thop."""
    net, info = open_checkpoint(checkpoint, ema, model)
    inputs, inputs_from = inputs_for(net, info, image_size, checkpoint)
    say_inputs(inputs, inputs_from)
    checked = {"verify": dataclasses.asdict(cross_check(net, **inputs))} if verify else {}
    latency = [
        measure_latency(
            net,
            batch_size=batch,
            repeats=repeats,
            max_seconds=60.0,
            runtime=runtime,
            precision=precision,
            **inputs,
        )
        for batch in batch_sizes
    ]
    return {
        "checkpoint": str(checkpoint),
        **describe_inputs(inputs),
        "image_size_from": inputs_from,
        **dataclasses.asdict(count(net, **inputs)),
        **checked,
        "latency": [dataclasses.asdict(x) for x in latency],
        "layers": [dataclasses.asdict(row) for row in count_per_layer(net, **inputs)],
    }


def profile_any(
    path: Path,
    image_size: int | None,
    batch_sizes: Sequence[int],
    repeats: int,
    runtime: str | None,
    precision: str | None,
    *,
    ema: bool = False,
    model: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """`profile_checkpoint`, or of a deployed file `profile_file`, in its own runtime."""
    if not is_deployed(path):
        asked: dict[str, Any] = {"runtime": runtime or "eager", "precision": precision or "fp32"}
        return profile_checkpoint(
            path, image_size, batch_sizes, repeats, ema=ema, model=model, verify=verify, **asked
        )
    effects = {"ema": ema, "model": model, "verify": verify, "runtime": runtime}
    for name, given in {**effects, "image-size": image_size}.items():
        if given:
            raise ExportError(f"--{name} has no effect on {path}, a deployed file; leave it out")
    return profile_file(path, batch_sizes, repeats, precision)


def show_file(
    file: Path, *, ema: bool = False, model: str | None = None
) -> tuple[dict[str, Any], Table]:
    """The facts in a plan (.json) or a checkpoint, and its widths as a table."""
    if file.suffix == ".json":
        for option, given in (("--ema", ema), ("--model", model)):
            if given:
                raise PruningError(f"{option} has no effect: a plan holds no weights; leave it out")
        plan = Plan.load(file)
        rows = [[r["name"], r["kind"], str(r["before"]), str(r["after"])] for r in plan.layers]
        facts: dict[str, Any] = {
            "plan": str(file),
            "requested": plan.requested,
            "achieved": plan.achieved,
            "protected": plan.protected,
            "layers": plan.layers,
        }
        return facts, (["unit group", "kind", "before", "after"], rows)
    net, info = open_checkpoint(file, ema, model)
    inputs, inputs_from = inputs_for(net, info, None, file)
    layers = [dataclasses.asdict(row) for row in count_per_layer(net, **inputs)]
    facts = {
        "checkpoint": str(file),
        **_shape(net),
        **describe_inputs(inputs),
        "image_size_from": inputs_from,
        **dataclasses.asdict(count(net, **inputs)),
        "info": info,
    }
    if (config := config_of(net)) is not None:
        facts["config"] = json.loads(config.to_json())
    rows = [[r["name"], str(r["channels"] or ""), f"{r['params']:,}"] for r in layers]
    return facts, (["layer", "channels", "params"], rows)


def _shape(model: nn.Module) -> dict[str, Any]:
    """What kind of net it is, in few words."""
    config = config_of(model)
    if config is None:
        return {"class": path_of(type(model)), "in_channels": in_channels(model)}
    shape = {"classes": config.num_classes, "in_channels": config.in_channels}
    return {**shape, **known_family(config).facts(config)}
