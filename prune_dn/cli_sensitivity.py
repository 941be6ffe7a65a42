"""The command `sensitivity`: what each module of a checkpoint bears; a table, a plot and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_dn import cli_options as options
from prune_dn.cli_options import example
from prune_dn.console import finite
from prune_dn.console import show as _show
from prune_dn.errors import PruningError

if TYPE_CHECKING:
    from prune_dn.data import ImageSet
    from prune_dn.jobs import DataOptions

FORMAT = "prune_dn.sensitivity/1"
# Metric: unit of its values, whether higher is better, and the drop that is borne unless given.
METRICS = {"accuracy": ("%", True, 0.5), "loss": ("nats", False, 0.05)}
Facts = Mapping[str, Any]


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
    criterion: Annotated[str, typer.Option(help="See `prune-dn criteria`.")] = "l2",
    units: Annotated[str, typer.Option(help="Of stream, bottleneck, edge.")] = "stream,bottleneck",
    protect: Annotated[
        list[str] | None, typer.Option(help="Modules that stay whole; may be given repeatedly.")
    ] = None,
    metric: Annotated[str, typer.Option(help="accuracy (in %), or loss (in nats).")] = "accuracy",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="What a group may cost: points of accuracy, or loss.  [default: 0.5 points; 0.05]"
        ),
    ] = None,
    max_images: Annotated[
        int, typer.Option(min=1, help="Evaluate on at most so many validation images.")
    ] = 1000,
    recalibrate: Annotated[
        int, typer.Option(min=0, help="First refresh norm statistics on so many training batches.")
    ] = 0,
    calibration: Annotated[
        int | None,
        typer.Option(min=1, help="Training images for the criterion.  [default: 512]"),
    ] = None,
    data: options.DataName = None,
    data_root: options.DataRoot = "data",
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """What each module bears: cut each group of units alone and evaluate, with real surgery.

    The figures come from validation images, which are held out from the training images by --seed
    (10 % of each class, as in `train`), never from test images: so ratios may be chosen by them.
    A checkpoint that was made elsewhere, or with another seed, may have been trained on them.
    """
    from prune_dn import jobs
    from prune_dn.processes import process_state

    facts = measure(
        checkpoint,
        jobs.DataOptions(data, data_root, image_size, mean, std, normalize, seed=seed),
        out,
        arguments={
            "ratios": _fractions(ratios),
            "criterion": criterion,
            "units": [word.strip() for word in units.split(",") if word.strip()],
            "protect": list(protect or ()),
        },
        metric=metric,
        max_drop=max_drop,
        max_images=max_images,
        recalibrate=recalibrate,
        calibration=calibration,
        progress=not as_json,
    )
    if process_state().is_main_process:
        write(facts, out)
        _show(facts, as_json, table=table(facts), lines=_summary(facts, out))


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
) -> dict[str, Any]:
    """All that is found, ready for JSON; `arguments` are those of `pruning.sensitivity`.

    Raises PruneDNError for bad input, before anything is evaluated.
    """
    from prune_dn.checkpoint import load, read_info
    from prune_dn.data import calibration_batches, calibration_loader
    from prune_dn.latency import machine
    from prune_dn.models import DenseNet
    from prune_dn.processes import process_state
    from prune_dn.profiling import count
    from prune_dn.pruning import CRITERIA, recalibrate_batch_norm_
    from prune_dn.pruning.sensitivity import ratios_within, sensitivity
    from prune_dn.recipe import CALIBRATION_IMAGES
    from prune_dn.training import evaluate as score
    from prune_dn.training.progress import display

    if metric not in METRICS:
        raise PruningError(f"--metric {metric!r} is unknown; choose from {', '.join(METRICS)}")
    value_unit, higher_is_better, usual_drop = METRICS[metric]
    borne = usual_drop if max_drop is None else max_drop
    ratios_within([], borne)
    _check_folder(out)
    known = CRITERIA.get(arguments["criterion"])
    reads = known is not None and known.need is not None
    if calibration is not None and not reads:
        raise PruningError(
            f"--calibration has no effect: criterion {arguments['criterion']!r} reads only the "
            "weights; leave it out"
        )
    state = process_state()
    model, info = load(checkpoint).to(state.device), read_info(checkpoint)
    sets = data.load(info, model, checkpoint)
    images = _balanced(sets.val, max_images, data.seed)
    wanted = calibration or CALIBRATION_IMAGES
    seen = calibration_batches(sets.train, wanted, seed=data.seed) if reads else None

    def evaluate(net: DenseNet) -> float:
        if recalibrate:
            loader = calibration_loader(sets.train, 64, seed=data.seed)
            recalibrate_batch_norm_(net, loader, max_batches=recalibrate)
        result = score(net, images)
        return 100 * result.accuracy if metric == "accuracy" else result.loss

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
        "split": "val (held out from the training images)",
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
        "machine": machine(state.device),
        "params": cost.params,
        "macs": cost.macs,
        "max_drop": borne,
        "ratios": ratios_within(rows, borne),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def write(facts: Facts, folder: Path) -> None:
    """sensitivity.json, sensitivity.md and sensitivity.png, each whole or not at all."""
    from prune_dn.files import write_text

    text = json.dumps(finite(facts), indent=1, allow_nan=False) + "\n"
    write_text(folder / "sensitivity.json", text)
    write_text(folder / "sensitivity.md", render(facts))
    plot(facts, folder / "sensitivity.png")


def table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per group, its drop by ratio; the one that loses most comes first."""
    ratios = _ratios(facts)
    cells = {(r["name"], r["ratio"]): r for r in facts["rows"]}
    names = sorted(_names(facts), key=lambda name: _worst(cells, name, ratios), reverse=True)
    last = {r["name"]: r for r in facts["rows"]}
    rows = []
    for name in names:
        drops = [cells.get((name, ratio)) for ratio in ratios]
        share = last[name]["macs_saved"] / facts["macs"]
        rows.append(
            [
                name.removeprefix("features."),
                last[name]["kind"],
                str(last[name]["size"]),
                *("" if cell is None else _drop(facts, cell["drop"]) for cell in drops),
                f"{100 * share:.2f} %",
                f"{facts['ratios'][name]:g}" if name in facts["ratios"] else "none",
            ]
        )
    header = ["group", "kind", "units", *(f"drop at {ratio:g}" for ratio in ratios)]
    return [*header, f"MACs saved at {ratios[-1]:g}", "bears"], rows


