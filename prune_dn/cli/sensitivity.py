"""The command `sensitivity`: what each module of a checkpoint bears; a table, a plot and JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_dn.base import limits
from prune_dn.base.console import show as _show
from prune_dn.cli import options
from prune_dn.cli.options import example, words
from prune_dn.errors import PruningError
from prune_dn.run.sensitivity_report import METRICS, summary, table, write

if TYPE_CHECKING:
    from prune_dn.run.data_options import DataOptions


@example(
    "sensitivity dense.safetensors --out sensitivity",
    "sensitivity dense.safetensors --units stream,edge --ratios 0.3,0.6 --recalibrate 4 --out sens",
)
def sensitivity(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option(help="The folder for sensitivity.json, .md and .png.")],
    ratios: Annotated[
        str, typer.Option(help="Fractions of each group of units to cut.")
    ] = "0.25,0.5,0.75",
    criterion: options.Criterion = "l2",
    units: options.UnitKinds = options.USUAL,
    protect: options.Protect = None,
    metric: Annotated[str, typer.Option(help="accuracy (in %), or loss (in nats).")] = "accuracy",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="What a group may cost: points of accuracy, or loss.  [default: 0.5 points; 0.05]"
        ),
    ] = None,
    max_images: Annotated[
        int, options.images("Evaluate on at most so many validation images.")
    ] = 1000,
    recalibrate: Annotated[
        int,
        typer.Option(
            min=0,
            max=limits.STEPS,
            help="First refresh norm statistics on so many training batches.",
        ),
    ] = 0,
    calibration: Annotated[
        int | None, options.images("Training images for the criterion.  [default: 512]")
    ] = None,
    loss: options.Loss = None,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    seed: options.Seed = 0,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """What each module bears: cut each group of units alone and evaluate, with real surgery.

    The figures come from validation images, which are held out from the training images by --seed
    (10 % of each class, as in `train`), never from test images: so ratios may be chosen by them.
    A checkpoint that was made elsewhere, or with another seed, may have been trained on them.
    """
    from prune_dn.base.processes import process_state
    from prune_dn.run.data_options import DataOptions

    facts = measure(
        checkpoint,
        DataOptions(data, data_root, image_size, resize, mean, std, normalize, seed=seed),
        out,
        arguments={
            "ratios": _fractions(ratios),
            "criterion": criterion,
            "loss": loss,
            "units": list(words(units)),
            "protect": list(protect or ()),
        },
        metric=metric,
        max_drop=max_drop,
        max_images=max_images,
        recalibrate=recalibrate,
        calibration=calibration,
        progress=not as_json,
        ema=ema,
    )
    if process_state().is_main_process:
        write(facts, out)
        _show(facts, as_json, table=table(facts), lines=summary(facts, out))


def measure(
    checkpoint: Path,
    data: DataOptions,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    metric: str = "accuracy",
    max_drop: float | None = None,
    max_images: int = 1000,
    recalibrate: int = 0,
    calibration: int | None = None,
    progress: bool = False,
    ema: bool = False,
) -> dict[str, Any]:
    """All that is found, ready for JSON; `arguments` are those of `pruning.sensitivity`.

    Raises PruneDNError for bad input, before anything is evaluated.
    """
    from prune_dn.base.processes import process_state
    from prune_dn.checkpoints.opened import open_checkpoint
    from prune_dn.data.datasets import calibration_batches, calibration_loader
    from prune_dn.measure.latency import machine
    from prune_dn.measure.profiling import count
    from prune_dn.models import DenseNet
    from prune_dn.pruning import recalibrate_batch_norm_
    from prune_dn.pruning.criteria import reads_images
    from prune_dn.pruning.ratios import FORMAT, ratios_within
    from prune_dn.pruning.sensitivity import sensitivity
    from prune_dn.run.data_options import refuse_calibration
    from prune_dn.training import evaluate as score
    from prune_dn.training.progress import display

    if metric not in METRICS:
        raise PruningError(f"--metric {metric!r} is unknown; choose from {', '.join(METRICS)}")
    value_unit, higher_is_better, usual_drop = METRICS[metric]
    borne = usual_drop if max_drop is None else max_drop
    ratios_within([], borne)
    _check_folder(out)
    reads = reads_images(arguments["criterion"])
    if not reads:
        refuse_calibration(calibration, arguments["criterion"])
    state = process_state()
    model, info = open_checkpoint(checkpoint, ema)
    sets, pixels = data.load(info, model, checkpoint)
    images = sets.val.balanced(max_images, data.seed)
    seen = calibration_batches(sets.train, calibration, seed=data.seed) if reads else None

    def evaluate(net: DenseNet) -> float:
        if recalibrate:
            augment = info.get("augment", "none")
            loader = calibration_loader(sets.train, 64, augment=augment, seed=data.seed)
            recalibrate_batch_norm_(net, loader, max_batches=recalibrate)
        result = score(net, images)
        if metric == "loss":
            return result.loss
        assert result.accuracy is not None
        return 100 * result.accuracy

    def advance(done: int, total: int) -> None:
        if done == 1:
            shown.say(f"sensitivity: {total} nets, each on {len(images):,} validation images")
        shown.bar.update(shown.task, completed=done, total=total)

    with display("sensitivity", 1, 0, progress and state.is_main_process) as shown:
        rows = sensitivity(
            model,
            evaluate,
            **arguments,
            calibration=seen,
            seed=data.seed,
            input_size=sets.spec.image_size,
            higher_is_better=higher_is_better,
            progress=advance,
        )
    cost = count(model, sets.spec.image_size)
    return {
        "format": FORMAT,
        "checkpoint": str(checkpoint),
        "data": sets.spec.name,
        "split": "val"
        + " (held out from the training images)" * (sets.val.images is sets.train.images),
        "n": len(images),
        "metric": metric,
        "value_unit": value_unit,
        "higher_is_better": higher_is_better,
        "one_image": 100 / len(images) if metric == "accuracy" else None,
        "dense": rows[0].dense,
        **{key: arguments[key] for key in ("criterion", "units", "protect")},
        "seed": data.seed,
        "recalibrated_on_batches": recalibrate,
        "calibration_images": None if seen is None else sum(len(batch[1]) for batch in seen),
        "image_size": sets.spec.image_size,
        "images": pixels,
        "machine": machine(state.device),
        "params": cost.params,
        "macs": cost.macs,
        "max_drop": borne,
        "ratios": ratios_within(rows, borne),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written, before the long work."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise PruningError(f"--out {out}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PruningError(f"--out {out}: {nearest} cannot be written to; give another folder")


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PruningError(
            f"--ratios {text!r}: give fractions with commas, such as 0.25,0.5"
        ) from None
