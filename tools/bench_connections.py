"""What selections cost in onnxruntime and OpenVINO: gathered edges, ordered edges, connections.

    python tools/bench_connections.py
    python tools/bench_connections.py net.safetensors --data data/cifar10 --images 512 --keep cuts

A DenseNet-40 with random weights, or a checkpoint, cut to a share of its MACs. "gathered" edges are
read as one gather from the whole stream with the channels in their old order; "ordered" edges as a
plan leaves them. With --data the cuts are scored and refitted on training images and evaluated on
test images; without, they are cut by l2. All files are timed in turns, in each runtime. --keep holds
the cut nets, so that another call times them again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prune_dn
from prune_dn.base.markdown import markdown_table
from prune_dn.data.datasets import calibration_batches, load_datasets
from prune_dn.measure.latency import in_turns, machine
from prune_dn.models import DenseNet, densenet40
from prune_dn.models.dense_net import ReadStream
from prune_dn.models.state_dicts import fill
from prune_dn.run.data_options import NORMALISATIONS

CUTS = {
    "streams": ("stream",),
    "ordered edges": ("edge",),
    "connections": ("connection",),
    "streams, connections": ("stream", "connection"),
}
GATHERED = "gathered edges"
RUNTIMES = ("onnxruntime", "openvino")


class Gathers(nn.Module):
    """Reads its positions from the whole stream, whatever ranges they make up."""

    pieces = None

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)

    def forward(self, stream: Tensor) -> Tensor:
        return stream.index_select(1, self.get_buffer("positions"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="of a DenseNet for images of 32 x 32 pixels")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), metavar="CUT")
    parser.add_argument("--data", help="a folder with train/CLASS and test/CLASS")
    parser.add_argument(
        "--images", type=int, default=512, help="training images to score and refit on"
    )
    parser.add_argument("--normalize", choices=NORMALISATIONS, default="cifar10")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="folder of the cut nets")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net: Any = densenet40() if given.checkpoint is None else prune_dn.load(given.checkpoint)
    data = Data(given) if given.data else None
    nets: dict[str, Any] = {"dense": net.eval()}
    for name in given.cuts:
        nets[name] = cut(net, name, given, data)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (name, made) in enumerate(nets.items()):
            files[name] = Path(folder) / f"{number}.onnx"
            prune_dn.export_onnx(made, files[name], image_size=given.image_size)
        if "ordered edges" in nets:
            files[GATHERED] = Path(folder) / "gathered.onnx"
            export_gathered(nets["ordered edges"], files[GATHERED], given.image_size)
        times = {
            (runtime, batch): timed(files, runtime, batch, given)
            for batch in given.batch_sizes
            for runtime in RUNTIMES
        }
    nets[GATHERED] = nets.get("ordered edges", net)
    dense = prune_dn.count(net, given.image_size).macs
    rows = []
    for name in files:
        left = prune_dn.count(nets[name], given.image_size).macs / dense
        cells = [f"{found[name] / found['dense']:.3f}x" for found in times.values()]
        accuracy = "" if data is None else f"{100 * data.accuracy(nets[name]):.2f} %"
        rows.append([name, f"{left:.3f}x", *cells, accuracy])
    head = ["net", "MACs", *(f"{runtime}, batch {batch}" for runtime, batch in times), "accuracy"]
    print(markdown_table(head, rows))
    milliseconds = ", ".join(f"{1e3 * found['dense']:.2f}" for found in times.values())
    print(
        f"\n{machine()}; dense: {milliseconds} ms; medians of n = {given.repeats} in turns", end=""
    )
    print("" if data is None else f"; {sum(len(y) for _, y in data.tested)} test images")


class Data:
    """Training images to score and refit on, and test images."""

    def __init__(self, given: argparse.Namespace) -> None:
        mean, std = NORMALISATIONS[given.normalize]
        found = load_datasets(
            "image_folder", root=given.data, image_size=given.image_size, mean=mean, std=std
        )
        self.calibration = calibration_batches(found.train, given.images)
        self.tested = calibration_batches(found.test, given.test_images)

    def accuracy(self, net: nn.Module) -> float:
        """The share of test images that a net gets right."""
        with torch.no_grad():
            right = sum(int((net(x).argmax(1) == y).sum()) for x, y in self.tested)
        return right / sum(len(y) for _, y in self.tested)


def cut(net: Any, name: str, given: argparse.Namespace, data: Data | None) -> Any:
    """The net after one of CUTS, from the folder where it is there."""
    kept = given.keep and given.keep / f"{name} {given.ratio:g}.safetensors"
    if kept and kept.exists():
        return prune_dn.load(kept).eval()
    how: dict[str, Any] = {"criterion": "l2"}
    if data is not None:
        how = {"calibration": data.calibration, "loss": "softmax"}
    asked = {"unit": "macs", "units": CUTS[name], "input_size": given.image_size}
    small: Any = prune_dn.prune(net, given.ratio, **asked, **how)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        prune_dn.save(small, kept)
    return small.eval()


def export_gathered(net: DenseNet, path: Path, size: int) -> None:
    """Write a net whose readers gather from whole streams, as a plain exporter sees it."""
    net = fill(net.config, net.state_dict()).eval()
    for name, module in list(net.named_modules()):
        if isinstance(module, ReadStream) and module.input_indices is not None:
            parent, _, key = name.rpartition(".")
            setattr(net.get_submodule(parent), key, Gathers(module.input_indices))
    batch = {0: torch.export.Dim("batch")}
    example = torch.randn(2, net.config.in_channels, size, size)
    torch.onnx.export(
        net, (example,), path, dynamo=True, dynamic_shapes=(batch,), input_names=["input"],
        external_data=False, verbose=False,
    )  # fmt: skip


def timed(
    files: dict[str, Path], runtime: str, batch: int, given: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of a batch of each file, on one thread."""
    import onnx

    first = onnx.load(files["dense"]).graph.input[0].type.tensor_type.shape.dim
    shape = (batch, *(dim.dim_value for dim in first[1:]))
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    start = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}[runtime]
    runs = {name: start(path, images) for name, path in files.items()}
    found = in_turns(runs, given.repeats, 3, None)
    return {name: float(np.median(taken)) for name, taken in found.items()}


def onnxruntime_run(path: Path, images: np.ndarray) -> Callable[[], None]:
    """A function that runs a file once in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": images}) and None


def openvino_run(path: Path, images: np.ndarray) -> Callable[[], None]:
    """A function that runs a file once in OpenVINO, in float32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", how).create_infer_request()
    return lambda: request.infer([images]) and None


if __name__ == "__main__":
    main()
