"""The commands that work on a checkpoint: thin, `jobs` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from prune_dn.base import limits
from prune_dn.base.console import show as _show
from prune_dn.base.intervals import percent
from prune_dn.base.runtimes import PRECISIONS, RUNTIMES
from prune_dn.cli import options
from prune_dn.cli.options import example, read_recipe, words
from prune_dn.errors import PruningError, RecipeError
from prune_dn.pruning.config import CALIBRATED, COMPENSATIONS, TIMED, PruneConfig, Unit


@example(
    "prune dense.safetensors --ratio 0.5 --unit macs -o small.safetensors",
    "prune dense.safetensors --ratio 0.7 --unit macs --units stream,bottleneck,edge "
    "--criterion reconstruction --compensate least_squares -o small.safetensors",
    "prune dense.safetensors --max-drop 1.0 --unit macs -o small.safetensors",
    "prune dense.safetensors --ratio 0.3 --protect 'features.denseblock1' -o small.safetensors",
    "prune resnet18.pth --model torchvision/resnet18 --data path/to/images --normalize imagenet "
    "--ratio 0.5 --unit macs --criterion reconstruction --compensate least_squares "
    "-o small.safetensors --export small.onnx",
)
def prune(
    checkpoint: options.Checkpoint,
    output: options.Output,
    ratio: Annotated[
        float | None, typer.Option(help="The fraction to remove, between 0 and 1.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead of --ratio: the largest cut that loses at most so many points of accuracy on the "
            "validation images."
        ),
    ] = None,
    unit: Annotated[
        str, typer.Option(help=f"What the ratio counts: {', '.join(get_args(Unit))}.")
    ] = PruneConfig.unit,
    runtime: Annotated[
        str | None,
        typer.Option(help=f"For latency: {', '.join(RUNTIMES)}.  [default: {TIMED.runtime}]"),
    ] = PruneConfig.runtime,
    precision: Annotated[
        str | None,
        typer.Option(help=f"For latency: {', '.join(PRECISIONS)}.  [default: {TIMED.precision}]"),
    ] = PruneConfig.precision,
    batch_size: Annotated[
        int | None,
        options.bounded(
            "batch_size", f"For latency: images at once.  [default: {TIMED.batch_size}]"
        ),
    ] = PruneConfig.batch_size,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="See `prune-dn criteria`.  [default: bn_scale where norms have scales, else l2; "
            f"{CALIBRATED[0]} with --calibration and no --compensate]"
        ),
    ] = PruneConfig.criterion,
    scope: Annotated[
        str, typer.Option(help="Rank over the whole net: global; or local.")
    ] = PruneConfig.scope,
    ratios: Annotated[
        Path | None, typer.Option(help="Go by what `sensitivity` measured: its sensitivity.json.")
    ] = None,
    units: options.UnitKinds = options.USUAL,
    protect: options.Protect = None,
    min_channels: Annotated[
        int, options.bounded("min_channels", "No width falls below.")
    ] = PruneConfig.min_channels,
    round_to: Annotated[
        int, options.bounded("round_to", "Cut widths become a multiple of.")
    ] = PruneConfig.round_to,
    image_size: options.ImageSize = None,
    seed: options.Seed = PruneConfig.seed,
    export: Annotated[
        Path | None, typer.Option(help="Also write ONNX (.onnx) or another format of `export`.")
    ] = None,
    plan_out: Annotated[Path | None, typer.Option(help="Also write the plan (JSON).")] = None,
    report: Annotated[
        bool,
        typer.Option(help="Write a page (HTML) beside the output: what was cut, the connections."),
    ] = True,
    recalibrate: Annotated[
        int,
        typer.Option(
            min=0, max=limits.STEPS, help="Refresh norm statistics on so many batches of --data."
        ),
    ] = 0,
    compensate: Annotated[
        str | None,
        typer.Option(
            help=f"Refit what stays: {', '.join(COMPENSATIONS)}.  [default: none; {CALIBRATED[1]} with "
            "--calibration and no --criterion]"
        ),
    ] = PruneConfig.compensate,
    calibration: Annotated[
        int | None, options.images("Training images for criterion and refit.  [default: 512]")
    ] = None,
    loss: options.Loss = None,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Cut a trained net; the checkpoint itself stays as it is."""
    from prune_dn.run import jobs
    from prune_dn.run.data_options import DataOptions
    from prune_dn.run.trials import TOLERANCE

    if (ratio is None) == (max_drop is None):
        raise PruningError(
            "give --ratio, the fraction to remove, or --max-drop, the points of accuracy that may be lost; "
            "one of the two"
        )
    if max_drop is not None and not 0 < max_drop < 100:
        raise PruningError(
            f"--max-drop is {max_drop}; it is in points of accuracy, above 0 and below 100"
        )
    asked = TOLERANCE if ratio is None else ratio
    fields: dict[str, Any] = {
        "unit": unit,
        "criterion": criterion,
        "loss": loss,
        "scope": scope,
        "units": words(units),
        "protect": tuple(protect or ()),
        "min_channels": min_channels,
        "round_to": round_to,
        "compensate": compensate,
        "runtime": runtime,
        "precision": precision,
        "batch_size": batch_size,
        "seed": seed,
    }
    figures = jobs.prune_checkpoint(
        checkpoint,
        output,
        PruneConfig(asked, **fields),
        max_drop=max_drop,
        ratios=ratios,
        plan_out=plan_out,
        recalibrate=recalibrate,
        calibration=calibration,
        data=DataOptions(data, data_root, image_size, resize, mean, std, normalize, seed=seed),
        ema=ema,
        named=model,
        export=export,
        page=report,
    )
    _show(figures, as_json)


