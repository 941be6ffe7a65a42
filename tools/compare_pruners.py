"""Accuracy, MACs, latency and time of our pruning beside Torch-Pruning, on one checkpoint.

    python tools/compare_pruners.py net.safetensors data/cifar10 --normalize cifar10
    python tools/compare_pruners.py net.safetensors data/cifar10 --ratios 0.5 --methods 'tp/*'

Every row is one-shot: nothing is fine-tuned. All get the same calibration and recalibration images,
plain training images; `recalibrated` is the accuracy after the norms' statistics were estimated
anew, for everybody. Torch-Pruning's ratio is found by bisection, so that at least the asked share of
MACs goes. A row is kept in OUT/results.jsonl as soon as it is there; a run that was stopped goes on.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prune_dn
from prune_dn.data import calibration_batches, calibration_loader, load_datasets
from prune_dn.files import write_text
from prune_dn.jobs import NORMALISATIONS
from prune_dn.latency import compare_latency, machine
from prune_dn.models import DenseNet
from prune_dn.pruning import CRITERIA, recalibrate_batch_norm_
from prune_dn.pruning.importance import reads_images
from prune_dn.training import evaluate

Batches = list[tuple[Tensor, Tensor]]
Method = Callable[[DenseNet, float, Batches, int], nn.Module]
UNITS = {
    "stream": ("stream",),
    "edge": ("edge",),
    "bottleneck": ("bottleneck",),
    "stream+bottleneck": ("stream", "bottleneck"),
    "all": ("stream", "bottleneck", "edge"),
}
THEIRS = ("bn_scale", "l1", "l2", "taylor", "lamp", "fpgm")
COLUMNS = ("method", "asked", "macs cut", "params", "one-shot", "recalibrated", "seconds")


def ours(criterion: str, compensate: str, units: tuple[str, ...]) -> Method:
    """Our `prune` with these choices."""

    def cut(net: DenseNet, ratio: float, batches: Batches, size: int) -> nn.Module:
        needs = reads_images(criterion) or compensate != "none"
        return prune_dn.prune(
            net,
            ratio,
            unit="macs",
            criterion=criterion,
            compensate=compensate,
            units=units,
            calibration=batches if needs else None,
            input_size=size,
        )

    return cut


def theirs(criterion: str, global_pruning: bool) -> Method:
    """Torch-Pruning's BasePruner with these choices, its ratio bisected to the MACs asked for."""
    import torch_pruning as tp

    importance = {
        "bn_scale": tp.importance.BNScaleImportance,
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
    }[criterion]

    def once(net: DenseNet, ratio: float, batches: Batches, size: int) -> nn.Module:
        model = copy.deepcopy(net).eval()
        if criterion == "taylor":
            for images, labels in batches:
                F.cross_entropy(model(images), labels, reduction="sum").backward()
        tp.pruner.BasePruner(
            model,
            torch.zeros(1, net.config.in_channels, size, size),
            importance=importance(),
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            global_pruning=global_pruning,
            ignored_layers=[model.classifier],
        ).step()
        model.zero_grad()
        return model

    def cut(net: DenseNet, ratio: float, batches: Batches, size: int) -> nn.Module:
        whole, low, high, best = macs_of(net, size), 0.0, 1.0, None
        for _ in range(8):
            middle = (low + high) / 2
            model = once(net, middle, batches, size)
            if macs_of(model, size) <= (1 - ratio) * whole:
                high, best = middle, model
            else:
                low = middle
        if best is None:
            raise RuntimeError(f"no ratio removes {ratio:.0%} of the MACs")
        return best

    return cut


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for criterion in sorted(CRITERIA):
        for compensate in ("none", "mean", "least_squares"):
            for name, units in UNITS.items():
                found[f"ours/{criterion}/{compensate}/{name}"] = ours(criterion, compensate, units)
    for criterion in THEIRS:
        for scope in ("global", "local"):
            found[f"tp/{criterion}/{scope}"] = theirs(criterion, scope == "global")
    return found