def render(facts: Facts) -> str:
    """The findings as Markdown."""
    from prune_dn.report import markdown_table

    recalibrated = facts["recalibrated_on_batches"]
    one = "" if facts["one_image"] is None else f"; one image is {facts['one_image']:.2f} points"
    norms = f"refreshed on {recalibrated} training batches" if recalibrated else "not refreshed"
    parts = [
        f"# Sensitivity of {Path(facts['checkpoint']).name}",
        f"Each group of units is cut alone, its least important by `{facts['criterion']}` first, "
        "with real surgery and its exact consequences; nothing is fine-tuned. A drop is what that "
        f"costs in {facts['metric']} ({_drop_unit(facts)}) against the dense net's "
        f"{_value(facts, facts['dense'])}, on {facts['n']:,} images of {facts['data']}, split "
        f"{facts['split']}{one}. No test image was looked at.",
        markdown_table(*table(facts)),
        f"`bears`: the largest of these ratios whose drop is at most {facts['max_drop']:g}. It "
        "holds for the group alone; all together cost more. The same, by module, is `ratios` in "
        "sensitivity.json.",
        "![heat map of the drops](sensitivity.png)",
        f"Norm statistics: {norms}. Protected: {', '.join(facts['protect']) or 'nothing'}. Seed: "
        f"{facts['seed']}. Images for the criterion: {facts['calibration_images'] or 'none'}. The "
        f"dense net has {facts['params']:,} params and {facts['macs']:,} MACs at "
        f"{facts['image_size']} pixels. Machine: {facts['machine']}.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(facts: Facts, path: Path) -> None:
    """A heat map, groups x ratios, a panel per kind, in the order of the net."""
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from prune_dn.files import atomic_path

    ratios, kinds = _ratios(facts), list(dict.fromkeys(r["kind"] for r in facts["rows"]))
    names = {
        k: list(dict.fromkeys(r["name"] for r in facts["rows"] if r["kind"] == k)) for k in kinds
    }
    drops = {(r["name"], r["ratio"]): r["drop"] for r in facts["rows"]}
    worst = max((d for d in drops.values() if math.isfinite(d)), default=0.0)
    norm = PowerNorm(0.5, vmin=0.0, vmax=worst if worst > 0 else 1.0, clip=True)
    longest = max(len(of_kind) for of_kind in names.values())
    size = ((2.4 + 0.6 * len(ratios)) * len(kinds) + 1.2, max(0.19 * longest + 1.3, 2.8))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        cells = np.array([[drops.get((n, r), math.nan) for r in ratios] for n in names[kind]])
        axes.set_facecolor("#dddddd")
        image = axes.imshow(np.ma.masked_invalid(cells), norm=norm, cmap="YlOrRd", aspect="auto")
        for (row, column), drop in np.ndenumerate(cells):
            if math.isfinite(drop):
                dark = norm(drop) > 0.6
                text = _drop(facts, drop)
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "black",
                )
        labels = [n.removeprefix("features.") for n in names[kind]]
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios], fontsize=8)
        axes.set_title(f"{kind} units", fontsize=9)
        axes.set_xlabel("ratio cut", fontsize=8)
    label = f"drop in {facts['metric']} ({_drop_unit(facts)}), alone; grey: not measured"
    bar = figure.colorbar(image, ax=list(panels), aspect=40)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _balanced(images: ImageSet, limit: int, seed: int) -> ImageSet:
    """At most `limit` of the images, evenly from the classes."""
    import torch

    from prune_dn.data import ImageSet
    from prune_dn.sources import by_turns

    order = by_turns(images.labels, torch.Generator().manual_seed(seed))
    return ImageSet(images.images, images.indices[order[:limit].sort().values], images.spec)


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


