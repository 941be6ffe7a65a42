"""Time and memory of scoring and refit with calibration images, each in a process of its own.

    python tools/bench_calibration.py                      # densenet121 and resnet50, 256 images of 224 pixels
    python tools/bench_calibration.py resnet50 --images 64

Scoring is `reconstruction` of the dense net, the refit `least_squares` of a net that was cut to half the
multiply-adds by `l2`; weights are random, batches of 32. Seconds are of the CPU, one thread, and also per
multiply-add of the dense net on all images; memory is the largest resident set of the process, and what it
was before the step (torch, the net and the images). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from results import chosen

import prune_dn
from prune_dn.data.batches import read_batches
from prune_dn.measure.latency import machine
from prune_dn.pruning.importance import importance
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units

NETS = ("densenet121", "resnet50")
STEPS = ("scoring", "refit")
BATCH, SIZE = 32, 224


def peak() -> float:
    """The largest resident set of this process so far, in GB: VmHWM, which a new program starts anew."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit("this system does not say the largest resident set of a process")


def measure(name: str, step: str, images: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)().eval()
    parts = torch.full((images // BATCH,), BATCH).tolist() + [images % BATCH] * (images % BATCH > 0)
    batches = [torch.randn(n, 3, SIZE, SIZE) for n in parts]
    gmacs = prune_dn.count(net, SIZE).macs * images / 1e9
    if step == "scoring":
        given = subject(net, SIZE)
        table, data = Units(given.graph), read_batches(batches, loss="softmax")
        before, start = peak(), time.process_time()
        importance(given.model, table, "reconstruction", calibration=data)
    else:
        plan = prune_dn.make_plan(net, 0.5, unit="macs", criterion="l2", input_size=SIZE)
        small = prune_dn.apply_plan(net, plan)
        before, start = peak(), time.process_time()
        prune_dn.compensate_plan(small, net, plan, batches, loss="softmax")
    seconds = time.process_time() - start
    return {
        "net": name,
        "step": step,
        "images": images,
        "cpu_s": round(seconds, 1),
        "cpu_ms_per_gmac": round(seconds * 1e3 / gmacs, 1),
        "peak_gb": round(peak(), 2),
        "before_gb": round(before, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NET", help="nets of torchvision")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a child
    given = parser.parse_args(arguments)
    nets = chosen(torchvision.models.list_models(module=torchvision.models), given.nets, "net")
    if given.step is not None:
        print(json.dumps(measure(nets[0], given.step, given.images)))
        return
    print(machine(threads=1))
    rows = []
    for name in nets:
        for step in STEPS:
            command = [
                sys.executable,
                __file__,
                name,
                "--images",
                str(given.images),
                "--step",
                step,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    print(json.dumps({"machine": machine(threads=1), "rows": rows}))


if __name__ == "__main__":
    main()
