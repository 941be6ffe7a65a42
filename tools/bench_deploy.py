"""What a net costs where it is deployed: dense, cut, int8, and cut + int8, on each runtime.

    python tools/bench_deploy.py densenet40.safetensors data/cifar10 --normalize cifar10 --docs docs/deploy.md densenet40
    python tools/bench_deploy.py --random densenet121 --image-size 224 --batch-sizes 1 8 --docs docs/deploy.md densenet121

A checkpoint is cut to a share of its MACs by reconstruction and refitted, quantised on the same calibration images, and
every file is evaluated on test images. Beside it stands Torch-Pruning's net of the same accuracy as the cut one (l2,
global; its ratio is bisected on validation images, recalibrated), through the same export. `--random` takes torchvision's
net with random weights, cut by l2: time only, and Torch-Pruning's at the same share of MACs. Files of all runtimes are
timed in turns; times are shares of the dense net's in onnxruntime, float32.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from results import write_between
from torch import nn

import prune_dn
from prune_dn.base.intervals import percent
from prune_dn.base.markdown import markdown_table
from prune_dn.base.runtimes import QUANTISED, Runtime
from prune_dn.data.datasets import Datasets, calibration_batches, load_datasets
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import ENDINGS, FORMATS, deployed_bytes
from prune_dn.errors import PruningError
from prune_dn.measure.latency import Latency, compare_latency, machine
from prune_dn.pruning import recalibrate_batch_norm_
from prune_dn.run.data_options import NORMALISATIONS
from prune_dn.run.rivals import torch_pruned
from prune_dn.training import evaluate

BASE = "dense onnxruntime fp32"
_STEPS = 5  # of the bisection of Torch-Pruning's ratio
_VALIDATION = 1000  # images for it


@dataclass(frozen=True)
class Subject:
    """The nets to compare by name, images to quantise by, and data to evaluate on (None: time only)."""

    nets: dict[str, nn.Module]
    calibration: list[Any]
    data: Datasets | None
    size: int


def trained(given: argparse.Namespace) -> Subject:
    """A checkpoint's net, cut and refitted, and Torch-Pruning's as accurate."""
    mean, std = NORMALISATIONS[given.normalize]
    data = load_datasets("image_folder", root=given.data, image_size=given.image_size, mean=mean, std=std)  # fmt: skip
    images = calibration_batches(data.train, given.calibration, seed=0)
    net = prune_dn.load(given.checkpoint)
    size = data.spec.image_size
    units = {"units": tuple(given.units), "round_to": given.round_to, "input_size": size}
    small = prune_dn.prune(net, given.ratio, unit="macs", calibration=images, **units)
    nets = {"dense": net, "cut": small}
    val = data.val.balanced(min(_VALIDATION, len(data.val)))
    wanted = evaluate(small, val).accuracy or 0.0
    low, high, theirs = 0.02, given.ratio, None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        try:
            found = torch_pruned(copy.deepcopy(net), ratio, images[0][0][:1])
        except PruningError as error:
            print(f"Torch-Pruning: {error}")
            break
        recalibrate_batch_norm_(found, images)
        good = (evaluate(found, val).accuracy or 0.0) >= wanted
        low, high = (ratio, high) if good else (low, ratio)
        theirs = found if good or theirs is None else theirs
    if theirs is not None:
        nets["Torch-Pruning"] = nn.Sequential(theirs)  # no config of ours describes it
    return Subject(nets, images, data, size)


def random(given: argparse.Namespace) -> Subject:
    """torchvision's net with random weights, cut by l2."""
    torch.manual_seed(0)
    net = prune_dn.convert(getattr(torchvision.models, given.random)()).eval()
    images = [torch.randn(4, 3, given.image_size, given.image_size) for _ in range(2)]
    options = {"units": tuple(given.units), "round_to": given.round_to}
    small = prune_dn.prune(net, given.ratio, unit="macs", criterion="l2", input_size=given.image_size, **options)  # fmt: skip
    theirs = torch_pruned(copy.deepcopy(net), given.ratio, images[0][:1])
    nets = {"dense": net, "cut": small, "Torch-Pruning": nn.Sequential(theirs)}
    return Subject(nets, images, None, given.image_size)