@example(
    "finetune small.safetensors --data cifar10 --epochs 3 --learning-rate 0.02 -o tuned.safetensors",
    "finetune small.safetensors --recipe recipes/quickstart.yaml -o tuned.safetensors",
)
def finetune(
    checkpoint: options.Checkpoint,
    output: options.Output,
    recipe: Annotated[
        Path | None, typer.Option(help="Use its parts data and finetune (or train).")
    ] = None,
    sets: options.Sets = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=limits.EPOCHS, help="Passes over the images.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.1.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, max=limits.BATCH_SIZE, help="Default: 64.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="A checkpoint to distil from.")] = None,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    limit: options.Limit = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=limits.SEED,
            help="Seed of every random choice.  [default: the recipe's, or 0]",
        ),
    ] = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a (pruned) checkpoint further."""
    from prune_dn.run import jobs
    from prune_dn.run.data_options import DataOptions

    if recipe is None and sets:
        raise RecipeError("--set has no effect without --recipe; leave it out")
    read = None if recipe is None else read_recipe(recipe, sets, None)
    if seed is None:
        seed = 0 if read is None else read.seed
    fields = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    figures = jobs.finetune_checkpoint(
        checkpoint,
        output,
        recipe=read,
        fields={key: value for key, value in fields.items() if value is not None},
        teacher=teacher,
        data=DataOptions(data, data_root, image_size, resize, mean, std, normalize, limit, seed),
        progress=not as_json,
        ema=ema,
    )
    _show(figures, as_json, lines=with_intervals(figures))


@example(
    "evaluate runs/quickstart/pruned.safetensors",
    "evaluate small.int8.onnx --data cifar10",
    "evaluate net.safetensors --data image_folder --data-root data/cifar10 --normalize cifar10",
)
def evaluate(
    checkpoint: options.CheckpointOrFile,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    split: options.Split = "test",
    recalibrate: Annotated[
        int,
        typer.Option(
            min=0,
            max=limits.STEPS,
            help="First refresh norm statistics on so many training batches.",
        ),
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, max=limits.BATCH_SIZE, help="Images at a time.")
    ] = 64,
    precision: Annotated[
        str, typer.Option(help="no (float32) or bf16: autocast, or OpenVINO's.")
    ] = "no",
    seed: options.Seed = 0,
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Accuracy and loss of a checkpoint, or of a deployed file in its own runtime."""
    from prune_dn.run import jobs
    from prune_dn.run.data_options import DataOptions

    figures = jobs.evaluate_checkpoint(
        checkpoint,
        DataOptions(data, data_root, image_size, resize, mean, std, normalize, seed=seed),
        split=split,
        recalibrate=recalibrate,
        batch_size=batch_size,
        precision=precision,
        ema=ema,
        model=model,
    )
    _show(figures, as_json, lines=with_intervals(figures))


@example("show runs/quickstart/pruned.safetensors", "show runs/quickstart/plan.json")
def show(
    file: Annotated[Path, typer.Argument(help="A checkpoint or a plan.", show_default=False)],
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """What a checkpoint or a plan holds."""
    from prune_dn.run import inspection

    facts, table = inspection.show_file(file, ema=ema, model=model)
    hidden = ("layers", "config")
    lines = {key: value for key, value in facts.items() if key not in hidden}
    _show(facts, as_json, table=table, lines=lines)


def with_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures as a person reads them: each accuracy with its interval, and no empty notice."""
    shown = {}
    for key, value in figures.items():
        if f"{key}_interval" in figures:
            shown[key] = f"{percent(value, figures['n'])} (95 % interval)"
        elif not key.endswith("_interval") and value is not None:
            shown[key] = value
    return shown


@example("criteria")
def criteria(as_json: options.AsJson = False) -> None:
    """The importance criteria that `prune` knows."""
    from prune_dn.pruning import CRITERIA

    lines = {
        name: (c.function.__doc__ or "").strip().splitlines()[0]
        for name, c in sorted(CRITERIA.items())
    }
    _show(lines, as_json)
