"""How much of the MACs that a cut removes becomes time, on torchvision's DenseNet-121.

    python tools/bench_latency.py
    python tools/bench_latency.py --ratios 0.3 0.5 --image-size 128 --batch-size 8

Random weights, cut by l2 to a share of the MACs: as the cut falls, with widths rounded to blocks of
16 channels, and with whole layers among the units too. All nets are timed in turns, per runtime. The
last column is the speed-up over the reduction of MACs; 1 means that all MACs became time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torchvision
from torch import nn

import prune_dn
from prune_dn.base.markdown import markdown_table
from prune_dn.measure.latency import compare_latency, machine

RUNTIMES = ("onnxruntime", "eager")
CUTS: dict[str, dict[str, Any]] = {
    "as it falls": {},
    "round_to=16": {"round_to": 16},
    "round_to=16, whole layers": {"round_to": 16, "units": ("stream", "bottleneck", "layer")},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES, metavar="RUNTIME"
    )
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    net = prune_dn.convert(torchvision.models.densenet121()).eval()
    nets: dict[str, nn.Module] = {"dense": net}
    for ratio in given.ratios:
        for name, options in CUTS.items():
            choices: dict[str, Any] = {
                "unit": "macs",
                "criterion": "l2",
                "input_size": given.image_size,
                **options,
            }
            nets[f"{ratio:.0%} {name}"] = prune_dn.prune(net, ratio, **choices)
    macs = {name: prune_dn.count(made, given.image_size).macs for name, made in nets.items()}
    rows = []
    for runtime in given.runtimes:
        found = compare_latency(
            nets,
            batch_size=given.batch_size,
            image_size=given.image_size,
            repeats=given.repeats,
            runtime=runtime,
        )
        for name, latency in found.items():
            time = latency.median_ms / found["dense"].median_ms
            left = macs[name] / macs["dense"]
            cells = [
                f"{latency.median_ms:.2f}",
                f"{time:.3f}x",
                f"{left:.3f}x",
                f"{left / time:.2f}",
            ]
            rows.append([runtime, name, *cells])
    head = ["runtime", "net", "ms", "time", "MACs", "speed-up / MAC reduction"]
    print(markdown_table(head, rows))
    print(f"\n{machine()}; batch {given.batch_size}, medians of n = {given.repeats}")


if __name__ == "__main__":
    main()
