"""Accuracy, MACs, latency and time of our pruning beside Torch-Pruning, on one checkpoint.

    python tools/compare_pruners.py net.safetensors data/cifar10 --normalize cifar10
    python tools/compare_pruners.py net.safetensors data/cifar10 --ratios 0.5 --methods 'tp/*'
    python tools/compare_pruners.py net.safetensors data/cifar10 --epochs 1 --seeds 0 1 2
    python tools/compare_pruners.py vgg11.safetensors data/cifar10 --net vgg11 --normalize cifar10
    python tools/compare_pruners.py mine.safetensors photos --net mypackage.nets:build

A row is one method, one share of MACs and one seed: accuracy as the net is after the cut
(`one-shot`), after its norms' statistics were estimated anew (`recalibrated`) and, with `--epochs`,
after fine-tuning the recalibrated net, the same for everybody. All get the same training images,
plain ones, for the norms augmented by `--recalibration-augment` (what the net was trained with).
A seed draws the images and orders the fine-tuning. Torch-Pruning's ratio is found by bisection,
so that at least the asked share of MACs goes. A row is kept in OUT/results.jsonl as soon
as it is there; a run that was stopped goes on. OUT gets table.md and pareto.png; `--docs FILE NAME`
writes the table, and what it was measured on, between FILE's `<!-- NAME -->` and
`<!-- end NAME -->`, `--plot FILE` the plot there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from pruning_methods import latency_model, methods
from results import Row, chosen, measured, write_between
from safetensors.torch import load_file
from small_nets import NETS
from torch import nn

import prune_dn
from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.markdown import markdown_table
from prune_dn.data.augment import AUGMENTATIONS
from prune_dn.data.datasets import Datasets, calibration_batches, calibration_loader, load_datasets
from prune_dn.measure.latency import compare_latency, machine
from prune_dn.models.examples import example_image
from prune_dn.pruning import recalibrate_batch_norm_
from prune_dn.run.data_options import NORMALISATIONS
from prune_dn.run.rivals import macs_of
from prune_dn.training import FitConfig, evaluate, fit

ACCURACIES = ("one_shot", "recalibrated", "fine_tuned")
TIMES = tuple(
    f"{runtime}_batch{batch}" for runtime in ("eager", "onnxruntime") for batch in (1, 32)
)


class Comparison:
    """One checkpoint, its data, and how a row is measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.net = _net(given)
        self.methods = methods(self.net, given.round_to)
        self.chosen = chosen(self.methods, given.methods, "method")
        self.example = example_image(self.net, given.image_size)
        self.whole = macs_of(self.net, self.example)
        mean, std = NORMALISATIONS[given.normalize]
        self.data: Datasets = load_datasets(
            "image_folder", root=given.data, image_size=given.image_size, mean=mean, std=std
        )
        told = vars(given).items()
        left_out = ("ratios", "methods", "out", "seeds", "docs", "plot")
        self.settings = {key: str(value) for key, value in told if key not in left_out}
        for key, usual in (("round_to", 1), ("net", None)):  # rows from before there was a choice
            if getattr(given, key) == usual:
                self.settings.pop(key)
        self.settings["checkpoint"] = hashlib.sha256(given.checkpoint.read_bytes()).hexdigest()[:12]
        self.settings["machine"] = machine()

    def keys(self) -> list[Row]:
        """The rows that were asked for, the dense net first."""
        asked = [
            (r, name, s)
            for r in self.given.ratios
            for name in self.chosen
            for s in self.given.seeds
        ]
        rows = [{"method": name, "asked": ratio, "seed": seed} for ratio, name, seed in asked]
        dense = {"method": "dense", "asked": 0.0, "seed": self.given.seeds[0]}
        return [{**row, "settings": self.settings} for row in [dense, *rows]]

    def measure(self, key: Row) -> Row:
        """What one row's net is and does."""
        if key["method"].endswith("/latency"):
            latency_model(self.net.config, self.given.image_size)  # once for all: not in `seconds`
        start = time.perf_counter()
        try:
            model = self._cut(key)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        row: Row = {
            "seconds": time.perf_counter() - start,
            "macs_cut": 1 - macs_of(model, self.example) / self.whole,
            "params": sum(p.numel() for p in model.parameters()),
            "one_shot": self._accuracy(model),
        }
        if self.given.latency:
            row |= self._latency(model)
        loader = calibration_loader(
            self.data.train, 64, augment=self.given.recalibration_augment, seed=key["seed"]
        )
        recalibrate_batch_norm_(model, loader, max_batches=-(-self.given.recalibration // 64))
        row["recalibrated"] = self._accuracy(model)
        if self.given.epochs and key["asked"]:
            config = FitConfig(
                epochs=self.given.epochs,
                learning_rate=self.given.learning_rate,
                schedule="one_cycle",
                precision=self.given.precision,
            )
            row["fit_seconds"] = fit(
                model, self.data, config, seed=key["seed"], progress=False
            ).seconds
            row["fine_tuned"] = self._accuracy(model)
        return {**row, "images": len(getattr(self.data, self.given.split))}

    def _cut(self, key: Row) -> nn.Module:
        if not key["asked"]:
            return copy.deepcopy(self.net)
        seed, size = key["seed"], self.given.image_size
        batches = calibration_batches(self.data.train, self.given.calibration, seed=seed)
        return self.methods[key["method"]](self.net, key["asked"], batches, size, seed)

    def _accuracy(self, model: nn.Module) -> float:
        images = getattr(self.data, self.given.split)
        accuracy = evaluate(model, images, precision=self.given.precision).accuracy
        assert accuracy is not None
        return 100 * accuracy

    def _latency(self, model: nn.Module) -> Row:
        """Milliseconds of a batch, pruned and dense measured in turns, and their ratio."""
        row: Row = {}
        for name in TIMES:
            runtime, _, batch = name.partition("_batch")
            found = compare_latency(
                {"dense": self.net, "pruned": model},
                batch_size=int(batch),
                image_size=self.given.image_size,
                in_channels=self.example.shape[1],
                runtime=runtime,  # type: ignore[arg-type]
                repeats=self.given.repeats,
            )
            row[f"{name}_ms"] = found["pruned"].median_ms
            row[f"{name}_vs_dense"] = found["pruned"].median_ms / found["dense"].median_ms
        return row


def _net(given: argparse.Namespace) -> Any:
    """The net that is compared: what `prune_dn.load` makes, or the one that `--net` builds and the
    file's tensors fill."""
    if given.net is None:
        net = prune_dn.load(given.checkpoint)
        return (prune_dn.convert(net) if isinstance(net, prune_dn.DenseNet) else net).eval()
    if given.net in NETS:
        net = NETS[given.net]()
    else:
        module, _, function = given.net.partition(":")
        if not function:
            raise SystemExit(
                f"--net {given.net}: give MODULE:FUNCTION, or one of {', '.join(NETS)}"
            )
        net = getattr(import_module(module), function)()
    net.load_state_dict(load_file(given.checkpoint))
    return net.eval()


def table(rows: list[Row]) -> str:
    """Markdown, the best first within each share: means over seeds, and their spread."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["asked"], row["method"]), []).append(row)
    accuracies = [name for name in ACCURACIES if any(name in row for row in rows)]
    times = [name for name in TIMES if any(f"{name}_vs_dense" in row for row in rows)]
    head = ["method", "fewer MACs", "params", *(name.replace("_", "-") for name in accuracies)]
    head += [name.replace("_", " ").replace("batch", "batch ") for name in times]
    lines = []
    for (asked, method), found in groups.items():
        good = [row for row in found if "error" not in row]
        if not good:
            lines.append((asked, 0.0, [method, f"{asked:.0%}", "failed", *[""] * (len(head) - 2)]))
            continue
        cells = [f"{_mean(good, 'macs_cut'):.1%}", f"{_mean(good, 'params'):,.0f}"]
        cells += [_with_spread(good, name) for name in accuracies]
        cells += [f"{_mean(good, f'{name}_vs_dense'):.2f}x" for name in times]
        best = _mean(good, next(a for a in reversed(accuracies) if a in good[0]))
        lines.append((asked, -best, [method, *cells, f"{_mean(good, 'seconds'):.1f}"]))
    return markdown_table([*head, "seconds"], [line for *_, line in sorted(lines)]) + "\n"


def circumstances(rows: list[Row]) -> str:
    """Where and on what the rows were measured, a sentence or two for below the table."""
    settings = rows[0]["settings"]
    seeds = sorted({row["seed"] for row in rows})
    counted = [f"{row['images']:,}" for row in rows if "images" in row]
    widths = f"; widths are multiples of {settings['round_to']}" if "round_to" in settings else ""
    return (
        f"{settings['machine']}; {counted[0]} {settings['split']} images, precision "
        f"{settings['precision']}; {settings['calibration']} images for criteria and refits, "
        f"{settings['recalibration']} for recalibration (augmentation: "
        f"{settings['recalibration_augment']}); seeds {', '.join(map(str, seeds))}{widths}."
    )


def equal_accuracy(rows: list[Row], accuracy: str, latency: str) -> list[Row]:
    """Per row of Torch-Pruning: our fastest net that is at least as accurate, and their ratio."""
    rows = [row for row in rows if accuracy in row and f"{latency}_ms" in row]
    pairs = []
    for their in (row for row in rows if row["method"].startswith("tp/")):
        good = [
            row
            for row in rows
            if row["method"].startswith("ours/") and row[accuracy] >= their[accuracy]
        ]
        if good:
            best = min(good, key=lambda row: row[f"{latency}_vs_dense"])
            pairs.append(
                {
                    "theirs": f"{their['method']} {their['asked']:.0%}",
                    "ours": f"{best['method']} {best['asked']:.0%}",
                    "accuracy": (their[accuracy], best[accuracy]),
                    "latency_ratio": best[f"{latency}_vs_dense"] / their[f"{latency}_vs_dense"],
                }
            )
    return pairs


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy against MACs and, where it was measured, against latency; one line per method."""
    from matplotlib.figure import Figure

    accuracies = [name for name in ACCURACIES if any(name in row for row in rows)]
    against = ["macs_left", *(f"{t}_vs_dense" for t in TIMES if f"{t}_vs_dense" in rows[0])]
    rows = [{**row, "macs_left": 1 - row["macs_cut"]} for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["method"] for row in rows if row["asked"]))
    figure = Figure(figsize=(5 * len(accuracies), 4 * len(against) + 1), layout="constrained")
    panels = figure.subplots(len(against), len(accuracies), squeeze=False)
    for key, line in zip(against, panels, strict=True):
        for accuracy, axes in zip(accuracies, line, strict=True):
            for name in names:
                found = [r for r in rows if r["method"] == name and accuracy in r]
                points = sorted(
                    (_mean(same, key), _mean(same, accuracy))
                    for asked in {r["asked"] for r in found}
                    for same in [[r for r in found if r["asked"] == asked]]
                )
                ours = name.startswith("ours/")
                if points:
                    style = "-" if ours else "--"
                    axes.plot(*zip(*points, strict=True), style, marker=".", label=name)
            axes.axhline(rows[0]["one_shot"], color="#888888", lw=0.8)
            axes.set(xlabel=key.replace("_", " "), ylabel=f"{accuracy.replace('_', '-')}, %")
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _with_spread(rows: list[Row], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", help="image folder: train/CLASS, test/CLASS")
    parser.add_argument(
        "--net", help=f"the checkpoint's net: {', '.join(NETS)}, or MODULE:FUNCTION that builds it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare_pruners"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns: 'ours/*', 'tp/*'")
    parser.add_argument("--normalize", choices=sorted(NORMALISATIONS), default="imagenet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=384)
    parser.add_argument("--recalibration", type=int, default=1024)
    parser.add_argument(
        "--recalibration-augment", choices=sorted(AUGMENTATIONS), default="none", metavar="NAME"
    )
    parser.add_argument(
        "--round-to", type=int, default=1, help="of ours and Torch-Pruning's widths"
    )
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning, for everybody")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--latency", action="store_true", help="eager and onnxruntime, batch 1, 32")
    parser.add_argument("--repeats", type=int, default=30, help="of a latency measurement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--docs", nargs=2, metavar=("FILE", "NAME"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="instead of OUT/pareto.png")
    given = parser.parse_args(arguments)

    comparison = Comparison(given)
    rows: list[dict[str, Any]] = []
    for row in measured(given.out / "results.jsonl", comparison.keys(), comparison.measure):
        rows.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in shown.items() if k != "settings"}, flush=True)
    text = table(rows)
    write_text(given.out / "table.md", text)
    if any("error" not in row for row in rows[1:]):
        plot(rows, given.plot or given.out / "pareto.png")
    if given.docs:
        write_between(Path(given.docs[0]), given.docs[1], f"{text}\n{circumstances(rows)}\n")
    equal = {a: equal_accuracy(rows, a, "onnxruntime_batch1") for a in ACCURACIES}
    print(comparison.settings["machine"])
    print(json.dumps({"rows": rows, "equal_accuracy": equal}))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
