"""The commands that make deployed files, and say what a net costs; `run.deploying` does the work."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prune_dn.base import limits
from prune_dn.base.console import show as _show
from prune_dn.base.runtimes import PRECISIONS, RUNTIMES
from prune_dn.cli import options
from prune_dn.cli.checkpoints import with_intervals
from prune_dn.cli.options import example

_BATCH_SIZES = (1, 32)
BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, max=limits.BATCH_SIZE, help="Default: 1 and 32."),
]


@example(
    "export pruned.safetensors -o net.onnx",
    "export pruned.safetensors -o net.xml",
    "export pruned.safetensors -o net.pt2",
)
def export(
    checkpoint: options.Checkpoint,
    output: options.Output,
    image_size: options.ImageSize = None,
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Write ONNX (.onnx), OpenVINO (.xml and .bin), torch.export (.pt2) or a state dict (.pt), by OUTPUT's ending."""
    from prune_dn.run import jobs

    _show(jobs.export_checkpoint(checkpoint, output, image_size, ema=ema, model=model), as_json)


@example(
    "quantize pruned.safetensors -o small.int8.onnx --data cifar10",
    "quantize pruned.safetensors -o small.int8.xml --data cifar10 --max-drop 0.3",
)
def quantize(
    checkpoint: options.Checkpoint,
    output: options.Output,
    calibration: Annotated[
        int | None,
        typer.Option(min=1, max=limits.IMAGES, help="Training images for ranges. [default: 512]"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Points of validation accuracy; layers that cost more stay float."
        ),
    ] = None,
    batch_size: BatchSizes = None,
    data: options.DataName = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    resize: options.Resize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    normalize: options.Normalize = None,
    seed: options.Seed = 0,
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a net in int8, for onnxruntime (.onnx) or OpenVINO (.xml and .bin), by OUTPUT's ending."""
    from prune_dn.run import deploying
    from prune_dn.run.data_options import DataOptions

    figures = deploying.quantize_checkpoint(
        checkpoint,
        output,
        DataOptions(data, data_root, image_size, resize, mean, std, normalize, seed=seed),
        calibration=calibration,
        max_drop=max_drop,
        batch_sizes=batch_size or _BATCH_SIZES,
        ema=ema,
        model=model,
    )
    lines = with_intervals(figures)
    lines["latency"] = {
        f"batch {pair['int8']['batch_size']}": f"{pair['float']['median_ms']:.2f} ms in float32, "
        f"{pair['int8']['median_ms']:.2f} ms in int8 "
        f"({pair['int8']['median_ms'] / pair['float']['median_ms']:.2f}x, n = {pair['int8']['n']})"
        for pair in figures["latency"]
    }
    _show(figures, as_json, lines=lines)


@example(
    "profile pruned.safetensors",
    "profile pruned.safetensors --runtime openvino --precision int8 --batch-size 1 --json",
    "profile small.int8.onnx",
    "profile resnet18.pth --model torchvision/resnet18 --verify",
)
def profile(
    checkpoint: options.CheckpointOrFile,
    image_size: options.ImageSize = None,
    batch_size: BatchSizes = None,
    repeats: Annotated[
        int, typer.Option(min=1, max=limits.REPEATS, help="Runs per latency figure.")
    ] = 30,
    runtime: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(RUNTIMES)}.  [default: eager]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(PRECISIONS)}.  [default: fp32]")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also count MACs by thop.")] = False,
    model: options.Model = None,
    ema: options.Ema = False,
    as_json: options.AsJson = False,
) -> None:
    """Params and MACs per layer, and measured latency; of a deployed file, what it says and its latency."""
    from prune_dn.run import inspection

    facts = inspection.profile_any(
        checkpoint,
        image_size,
        batch_size or _BATCH_SIZES,
        repeats,
        runtime,
        precision,
        ema=ema,
        model=model,
        verify=verify,
    )
    latency = {
        f"batch {x['batch_size']}": f"{x['median_ms']:.2f} ms (median of {x['n']}; 10 % "
        f"{x['p10_ms']:.2f}, 90 % {x['p90_ms']:.2f})"
        for x in facts["latency"]
    }
    first = facts["latency"][0]
    lines: dict[str, Any] = {
        "runtime": f"{first['runtime']}, {first['precision']}",
        "latency": latency,
        "machine": first["machine"],
    }
    if "layers" not in facts:
        kept = {k: v for k, v in facts.items() if k != "latency" and v is not None}
        _show(facts, as_json, lines={**kept, **lines})
        return
    rows = [[r["name"], f"{r['params']:,}", f"{r['macs']:,}"] for r in facts["layers"]]
    rows.append(["total", f"{facts['params']:,}", f"{facts['macs']:,}"])
    if verify:
        lines["MACs by thop"] = _checked(**facts["verify"])
    _show(facts, as_json, table=(["layer", "params", "MACs"], rows), lines=lines)


def _checked(
    thop_layers: int,
    layers_difference_percent: float,
    thop: int,
    difference_percent: float,
    **_: Any,
) -> dict[str, str]:
    """The counts of thop beside ours; what differs by its rules is said."""
    return {
        "convs and linear layers": f"{thop_layers:,} ({layers_difference_percent:+.2f} %)",
        "with norms, poolings and others as it counts them": f"{thop:,} ({difference_percent:+.2f} %)",
    }
