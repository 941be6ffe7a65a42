"""What a training step costs: bytes, peak memory and time of ours beside everybody's, in one run.

    python tools/bench_training.py                                  # about 15 minutes on 2 cores
    python tools/bench_training.py --docs docs/training.md          # and its tables and plot there
    python tools/bench_training.py --nets bc100 --timed bc100 --max-seconds 600

Nets: `bcDEPTH` (DenseNet-BC, k = 12, 32x32 images) and torchvision's (224x224). Variants: `naive`
(our plain net), `torchvision-plain`, torchvision's and timm's `memory_efficient`, `checkpoint`
(concatenation, norm, ReLU and 1x1 conv recomputed, as gpleiss/efficient_densenet_pytorch has it),
`ours-1` and `ours-2`. All get the same weights, images and labels. Three kinds of row:

saved   unique bytes that autograd saves in a forward pass. Of a part that is recomputed these are
        its inputs; what the recomputation makes for a while shows in the peak only.
peak    by how much --steps steps raise the peak of a fresh process (CUDA: of the allocator)
        above what net and data take.
time    forward, loss, backward and SGD step: all variants in both memory formats in one process,
        in turns; median of n. Ratios are to the fastest plain one of the same run. Before that one
        step of each must give the same loss and gradient norm.

Only the nets of --timed are timed. The deeper BC nets have a batch of 8, so bytes are given per
image. What is left of --max-seconds is shared among the timings; each has at least one round, so
the whole can take longer. A row is kept in OUT/results.jsonl as soon as it is there; a run that was
stopped goes on. OUT gets tables and a plot, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from memory import saved_bytes
from results import Row, chosen, measured
from torch import Tensor
from training_report import exponents, write_report
from training_variants import PLAIN, VARIANTS, build, cannot, find_net

from prune_dn.measure.latency import in_turns, machine
from prune_dn.models import fused

NETS = ("bc40", "bc100", "bc190", "bc250", "densenet121", "densenet201")
TIMED = ("bc40", "bc100", "densenet121")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of losses and gradient norms


class Training:
    """A variant of a net with a batch of random images and its optimizer."""

    def __init__(self, key: Row, variant: str, layout: str, device: str) -> None:
        net, self.device = find_net(key["net"]), device
        self.dtype = PRECISIONS[key["precision"]]
        self.model = build(net, variant).to(device).to(memory_format=LAYOUTS[layout])
        generator = torch.Generator().manual_seed(0)
        shape = (key["batch"], 3, net.image_size, net.image_size)
        images = torch.randn(shape, generator=generator)
        self.images = images.to(device, memory_format=LAYOUTS[layout])
        labels = torch.randint(net.num_classes, shape[:1], generator=generator)
        self.labels = labels.to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def loss(self) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return F.cross_entropy(self.model(self.images), self.labels)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def first_step(self) -> tuple[float, float]:
        """A step, and its loss and gradient norm."""
        loss = self.loss()
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


class Bench:
    """The rows that were asked for, and how each is measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.end = time.monotonic() + given.max_seconds
        self.settings = {
            "machine": machine(given.device, given.threads),
            "device": given.device,
            "threads": given.threads,
            "repeats": given.repeats,
            "kernels": fused.library() is not None,
        }
        self.keys = list(self._keys())

    def _keys(self) -> Iterator[Row]:
        saved, peaks, times = [], [], []
        wanted = {"naive", *chosen(VARIANTS, self.given.variants, "variant")}
        for name in self.given.nets:
            net = find_net(name)
            base = {"net": name, "depth": net.depth, "batch": self.given.batch or net.batch}
            variants = []
            for variant in VARIANTS:
                if variant not in wanted:
                    continue
                if reason := cannot(net, variant):
                    print(f"skipped: {variant} of {name}: {reason}")
                else:
                    variants.append(variant)
            for precision in self.given.precisions:
                row = {**base, "precision": precision}
                saved += [{"what": "saved", **row, "variant": v} for v in variants]
                if self.given.steps and precision == self.given.precisions[0]:
                    row = {**row, "steps": self.given.steps}
                    peaks += [{"what": "peak", **row, "variant": v} for v in variants]
            if _matches(name, self.given.timed):
                rows = [{**base, "precision": p} for p in self.given.precisions]
                times += [{"what": "time", **row, "variants": variants} for row in rows]
            else:
                print(f"not timed: {name}, see --timed")
        yield from ({**row, "settings": self.settings} for row in saved + peaks + times)

    def measure(self, key: Row) -> Row:
        kinds = {"saved": self._saved, "peak": self._peak, "time": self._time}
        try:
            return kinds[key["what"]](key)
        except (RuntimeError, MemoryError) as error:  # the rest can still be measured
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _saved(self, key: Row) -> Row:
        training = Training(key, key["variant"], "channels_last", self.given.device)
        return {"bytes": saved_bytes(training.model, training.loss)}

    def _peak(self, key: Row) -> Row:
        command = [sys.executable, __file__, "--peak-of", json.dumps(key)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}: out of memory?"]
            return {"error": lines[-1]}
        return {"bytes": int(done.stdout)}

    def _time(self, key: Row) -> Row:
        trainings = {
            (variant, layout): Training(key, variant, layout, self.given.device)
            for variant in key["variants"]
            for layout in LAYOUTS
        }
        wanted: tuple[float, float] | None = None
        for name, training in trainings.items():  # also the warm-up
            found = training.first_step()
            wanted = wanted or found
            if not np.allclose(found, wanted, rtol=TOLERANCE[key["precision"]], atol=0):
                told = "loss and gradient norm {:.6g}, {:.6g}, not {:.6g}, {:.6g} as naive"
                return {"error": f"{' '.join(name)} has {told.format(*found, *wanted)}"}
        later = self.keys[self.keys.index(key) :]  # timings come last
        seconds = max(self.end - time.monotonic(), 0) / len(later)
        runs = {" ".join(name): training.step for name, training in trainings.items()}
        taken = in_turns(runs, self.given.repeats, 0, seconds)
        return {"times": _with_ratios(taken)}