def files(subject: Subject, runtimes: list[Runtime], folder: Path) -> Iterator[tuple[str, Path]]:
    """Each net for each runtime, in float32 and in int8."""
    for name, net in subject.nets.items():
        for runtime in runtimes:
            path = folder / f"{name} {runtime} fp32{ENDINGS[runtime]}"
            FORMATS[path.suffix].export(net, path, image_size=subject.size)
            yield path.stem, path
            path = folder / f"{name} {runtime} int8{ENDINGS[runtime]}"
            prune_dn.quantize(net, path, calibration=subject.calibration, runtime=runtime)
            yield path.stem, path


def table(
    made: dict[str, Path],
    times: list[dict[str, Latency]],
    accuracy: dict[str, str],
    macs: dict[str, float],
) -> str:
    """A row per file; times as shares of BASE, and its milliseconds."""
    head = ["net", "MACs", "runtime", "precision", "bytes"]
    head += ["test accuracy, %"] * bool(accuracy)
    head += [f"batch {found[BASE].batch_size}" for found in times]
    rows = []
    for name, path in made.items():
        net, runtime, precision = name.rsplit(" ", 2)
        shares = []
        for found in times:
            share = f"{found[name].median_ms / found[BASE].median_ms:.3f}x"
            shares.append(f"{share} ({found[name].median_ms:.2f} ms)" if name == BASE else share)
        cells = [net, f"{macs[net]:.2f}x", runtime, precision, f"{deployed_bytes(path):,}"]
        rows.append([*cells, *([accuracy[name]] if accuracy else []), *shares])
    return markdown_table(head, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("data", nargs="?", help="image folder: train/CLASS, test/CLASS")
    parser.add_argument("--random", metavar="NAME", help="a DenseNet of torchvision, untrained")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the MACs to cut")
    parser.add_argument("--units", nargs="+", default=["stream", "bottleneck"])
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--runtimes", nargs="+", choices=QUANTISED, default=list(QUANTISED))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--normalize", choices=sorted(NORMALISATIONS), default="imagenet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--images", type=int, help="test images; default: all")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", nargs=2, metavar=("FILE", "NAME"))
    given = parser.parse_args(arguments)
    if (given.random is None) == (given.checkpoint is None or given.data is None):
        parser.error("give a checkpoint and its data, or --random NAME")
    if "onnxruntime" not in given.runtimes:
        parser.error("onnxruntime in float32 is what times are shares of; keep it in --runtimes")
    torch.set_num_threads(given.threads)
    subject = random(given) if given.random else trained(given)
    dense = prune_dn.count(subject.nets["dense"], subject.size).macs
    macs = {
        name: prune_dn.count(net, subject.size).macs / dense for name, net in subject.nets.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        made = dict(files(subject, given.runtimes, Path(folder)))
        accuracy, tested = {}, 0
        if subject.data is not None:
            test = subject.data.test
            test = test if given.images is None else test.balanced(given.images)
            tested = len(test)
            for name, path in made.items():
                found = evaluate(Deployed(path, threads=given.threads), test)
                accuracy[name] = percent(found.accuracy or 0.0, found.n)
                print(f"{name}: {accuracy[name]}", flush=True)
        times = [
            compare_latency(made, batch_size=batch, repeats=given.repeats, threads=given.threads)
            for batch in given.batch_sizes
        ]
        text = table(made, times, accuracy, macs)
    labels = ", ".join(dict.fromkeys(x.runtime for x in times[0].values()))
    where = f"{machine(threads=given.threads)}; {labels}; medians of n = {given.repeats} in turns"
    where += f"; {tested:,} test images, 95 % intervals in brackets" if tested else ""
    print(f"{text}\n\n{where}")
    if given.docs:
        write_between(Path(given.docs[0]), given.docs[1], f"{text}\n\n{where}\n")


if __name__ == "__main__":
    main()
