"""The command `compare`: our pruning of a checkpoint beside Torch-Pruning's; a table or JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_dn.base.console import show as _show
from prune_dn.base.intervals import percent, wilson
from prune_dn.cli import options
from prune_dn.cli.options import example, words
from prune_dn.errors import DataError, PruningError

if TYPE_CHECKING:
    from prune_dn.run.data_options import DataOptions
    from prune_dn.run.rivals import PrunerRow


@example(
    "compare dense.safetensors --data cifar10 --ratios 0.5 0.7",
    "compare dense.safetensors --data photos --ratios 0.5 --criteria l2,taylor --json",
)
def compare(
    checkpoint: options.Checkpoint,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[RATIO]...", hidden=True, show_default=False)
    ] = None,
    ratios: Annotated[
        str, typer.Option(metavar="RATIO...", help="Shares of the MACs to remove.")
    ] = "0.5",
    criteria: Annotated[
        str | None, typer.Option(help="Torch-Pruning's criteria.  [default: all of them]")
    ] = None,
    calibration: Annotated[
        int, options.images("Training images to score, refit and recalibrate with.")
    ] = 512,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    split: options.Split = "test",
    max_images: Annotated[int | None, options.images("Evaluate on at most so many images.")] = None,
    precision: options.Precision = "no",
    seed: options.Seed = 0,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Prune a checkpoint by our way and by Torch-Pruning's, and say how accurate each net is.

    Nothing is trained and nothing is written. All pruners see the same training images, and all nets
    are evaluated as pruned and after their norms' statistics were estimated anew on these. Needs
    Torch-Pruning: pip install 'prune_dn[compare]'.
    """
    from prune_dn.base.processes import process_state
    from prune_dn.run.data_options import DataOptions

    if data is not None and data_root is None and Path(data).is_dir():
        data, data_root = "image_folder", data
    facts = measure(
        checkpoint,
        DataOptions(data, data_root, image_size, resize, mean, std, normalize, seed=seed),
        ratios=_fractions([*ratios.split(","), *(more or ())]),
        criteria=None if criteria is None else words(criteria),
        calibration=calibration,
        split=split,
        max_images=max_images,
        precision=precision,
        progress=not as_json,
        ema=ema,
    )
    if process_state().is_main_process:
        hidden = ("rows", "best")
        lines = {key: value for key, value in facts.items() if key not in hidden}
        _show(facts, as_json, table=_table(facts), lines={**_sentences(facts), **lines})


def measure(
    checkpoint: Path,
    data: DataOptions,
    *,
    ratios: Sequence[float],
    criteria: Sequence[str] | None = None,
    calibration: int = 512,
    split: str = "test",
    max_images: int | None = None,
    precision: str = "no",
    progress: bool = False,
    ema: bool = False,
) -> dict[str, Any]:
    """All that is found, ready for JSON.

    Raises PruneDNError for bad input, before anything is pruned.
    """
    from prune_dn.base.processes import process_state
    from prune_dn.checkpoints.opened import open_checkpoint
    from prune_dn.data.datasets import calibration_batches, calibration_loader
    from prune_dn.measure.latency import machine
    from prune_dn.run.rivals import THEIR_CRITERIA, best_of, check_torch_pruning, compare_pruners
    from prune_dn.training import evaluate as score
    from prune_dn.training.progress import display

    check_torch_pruning()
    if split not in ("test", "val"):
        raise DataError(f"--split {split!r} is unknown; choose test or val")
    if precision not in ("no", "bf16"):
        raise DataError(f"--precision {precision!r} is unknown; choose no or bf16")
    model, info = open_checkpoint(checkpoint, ema)
    sets, pixels = data.load(info, model, checkpoint)
    images = getattr(sets, split)
    if max_images is not None:
        images = images.balanced(max_images, data.seed)
    seen = calibration_batches(sets.train, calibration, seed=data.seed)
    augment = info.get("augment", "none")
    loader = calibration_loader(sets.train, 64, augment=augment, seed=data.seed)
    chosen = THEIR_CRITERIA if criteria is None else criteria
    found = compare_pruners(
        model,
        ratios,
        calibration=seen,
        evaluate=lambda net: score(net, images, precision=precision),
        recalibration=list(itertools.islice(loader, -(-calibration // 64))),
        criteria=chosen,
        seed=data.seed,
    )
    state = process_state()
    rows: list[PrunerRow] = []
    with display("compare", 1, 0, progress and state.is_main_process) as shown:
        total = 1 + len(ratios) * (1 + 2 * len(chosen))
        for row in found:
            rows.append(row)
            shown.bar.update(shown.task, completed=len(rows), total=total)
    best = {}
    for ratio in ratios:
        found_best = (best_of(rows, side, ratio) for side in ("ours/", "torch-pruning/"))
        best[f"{ratio:g}"] = [row.method for row in found_best if row is not None]
    return {
        "checkpoint": str(checkpoint),
        "data": sets.spec.name,
        "split": split,
        "n": len(images),
        "precision": precision,
        "calibration_images": sum(len(batch[1]) for batch in seen),
        "seed": data.seed,
        "machine": machine(state.device),
        "images": pixels,
        "best": best,
        "rows": [_with_intervals(row) for row in rows],
    }


def _with_intervals(row: PrunerRow) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    for key in ("one_shot", "recalibrated"):
        if found[key] is not None:
            found[f"{key}_interval"] = wilson(found[key], row.n)
    return found


def _table(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "asked", "fewer MACs", "params", "as pruned", "recalibrated", "seconds"]
    lines = []
    for row in facts["rows"]:
        if row["error"] is not None:
            lines.append([row["method"], _share(row["ratio"]), "failed", "", "", "", ""])
            continue
        accuracies = [
            "none" if row[key] is None else percent(row[key], row["n"])
            for key in ("one_shot", "recalibrated")
        ]
        what = [row["method"], _share(row["ratio"]), f"{row['macs_cut']:.1%}"]
        lines.append([*what, f"{row['params']:,}", *accuracies, f"{row['seconds']:.1f}"])
    return header, lines


def _sentences(facts: dict[str, Any]) -> dict[str, Any]:
    """For people: the best of each side at each ratio, what it lost, and what failed and why."""
    rows = facts["rows"]
    dense = max(_accuracies(rows[0]))
    said: dict[str, Any] = {}
    for ratio, methods in facts["best"].items():
        parts = []
        for method in methods:
            row = next(r for r in rows if r["method"] == method and f"{r['ratio']:g}" == ratio)
            accuracy = max(_accuracies(row))
            lost = 100 * (dense - accuracy)
            parts.append(f"{method} {100 * accuracy:.2f} % ({lost:.2f} points lost)")
        said[f"best at {_share(ratio)} fewer MACs"] = "; ".join(parts) or "none"
    failed = {
        f"{row['method']} at {_share(row['ratio'])}": row["error"] for row in rows if row["error"]
    }
    return {**said, **({"failed": failed} if failed else {})}


def _accuracies(row: dict[str, Any]) -> list[float]:
    return [row[key] for key in ("one_shot", "recalibrated") if row[key] is not None]


def _share(ratio: float | str) -> str:
    return f"{100 * float(ratio):g}%"


def _fractions(texts: Iterable[str]) -> list[float]:
    try:
        found = [float(text) for text in texts]
    except ValueError as error:
        raise PruningError(f"--ratios: {error}; give fractions, such as 0.5 0.7") from None
    if repeated := {ratio for ratio in found if found.count(ratio) > 1}:
        raise PruningError(f"--ratios has {min(repeated):g} twice; leave one of them out")
    return found
