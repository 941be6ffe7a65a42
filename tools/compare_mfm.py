"""Max-Feature-Map beside the pruning that replaces it, on one small DenseNet: accuracy and costs.

    python tools/compare_mfm.py --seeds 0 2 & python tools/compare_mfm.py --seeds 1
    python tools/compare_mfm.py --latency --docs docs/mfm.md

A row is a recipe of recipes/mfm_table/, run once per seed, which sets the weights, the order of the
images and the validation split. A recipe that names a model trains a starting point. The others go
on from such a net's checkpoint: whole and trained on, or cut and fine-tuned, with as many steps.

A row is kept in OUT/SEED/results.jsonl as soon as it is there; a run that was stopped goes on, also
within a row. `training MB` are what autograd saves for one step (float32, batch 64, memory_efficient
off). `--latency` times the nets of the first seed in turns: on an idle machine, once all are there.
OUT gets table.md and mfm.png; `--docs FILE` writes the table between FILE's `<!-- mfm table -->` and
`<!-- end mfm table -->`, and the plot beside FILE. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import saved_bytes
from results import Row, chosen, measured, write_between
from torch.nn import functional as F

import prune_dn
from prune_dn.base.files import atomic_path, write_text
from prune_dn.base.markdown import markdown_table
from prune_dn.base.yaml_lines import parse
from prune_dn.data.sources import DATASETS
from prune_dn.measure.latency import compare_latency, machine
from prune_dn.models import DenseNet
from prune_dn.run import pipeline
from prune_dn.run.recipe import Recipe
from prune_dn.run.recipe_file import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "mfm_table"
TIMES: tuple[tuple[Any, int], ...] = (("eager", 32), ("onnxruntime", 1))
BATCH = 64  # of the training step whose bytes are counted


class Table:
    """The recipes of a folder, and the folder of their runs: `out`/SEED/RECIPE."""

    def __init__(self, recipes: Path, out: Path, patterns: Sequence[str]) -> None:
        self.files = {path.stem: path for path in sorted(recipes.glob("*.yaml"))}
        self.out = out
        wanted = chosen(self.files, patterns, f"recipe in {recipes}")
        self.rows = [name for name in wanted if self.start(name) is not None]
        starts = {self.start(name) for name in self.rows} | {*wanted} - {*self.rows}
        self.starts = [name for name in self.files if name in starts]

    def start(self, name: str) -> str | None:
        """The recipe whose checkpoint this one reads; None for a starting point."""
        checkpoint = load_recipe(self.files[name]).model.checkpoint
        return None if checkpoint is None else Path(checkpoint).parent.name

    def title(self, name: str) -> str:
        """What a row is: the first line of its recipe."""
        return self.files[name].read_text(encoding="utf-8").splitlines()[0].strip("# .")

    def recipe(self, name: str, seed: int) -> Recipe:
        """A recipe as it runs here: with this seed, and nothing exported or timed."""
        start, folder = self.start(name), self.out / str(seed)
        settings: Row = {"seed": seed, "output_dir": str(folder / name)}
        settings["export"] = {"onnx": False, "state_dict": False}
        settings["report"] = {"batch_sizes": [1], "repeats": 1}
        if start is not None:
            settings["model.checkpoint"] = str(folder / start / "dense.safetensors")
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return load_recipe(self.files[name], overrides)

    def key(self, name: str, seed: int) -> Row:
        """What tells a measured row from others, also from one of another recipe or start."""
        names = [n for n in (self.start(name), name) if n is not None]
        said = json.dumps([parse(self.files[n].read_text(encoding="utf-8")).value for n in names])
        return {"row": name, "seed": seed, "recipe": hashlib.sha256(said.encode()).hexdigest()[:12]}

    def measure(self, key: Row) -> Row:
        """Run a recipe, or what is left to run of it: the net's accuracy and costs."""
        recipe = self.recipe(key["row"], key["seed"])
        result = pipeline.run(recipe, progress=False)
        assert isinstance(result.model, DenseNet)
        metrics, stages = result.metrics, result.metrics["stages"]
        last = list(stages.values())[-1]
        return {
            "accuracy": 100 * last["test_accuracy"],
            "val_accuracy": 100 * last["val_accuracy"],
            "as_cut": 100 * stages["pruned"]["test_accuracy"] if recipe.prune else None,
            "images": last["n_test"],
            "params": last["params"],
            "macs": last["macs"],
            "training_mb": _training_bytes(result.model, metrics["data"]["image_size"]) / 1e6,
            "steps": sum(rows[-1]["step"] for rows in metrics["history"].values()),
            "seconds": sum(phase["seconds"] for phase in metrics["phases"].values()),
            "machine": machine(),
        }

    def measured(self, seed: int) -> list[Row]:
        """The rows of one seed, without the starting points."""
        keys = [self.key(name, seed) for name in [*self.starts, *self.rows]]
        found = []
        for row in measured(self.out / str(seed) / "results.jsonl", keys, self.measure):
            print(json.dumps(row), flush=True)
            found += [row] if row["row"] in self.rows else []
        return found

    def timed(self, seed: int, repeats: int) -> list[Row]:
        """Latencies of all rows' nets of one seed, a row per runtime and batch size."""
        nets, digests, size = {}, {}, 0
        for name in self.rows:
            folder = self.out / str(seed) / name
            file = "dense" if load_recipe(self.files[name]).prune is None else "pruned"
            path = folder / f"{file}.safetensors"
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            nets[name] = prune_dn.load(path).eval()
            size = json.loads((folder / "metrics.json").read_text())["data"]["image_size"]

        def take(key: Row) -> Row:
            runtime, batch = key["runtime"], key["batch_size"]
            found = compare_latency(
                nets, batch_size=batch, image_size=size, runtime=runtime, repeats=repeats
            )
            return {"latency": {name: dataclasses.asdict(times) for name, times in found.items()}}

        keys = [{"runtime": r, "batch_size": b, "seed": seed, "nets": digests} for r, b in TIMES]
        return list(measured(self.out / "latency.jsonl", keys, take))