def _with_ratios(taken: dict[str, list[float]]) -> Row:
    """Milliseconds of each variant and format, and ratios to the fastest plain net."""
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    fastest = min(ms for name, ms in medians.items() if name.split()[0] in PLAIN)
    return {
        name: {
            **{f"{k}_ms": float(np.percentile(times, q)) * 1e3 for k, q in _QUANTILES.items()},
            "vs_fastest_plain": medians[name] / fastest,
            "n": len(times),
        }
        for name, times in taken.items()
    }


_QUANTILES = {"median": 50, "p10": 10, "p90": 90}


def peak_of(key: Row) -> int:
    """Bytes by which some steps raise the peak of this process above what net and data take."""
    settings = key["settings"]
    torch.set_num_threads(settings["threads"])
    training = Training(key, key["variant"], "channels_last", settings["device"])
    cuda = settings["device"] == "cuda"
    before = torch.cuda.memory_allocated() if cuda else _resident()
    for _ in range(key["steps"]):
        training.step()
    return (torch.cuda.max_memory_allocated() if cuda else _peak_resident()) - before


def _resident() -> int:
    found = _status("VmRSS")
    return _peak_resident() if found is None else found


def _peak_resident() -> int:
    """Linux counts the memory of the process that started this one into ru_maxrss; VmHWM is ours."""
    found = _status("VmHWM")
    if found is None:
        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _shown(row: Row) -> str:
    left_out = ("settings", "variants", "times", "what")
    parts = [f"{k} {v}" for k, v in row.items() if k not in left_out and v is not None]
    lines = [f"{row['what']:6}" + "  ".join(parts)]
    for name, t in row.get("times", {}).items():
        ratio = f"{t['vs_fastest_plain']:.2f}x"
        lines.append(f"      {name:32} {t['median_ms']:9.1f} ms  {ratio}  n {t['n']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--variants", nargs="+", default=["*"], help="patterns; naive is always in")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--timed", nargs="*", default=list(TIMED), help="patterns of nets")
    parser.add_argument("--batch", type=int, help="of every net")
    parser.add_argument("--steps", type=int, default=2, help="until a peak is read; 0: no peaks")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, if there is time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-seconds", type=float, default=900)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_training"))
    parser.add_argument("--docs", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.peak_of:
        print(peak_of(given.peak_of))
        return
    torch.set_num_threads(given.threads)
    bench = Bench(given)
    print(bench.settings["machine"], "" if bench.settings["kernels"] else "(no compiled kernels)")
    rows: list[dict[str, Any]] = []
    for row in measured(given.out / "results.jsonl", bench.keys, bench.measure):
        rows.append(row)
        print(_shown(row), flush=True)
    write_report(rows, given.out, given.docs)
    told = [{k: v for k, v in row.items() if k != "settings"} for row in rows]
    print(json.dumps({"settings": bench.settings, "rows": told, "exponents": exponents(rows)}))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
