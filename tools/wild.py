"""The wild table: nets that people own, followed, pruned, refitted, saved, loaded and exported, for real.

    pip install 'prune_dn[wild]'
    python tools/wild.py                        # every net; hours on one core, and goes on where it was
    python tools/wild.py 'torchvision *' 'MONAI *'

Nothing is downloaded: every net has random weights, and norms with the statistics of smooth random
images. Half of its MACs go by `criterion="reconstruction"`, without and with
`compensate="least_squares"`; prune itself checks that the pruned net equals the masked one. How far
off a net is: |pruned - dense| / |dense| of its outputs, on images that nothing was fitted on. What was
pruned is saved, loaded in a fresh process and compared, and exported to ONNX and compared in ONNX
Runtime. Rows are kept in OUT/results.jsonl; `--docs FILE` writes the tables between FILE's
`<!-- nets -->` and `<!-- end nets -->`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results import Row, chosen, measured, write_between
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from wild_nets import KINDS, Net

import prune_dn
from prune_dn.base.markdown import in_markdown, markdown_table
from prune_dn.errors import PruneDNError
from prune_dn.graph import call, tensors, trace
from prune_dn.measure.latency import machine

NETS = {name: net for nets in KINDS.values() for name, net in nets.items()}
PACKAGES = (
    "torchvision",
    "timm",
    "monai",
    "torchxrayvision",
    "segmentation-models-pytorch",
    "pytorchcv",
)


def images(net: Net, count: int, seed: int) -> Tensor:
    """Smooth random images, whose neighbouring pixels say nearly the same, as those of photographs do."""
    generator = torch.Generator().manual_seed(seed)
    channels, *sizes = net.shape
    coarse = torch.randn(count, channels, *(max(2, s // 8) for s in sizes), generator=generator)
    return F.interpolate(coarse, size=sizes, mode="bilinear" if len(sizes) == 2 else "trilinear")


def settled(net: Net, count: int) -> nn.Module:
    """The net with random scales and shifts in its norms, and the statistics of images there."""
    torch.manual_seed(0)
    model = net.build().eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    for norm in norms.values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    work = copy.deepcopy(getattr(model, "_orig_mod", model)).float().eval()
    for name in norms:
        own = work.get_submodule(name.removeprefix("_orig_mod."))
        own.register_forward_pre_hook(_take_statistics_)
    with torch.no_grad():
        call(work, net.arguments(images(net, min(count, 32), 1)))
    tensors = work.state_dict()
    model.load_state_dict(
        {key: tensors[key.removeprefix("_orig_mod.")] for key in model.state_dict()}
    )
    return model


def _take_statistics_(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
    mean, var = (norm.get_buffer(f"running_{what}") for what in ("mean", "var"))
    axes = [d for d in range(given[0].ndim) if d != 1]
    mean.copy_(given[0].mean(axes))
    var.copy_(given[0].var(axes, unbiased=False) + 1e-3)


def answers(model: nn.Module, net: Net, x: Tensor) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    given = tree_map(lambda t: t.to(dtype), net.arguments(x))
    with torch.no_grad():
        return [y.double() for y in tensors(call(copy.deepcopy(model).eval(), given))]


def distance(found: Iterable[Tensor], wanted: list[Tensor]) -> float:
    off = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (off / sum(float(b.square().sum()) for b in wanted)) ** 0.5


def macs(model: nn.Module, net: Net) -> int:
    """By torch's own counter, as a check of ours."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(copy.deepcopy(model).eval().float(), net.arguments(images(net, 1, 0)))
    return int(counter.get_total_flops()) // 2