@contextlib.contextmanager
def _decoded_once() -> Iterator[None]:
    """Inside, all runs share the decoded images."""
    kept = dict(DATASETS)
    DATASETS.update({name: functools.cache(load) for name, load in kept.items()})
    try:
        yield
    finally:
        DATASETS.update(kept)


def _training_bytes(model: prune_dn.DenseNet, image_size: int) -> int:
    model.memory_efficient = False
    images = torch.zeros(BATCH, model.config.in_channels, image_size, image_size)
    labels = torch.zeros(BATCH, dtype=torch.long)
    model.train()
    return saved_bytes(model, lambda: F.cross_entropy(model(images), labels))


def by_macs(table: Table, rows: Sequence[Row]) -> list[list[tuple[str, list[Row]]]]:
    """Names and their rows, most MACs first; equal ones (steps of at most 1 %) the best first."""
    nets = [(name, [row for row in rows if row["row"] == name]) for name in table.rows]
    nets.sort(key=lambda net: -_mean(net[1], "macs"))
    step = 0.01 * _mean(nets[0][1], "macs")
    groups, last = [], float("inf")
    for net in nets:
        macs = _mean(net[1], "macs")
        if last - macs > step:
            groups.append([net])
        else:
            groups[-1].append(net)
        last = macs
    return [sorted(group, key=lambda net: -_mean(net[1], "accuracy")) for group in groups]


def markdown(table: Table, rows: Sequence[Row], times: Sequence[Row]) -> str:
    """The table: means over seeds and their spread (standard deviation), also of what each seed's net
    has above that seed's net in the first line."""
    head = ["net", "test accuracy, %", "points above the first", "as cut, %"]
    head += ["params", "MMACs", "training MB"]
    head += [f"ms, {t['runtime']}, batch {t['batch_size']}" for t in times]
    nets = list(itertools.chain(*by_macs(table, rows)))
    first = {row["seed"]: row["accuracy"] for row in nets[0][1]}
    lines: list[list[str]] = []
    for name, found in nets:
        cells = [table.title(name), _spread([row["accuracy"] for row in found])]
        above = [row["accuracy"] - first[row["seed"]] for row in found]
        cells += [_spread(above, "+") if lines else ""]
        cells += [_spread([row["as_cut"] for row in found if row["as_cut"] is not None])]
        cells += [f"{_mean(found, 'params'):,.0f}", f"{_mean(found, 'macs') / 1e6:.2f}"]
        cells += [f"{_mean(found, 'training_mb'):.1f}"]
        cells += [f"{t['latency'][name]['median_ms']:.2f}" for t in times]
        lines.append(cells)
    return markdown_table(head, lines) + "\n"


def plot(table: Table, rows: Sequence[Row], path: Path) -> None:
    """Test accuracy against MACs; bars are the spread over seeds. Circles are whole nets."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes, color = figure.subplots(), itertools.cycle(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for equal in by_macs(table, rows):
        center = statistics.fmean(_mean(found, "macs") for _, found in equal) / 1e6
        for number, (name, found) in enumerate(equal):
            whole = found[0]["as_cut"] is None
            axes.errorbar(
                center + 0.06 * (number - (len(equal) - 1) / 2),
                _mean(found, "accuracy"),
                yerr=_deviation([row["accuracy"] for row in found]),
                fmt="o" if whole else "s",
                color=next(color),
                capsize=3,
                label=table.title(name),
            )
    label = "million MACs (nets of equal MACs, to 1 %, are drawn side by side)"
    axes.set(xlabel=label, ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {_deviation(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/mfm_table"))
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="a folder")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of recipes' names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--latency", action="store_true", help="eager batch 32, onnxruntime batch 1"
    )
    parser.add_argument("--repeats", type=int, default=100, help="of a latency measurement")
    parser.add_argument("--docs", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)

    table = Table(given.recipes, given.out, given.rows)
    if not table.rows:
        parser.error(f"{given.recipes} has no recipe with a checkpoint among {given.rows}")
    with _decoded_once():
        rows = [row for seed in given.seeds for row in table.measured(seed)]
    times = table.timed(given.seeds[0], given.repeats) if given.latency else []
    text = markdown(table, rows, times)
    write_text(given.out / "table.md", text)
    plot(table, rows, given.out / "mfm.png")
    if given.docs:
        write_between(given.docs, "mfm table", text)
        plot(table, rows, given.docs.with_suffix(".png"))
    print(json.dumps({"rows": rows, "latency": times}))


if __name__ == "__main__":
    main()