def macs_of(model: nn.Module, size: int) -> int:
    """MACs of one image, by torch's counter: the same for both sides."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops()) // 2


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, best first within each ratio."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in sorted(rows, key=lambda r: (r["asked"], -r.get("recalibrated", 0))):
        if "error" in row:
            lines.append(f"| {row['method']} | {row['asked']:.0%} | error: {row['error']} |||||")
            continue
        lines.append(
            f"| {row['method']} | {row['asked']:.0%} | {row['macs_cut']:.1%} | {row['params']:,} | "
            f"{row['one_shot']:.2f} | {row['recalibrated']:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", help="image folder: train/CLASS, test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_pruners"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns: 'ours/*', 'tp/*'")
    parser.add_argument("--normalize", choices=sorted(NORMALISATIONS), default="imagenet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=384)
    parser.add_argument("--recalibration", type=int, default=1024)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--latency", action="store_true", help="eager and onnxruntime, batch 1, 32")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    mean, std = NORMALISATIONS[given.normalize]
    net = prune_dn.load(given.checkpoint).eval()
    data = load_datasets(
        "image_folder",
        root=given.data,
        image_size=given.image_size,
        mean=mean,
        std=std,
        seed=given.seed,
    )
    batches = calibration_batches(data.train, given.calibration, seed=given.seed)
    loader = calibration_loader(data.train, 64, seed=given.seed)
    images = getattr(data, given.split)
    whole = macs_of(net, given.image_size)
    settings = {
        key: str(value)
        for key, value in vars(given).items()
        if key not in ("ratios", "methods", "out")
    }
    settings["checkpoint"] = hashlib.sha256(given.checkpoint.read_bytes()).hexdigest()[:12]
    settings["machine"] = machine(torch.device("cpu"))

    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "results.jsonl"
    # The last line may be half a line, of a run that was killed while it wrote.
    kept = results.read_text().splitlines() if results.exists() else []
    kept = [line for line in kept if line.endswith("}")]
    write_text(results, "".join(line + "\n" for line in kept))
    mine = [row for row in map(json.loads, kept) if row["settings"] == settings]
    done = {(row["method"], row["asked"]): row for row in mine if "error" not in row}

    def measure(method: str, asked: float, cut: Callable[[], nn.Module]) -> dict[str, Any]:
        row: dict[str, Any] = {"method": method, "asked": asked, "settings": settings}
        start = time.perf_counter()
        try:
            model = cut()
        except Exception as error:
            return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        row["seconds"] = time.perf_counter() - start
        row["macs_cut"] = 1 - macs_of(model, given.image_size) / whole
        row["params"] = sum(p.numel() for p in model.parameters())
        score = evaluate(model, images, precision=given.precision)
        row["one_shot"], row["images"] = 100 * score.accuracy, score.n
        recalibrate_batch_norm_(model, loader, max_batches=-(-given.recalibration // 64))
        row["recalibrated"] = 100 * evaluate(model, images, precision=given.precision).accuracy
        if given.latency:
            for runtime in ("eager", "onnxruntime"):
                for batch in (1, 32):
                    found = compare_latency(
                        {"dense": net, "pruned": model},
                        batch_size=batch,
                        image_size=given.image_size,
                        in_channels=net.config.in_channels,
                        runtime=runtime,
                    )
                    ratio = found["pruned"].median_ms / found["dense"].median_ms
                    row[f"{runtime}_batch{batch}_vs_dense"] = ratio
        return row

    wanted = {
        name: method
        for name, method in methods().items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in given.methods)
    }
    jobs: list[tuple[str, float, Callable[[], nn.Module]]] = [
        ("dense", 0.0, lambda: copy.deepcopy(net))
    ]
    for asked in given.ratios:
        for name, method in wanted.items():
            jobs.append((name, asked, partial(method, net, asked, batches, given.image_size)))
    rows = []
    for name, asked, cut in jobs:
        row = done.get((name, asked)) or measure(name, asked, cut)
        if (name, asked) not in done:
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in shown.items() if k != "settings"}, flush=True)
    write_text(given.out / "table.md", table(rows))
    print(f"{settings['machine']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(json.dumps({"rows": rows}))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
