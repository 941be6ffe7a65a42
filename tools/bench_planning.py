"""How long plan and surgery take, beside Torch-Pruning, on the same nets in the same run.

    python tools/bench_planning.py                   # densenet121, 169, 201, 264
    python tools/bench_planning.py densenet121       # one of them

Data-free pruning at ratio 0.5 by BN scale. Both sides get torchvision's module (264: ours only,
torchvision has none) and include everything from that module to the pruned one. Ours is the median
of n runs; Torch-Pruning, which takes seconds, runs once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from results import chosen
from torch import nn

import prune_dn
from prune_dn.measure.latency import machine
from prune_dn.models import BUILDERS, LIGHT_CNNS

NETS = ("densenet121", "densenet169", "densenet201", "densenet264")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_pruning(model: nn.Module) -> None:
    """Torch-Pruning's BN-scale pruner, one step at 0.5, as its README shows it."""
    import torch_pruning as tp

    pruner = tp.pruner.BNScalePruner(
        model,
        torch.randn(1, 3, 224, 224),
        importance=tp.importance.BNScaleImportance(),
        pruning_ratio=0.5,
        global_pruning=True,
        ignored_layers=[model.classifier],
    )
    pruner.step()


def measure(name: str, repeats: int) -> dict[str, Any]:
    known = hasattr(torchvision.models, name)
    model = getattr(torchvision.models, name)() if known else BUILDERS[name]()
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    prune_dn.prune(model, 0.5)
    ours = statistics.median(seconds(lambda: prune_dn.prune(model, 0.5)) for _ in range(repeats))
    row = {"net": name, "convs": layers, "ours_s": round(ours, 4), "n": repeats}
    if known:
        theirs = seconds(lambda: torch_pruning(model))
        row.update(torch_pruning_s=round(theirs, 2), ratio=round(theirs / ours, 1))
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NET", help="patterns of builders")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    known = [name for name in BUILDERS if name not in (*LIGHT_CNNS, "densenet")]
    nets = chosen(known, given.nets, "net")
    print(machine())
    rows = []
    for name in nets:
        rows.append(measure(name, given.repeats))
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
