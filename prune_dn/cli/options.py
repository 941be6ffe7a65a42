"""What all commands share: the app, how a command is registered, and the common options."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from prune_dn.base import limits
from prune_dn.base.signals import stoppable
from prune_dn.pruning.config import BOUNDS, UNITS, USUAL_UNITS

app = typer.Typer(
    name="prune-dn",
    help="Train, prune, fine-tune and export DenseNets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint: .safetensors, or .pt state dict.", show_default=False)
]
CheckpointOrFile = Annotated[
    Path,
    typer.Argument(help="A checkpoint, or a deployed file: .onnx, .xml, .pt2.", show_default=False),
]
Ema = Annotated[
    bool, typer.Option("--ema", help="Of a checkpoint with several weights take the averaged ones.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="What net a training script's weights are of: torchvision/NAME or timm/NAME."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value; may be given repeatedly."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
OutputDir = Annotated[Path | None, typer.Option(help="Instead of the recipe's output_dir.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in output_dir.")]
Criterion = Annotated[str, typer.Option(help="See `prune-dn criteria`.")]
Loss = Annotated[
    str | None,
    typer.Option(help="What outputs mean: softmax, sigmoid or mse.  [default: softmax]"),
]
UnitKinds = Annotated[str, typer.Option("--units", help=f"Of {', '.join(UNITS)}.")]
USUAL = ",".join(USUAL_UNITS)
Protect = Annotated[
    list[str] | None, typer.Option(help="Modules that stay whole; may be given repeatedly.")
]
DataName = Annotated[
    str | None,
    typer.Option("--data", help="Data set, or a folder of images; default: the checkpoint's."),
]
DataRoot = Annotated[
    str | None, typer.Option(help="The folder that holds the data.  [default: data]")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, max=limits.IMAGE_SIZE, help="Pixels; default: the checkpoint's."),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="How images become square: crop, squash or pad.  [default: the checkpoint's]"
    ),
]
Mean = Annotated[str | None, typer.Option(help="Pixel means, such as 0.4914,0.4822,0.4465.")]
Std = Annotated[str | None, typer.Option(help="Pixel standard deviations.")]
Normalize = Annotated[str | None, typer.Option(help="Take mean and std of this data set.")]


def bounded(name: str, text: str) -> typer.models.OptionInfo:
    """A whole number within the bounds that a request has for it."""
    least, most = BOUNDS[name]
    found: typer.models.OptionInfo = typer.Option(min=least, max=most, help=text)
    return found


def images(text: str) -> typer.models.OptionInfo:
    """A number of images."""
    found: typer.models.OptionInfo = typer.Option(min=1, max=limits.IMAGES, help=text)
    return found


Split = Annotated[
    str, typer.Option(help="test, or val (of its own, or part of the training images).")
]
Precision = Annotated[str, typer.Option(help="no (float32) or bf16 autocast.")]
Limit = Annotated[int | None, images("Use only so many training images.")]
Seed = Annotated[int, bounded("seed", "Seed of every random choice.")]


def example(*lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose help ends with an example."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = "\b\nExample" + ("s" if len(lines) > 1 else "") + ":\n"
        text += "\n".join(f"  prune-dn {line}" for line in lines)
        command = functools.wraps(function)(stoppable()(function))
        app.command(function.__name__.rstrip("_"), epilog=text)(command)
        return function

    return register


def words(text: str) -> tuple[str, ...]:
    """`a, b` as ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def read_recipe(path: Path, sets: Sequence[str] | None, output_dir: Path | None) -> Any:
    from prune_dn.run.recipe_file import load_recipe

    overrides = list(sets or ())
    if output_dir is not None:
        overrides.append(f"output_dir={json.dumps(str(output_dir))}")
    return load_recipe(path, overrides)
