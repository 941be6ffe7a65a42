"""How long a net's channels take to be found, beside Torch-Pruning, on the same nets in the same run.

    python tools/bench_tracing.py                    # densenet201 and a U-Net
    python tools/bench_tracing.py unet --image-size 128

Seconds of CPU on one thread: `trace` (median of n runs) and Torch-Pruning's `build_dependency` with all its
groups (once), from the same module and image. The last line is JSON.
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
from torch import Tensor, nn

from prune_dn.graph import trace
from prune_dn.graph.classes import channel_classes
from prune_dn.measure.latency import machine


class UNet(nn.Module):
    """A DenseNet-121 as encoder, skip connections out of its blocks, a prediction per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.densenet121().features
        wide = (1024, 1024, 512, 256, 64)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a + b, b // 2, 3, padding=1), nn.BatchNorm2d(b // 2), nn.ReLU())
            for a, b in zip((1024, 512, 256, 128), wide[1:], strict=True)
        )
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for name, part in self.features.named_children():
            x = part(x)
            if name == "relu0" or name in ("denseblock1", "denseblock2", "denseblock3"):
                skips.append(x)
        for part, skip in zip(self.up, reversed(skips), strict=True):
            x = nn.functional.interpolate(x, size=skip.shape[2:])
            x = part(torch.cat([x, skip], 1))
        answer: Tensor = self.out(x)
        return answer


NETS: dict[str, Callable[[], nn.Module]] = {
    "densenet121": torchvision.models.densenet121,
    "densenet201": torchvision.models.densenet201,
    "unet": UNet,
}


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def torch_pruning(net: nn.Module, image: Tensor) -> int:
    """Its dependency graph, and how many groups of convs' outputs it finds."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(net, image)
    return len(list(graph.get_all_groups(root_module_types=(nn.Conv2d,))))


def measure(name: str, size: int, repeats: int) -> dict[str, Any]:
    net, image = NETS[name]().eval(), torch.zeros(1, 3, size, size)
    trace(net, image)
    ours = statistics.median(cpu_seconds(lambda: trace(net, image)) for _ in range(repeats))
    groups: list[int] = []
    theirs = cpu_seconds(lambda: groups.append(torch_pruning(net, image)))
    row: dict[str, Any] = {"net": name, "pixels": size, "ours_cpu_s": round(ours, 2), "n": repeats}
    row |= {"groups": len(channel_classes(trace(net, image))[1]), "torch_pruning_groups": groups[0]}
    return {**row, "torch_pruning_cpu_s": round(theirs, 2), "ratio": round(theirs / ours, 1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=["densenet201", "unet"], metavar="NET")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    rows = []
    for name in chosen(NETS, given.nets, "net"):
        rows.append(measure(name, given.image_size, given.repeats))
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
