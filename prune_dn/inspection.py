"""What a checkpoint or a plan holds: figures out, nothing written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_dn.errors import PruningError
from prune_dn.latency import measure_latency
from prune_dn.models import LightCNN, Net
from prune_dn.opened import open_checkpoint
from prune_dn.pixels import image_size_for, say_image_size
from prune_dn.profiling import count, count_per_layer
from prune_dn.pruning import Plan
from prune_dn.pruning.siblings import contests
from prune_dn.pruning.units import Units

Table = tuple[list[str], list[list[str]]]


def profile_checkpoint(
    checkpoint: Path,
    image_size: int | None,
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    ema: bool = False,
) -> dict[str, Any]:
    """Params, MACs and channels by layer, and measured eager latency."""
    model, info = open_checkpoint(checkpoint, ema)
    size, size_from = image_size_for(model, info, image_size, checkpoint)
    say_image_size(size, size_from)
    latency = [
        measure_latency(model, batch_size=batch, image_size=size, repeats=repeats, max_seconds=60.0)
        for batch in batch_sizes
    ]
    return {
        "checkpoint": str(checkpoint),
        "image_size": size,
        "image_size_from": size_from,
        **dataclasses.asdict(count(model, size)),
        "latency": [dataclasses.asdict(x) for x in latency],
        "layers": [dataclasses.asdict(row) for row in count_per_layer(model, size)],
    }


def show_file(file: Path, *, ema: bool = False) -> tuple[dict[str, Any], Table]:
    """The facts in a plan (.json) or a checkpoint, and its widths as a table."""
    if file.suffix == ".json":
        if ema:
            raise PruningError("--ema has no effect: a plan holds no weights; leave it out")
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
    model, info = open_checkpoint(file, ema)
    config = model.config
    size, size_from = image_size_for(model, info, None, file)
    layers = [dataclasses.asdict(row) for row in count_per_layer(model, size)]
    facts = {
        "checkpoint": str(file),
        "classes": config.num_classes,
        "in_channels": config.in_channels,
        **_shape(model),
        "image_size": size,
        "image_size_from": size_from,
        **dataclasses.asdict(count(model, size)),
        "info": info,
        "config": json.loads(config.to_json()),
    }
    rows = [[r["name"], str(r["channels"] or ""), f"{r['params']:,}"] for r in layers]
    return facts, (["layer", "channels", "params"], rows)


def _shape(model: Net) -> dict[str, Any]:
    """What kind of net it is, in few words."""
    if isinstance(model, LightCNN):
        return {"light_cnn": model.config.variant, "blocks": list(model.config.blocks)}
    blocks = [len(block) for block in model.config.blocks]
    rivals = {
        x.name: f"{len(x.owner)} maps compete, {x.winners} win"
        for x in contests(Units(model.config.graph()))
    }
    return {"stem": model.config.stem, "layers_per_block": blocks, "mfm": rivals}