def _summary(facts: Facts, out: Path) -> dict[str, str]:
    """What is printed below the table."""
    names, one = _names(facts), facts["one_image"]
    lines = {
        "dense": f"{_value(facts, facts['dense'])} {facts['metric']}",
        "images": f"{facts['n']:,}, split {facts['split']}",
        "groups that bear a ratio": f"{len(facts['ratios'])} of {len(names)}, at a drop of at most "
        f"{facts['max_drop']:g} {_drop_unit(facts)} each, alone",
        "written": ", ".join(str(out / f"sensitivity.{end}") for end in ("json", "md", "png")),
    }
    if one is not None and one > facts["max_drop"]:
        lines["coarse"] = f"one image is {one:.2f} points; use more images or a larger --max-drop"
    return lines


def _names(facts: Facts) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in facts["rows"]))


def _ratios(facts: Facts) -> list[float]:
    return sorted({row["ratio"] for row in facts["rows"]})


def _worst(
    cells: Mapping[tuple[str, float], Facts], name: str, ratios: Sequence[float]
) -> tuple[float, ...]:
    """Drops from the largest ratio down: what groups are ranked by. No figure counts as worst."""
    found = [cells[name, ratio]["drop"] for ratio in reversed(ratios) if (name, ratio) in cells]
    return tuple(math.inf if math.isnan(drop) else drop for drop in found)


def _drop_unit(facts: Facts) -> str:
    return "points" if facts["metric"] == "accuracy" else str(facts["value_unit"])


def _drop(facts: Facts, drop: float) -> str:
    return f"{drop:.2f}" if facts["metric"] == "accuracy" else f"{drop:.3f}"


def _value(facts: Facts, value: float) -> str:
    return f"{value:.2f} %" if facts["metric"] == "accuracy" else f"{value:.4f} nats"