def measure(name: str, ratio: float, count: int, files: Path) -> Row:
    """Everything about one net; what was pruned is left in `files` for `check_loaded`."""
    net, row = NETS[name], Row()
    files.mkdir(parents=True, exist_ok=True)
    model, example = settled(net, count), net.arguments(images(net, 2, 3))
    start = time.process_time()
    with suppress(PruneDNError):
        trace(model, example)
        row["trace_s"] = round(time.process_time() - start, 2)
    options: dict[str, Any] = {"unit": "macs", "example_inputs": example}
    if net.inputs is None:
        options |= {"calibration": list(images(net, count, 1).split(16)), "loss": "mse"}
        options |= {"criterion": "reconstruction"}
        with torch.no_grad():
            single = isinstance(call(copy.deepcopy(model).float(), example), Tensor)
        if not single:  # a loss of several answers is the user's to say
            labelled = [(x, torch.zeros(len(x))) for x in options["calibration"]]
            options |= {"loss": squares, "calibration": labelled}
        if _is_converted(model):
            options["input_size"] = net.shape[1:]
            del options["example_inputs"]
    row["criterion"] = options.get("criterion", "bn_scale")
    whole, fresh = macs(model, net), images(net, 32, 2)
    wanted = answers(model, net, fresh)
    start = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small = cut = prune_dn.prune(model, ratio, compensate="none", **options)
            if net.inputs is None:
                small = prune_dn.prune(model, ratio, compensate="least_squares", **options)
    except PruneDNError as error:
        return {**row, "refused": str(error)}
    row["prune_s"] = round(time.process_time() - start, 1)
    told = {str(w.message) for w in caught if issubclass(w.category, UserWarning)}
    row["warned"] = sorted(t for t in told if "did not help" in t or "float64" in t)
    row["class"] = f"{type(small).__module__}.{type(small).__qualname__}"
    row["left"] = round(macs(small, net) / whole, 3)
    row["cut"] = round(distance(answers(cut, net, fresh), wanted), 3)
    row["refitted"] = round(distance(answers(small, net, fresh), wanted), 3)
    try:
        path = files / "net.onnx"
        row["onnx"] = prune_dn.export_onnx(small, path, example_inputs=example).max_abs_error
        path.unlink()
    except PruneDNError as error:
        row["onnx"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    try:
        prune_dn.make_plan(model, ratio, **options)
        row["plan"] = "yes"
    except (PruneDNError, TypeError) as error:
        row["plan"] = str(error)
    row["saved"] = save(small, net, files / f"{name.replace(' ', '_').replace('/', '_')}")
    return row


def squares(outputs: Any, labels: Tensor) -> Tensor:
    """The mean square of every tensor that a net answers with, summed."""
    return torch.stack([y.square().mean() for y in tensors(outputs)]).sum()


def _is_converted(model: nn.Module) -> bool:
    try:
        prune_dn.convert(model)
    except PruneDNError:
        return False
    return True


def save(small: nn.Module, net: Net, stem: Path) -> str:
    """Leave the net and its answers for a fresh process, or say why not."""
    x = images(net, 2, 3)
    try:
        ours = isinstance(small, prune_dn.DenseNet)
        given = {} if ours else {"example_inputs": net.arguments(x)}
        prune_dn.save(small, f"{stem}.safetensors", **given)
    except PruneDNError as error:
        return str(error)
    torch.save(answers(small, net, x), f"{stem}.pt")
    return "yes"


def check_loaded(folder: Path) -> None:
    """Load all nets of a folder, by name or into a dense instance, and print how far their answers are."""
    for name, net in NETS.items():
        stem = folder / f"{name.replace(' ', '_').replace('/', '_')}"
        if not Path(f"{stem}.pt").exists():
            continue
        wanted, how = torch.load(f"{stem}.pt"), "by itself"
        try:
            try:
                again = prune_dn.load(f"{stem}.safetensors")
            except PruneDNError:
                how = "with model="
                again = prune_dn.load(f"{stem}.safetensors", model=net.build())
            off = distance(answers(again, net, images(net, 2, 3)), wanted)
            row = {"net": name, "loaded": how if off < 1e-5 else f"answers differ by {off:.2g}"}
        except Exception as error:
            row = {"net": name, "loaded": f"{type(error).__name__}: {error}"}
        print(json.dumps(row), flush=True)


def tables(rows: list[Row], loaded: dict[str, str], settings: str) -> str:
    """Markdown: what was measured, and a table for each kind."""
    done = {row["net"]: row for row in rows}
    parts = [settings]
    for kind, nets in KINDS.items():
        shown = [_cells(done[name], loaded) for name in nets if name in done]
        refused = [done[name] for name in nets if "refused" in done.get(name, {})]
        if shown:
            header = [
                "net",
                "MACs left",
                "off, cut",
                "off, refitted",
                "ONNX",
                "loaded",
                "plan",
                "traced in",
            ]
            parts.append(f"### {kind[0].upper() + kind[1:]}\n\n{markdown_table(header, shown)}")
        parts += [f"- *{in_markdown(r['net'])}*: {in_markdown(r['refused'])}" for r in refused]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, loaded: dict[str, str]) -> list[str]:
    name = in_markdown(row["net"])
    took = f"{row['trace_s']:.2f} s" if "trace_s" in row else "-"
    if "refused" in row:
        return [name, "refused", *["-"] * 5, took]
    onnx = row["onnx"] if isinstance(row["onnx"], str) else f"{row['onnx']:.0e}"
    refitted = f"{row['refitted']:.2f}" if row["criterion"] == "reconstruction" else "-"
    load = loaded.get(row["net"], "-") if row["saved"] == "yes" else "not saved"
    plan = "yes" if row["plan"] == "yes" else "no"
    off = [f"{row['left']:.2f}", f"{row['cut']:.2f}", refitted]
    return [name, *off, in_markdown(onnx[:60]), in_markdown(load[:60]), plan, took]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=["*"], metavar="NET", help="patterns of names")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs that goes")
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--out", type=Path, default=Path("runs/wild"))
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    if options.check:
        check_loaded(options.check)
        return
    settings = {"ratio": options.ratio, "images": options.images}
    files = options.out / "files"

    def one(key: Row) -> Row:
        try:
            return measure(key["net"], options.ratio, options.images, files)
        except (
            Exception
        ) as error:  # a fault of ours or of a package: shown, and tried again next time
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    keys = [{"net": name, **settings} for name in chosen(NETS, options.nets, "net")]
    rows = []
    for row in measured(options.out / "results.jsonl", keys, one):
        rows.append(row)
        print(json.dumps(row), flush=True)
    command = [sys.executable, __file__, "--check", str(files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    loaded = {row["net"]: row["loaded"] for row in map(json.loads, lines)}
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    told = (
        f"{options.ratio:.0%} of the MACs were to go; {options.images} images for scores and refits. "
        f"{machine()}; {versions}."
    )
    text = tables([row for row in rows if "error" not in row], loaded, told)
    if options.docs:
        write_between(options.docs, "nets", text)
    print(text)


if __name__ == "__main__":
    main()
