"""How a net's images are read: their size and normalisation, and what of it was guessed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_dn.checkpoints.checkpoint import read_example, read_info
from prune_dn.data.datasets import DataSpec
from prune_dn.deploy.deployed import Deployed
from prune_dn.errors import DataError, DataWarning
from prune_dn.models.examples import in_channels
from prune_dn.models.families import config_of, known_family
from prune_dn.models.named import usual_image_size
from prune_dn.run.recipe import DataSection

CHECKPOINT = "from the checkpoint"
GUESSED = "guessed: usual for the data, or measured on them"

logger = logging.getLogger(__name__)


def image_size_for(
    model: nn.Module, info: Mapping[str, Any], given: int | None, where: Path
) -> tuple[int, str]:
    """The size of a net's images in pixels, and where it comes from.

    Raises DataError for another size than that of a Light CNN, whose linear layer fits one, and where the
    net was saved with inputs that are no square images.
    """
    if isinstance(model, Deployed):
        height, width = model.image_size
        if height != width:
            raise DataError(
                f"{where} takes images of {height}x{width} pixels; this command reads square ones"
            )
        if given not in (None, height):
            raise DataError(
                f"{where} takes {height} pixels a side, --image-size says {given}; leave it out"
            )
        return height, "from the file"
    config = config_of(model)
    if config is not None and known_family(config).one_size:
        own = known_family(config).image_size(config)
        if given not in (None, own):
            raise DataError(
                f"{where} has {own} pixels a side, --image-size says {given}; leave it out"
            )
        return own, CHECKPOINT
    if given is not None:
        return given, "--image-size"
    known = (info.get("data") or {}).get("image_size")
    if known is not None:
        return int(known), CHECKPOINT
    if config is not None:
        family = known_family(config)
        return family.image_size(config), f"guessed: usual for such a {family.title}"
    example = read_example(where)
    if (side := _side(example)) is not None:
        return side, CHECKPOINT
    if example is not None:
        raise DataError(
            f"{where} was saved with other inputs than square images; this command reads images"
        )
    return usual_image_size(model), f"guessed: usual for a {type(model).__name__}"


def check_fit(model: nn.Module, spec: DataSpec, where: str) -> None:
    """Raise DataError when the net cannot be used with these data.

    Of a net that is not ours only input channels are known; its classes show when it runs.
    """
    deployed = isinstance(model, Deployed)
    has = {"input channels": model.in_channels if deployed else in_channels(model)}
    if (config := config_of(model)) is not None:
        family = known_family(config)
        size = family.image_size(config) if family.one_size else spec.image_size
        has = {"classes": config.num_classes, **has, "pixels a side": size}
    needs = {
        "classes": spec.num_classes,
        "input channels": spec.in_channels,
        "pixels a side": spec.image_size,
    }
    for name, value in has.items():
        if value != needs[name]:
            raise DataError(
                f"{where} has {value} {name}, the data set {spec.name!r} has {needs[name]}; use the "
                "data that the net was trained on, or train a net for these data"
            )


def inputs_for(
    model: nn.Module, info: Mapping[str, Any], given: int | None, where: Path
) -> tuple[dict[str, Any], str]:
    """The inputs that a net is run on, as arguments `image_size` or `example_inputs`, and where that comes from.

    Inputs that are no square images are those that the net was saved with.
    """
    if given is None and config_of(model) is None and not info.get("data"):
        example = read_example(where)
        if example is not None and _side(example) is None:
            return {"example_inputs": example}, CHECKPOINT
    size, size_from = image_size_for(model, info, given, where)
    return {"image_size": size}, size_from


def _side(example: Any) -> int | None:
    """The side of square images; None for other inputs."""
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    square = isinstance(example, Tensor) and example.ndim == 4
    return int(example.shape[2]) if square and example.shape[2] == example.shape[3] else None


def describe_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs_for` as facts: the size, or the shape of each tensor."""
    if "image_size" in inputs:
        return {"image_size": inputs["image_size"]}
    shapes = [list(x.shape) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return {"image_size": None, "input_shapes": shapes}


def say_inputs(inputs: Mapping[str, Any], inputs_from: str) -> None:
    """Log what a net is run on."""
    if "image_size" in inputs:
        say_image_size(inputs["image_size"], inputs_from)
    else:
        logger.warning("inputs: %s (%s)", describe_inputs(inputs)["input_shapes"], inputs_from)


def say_image_size(size: int, size_from: str) -> None:
    """Log the size of images that a command goes by."""
    logger.warning("images: %d pixels (%s)", size, _with_remedy(size_from, "--image-size"))


def say_pixels(spec: DataSpec, size_from: str, normalised_from: str) -> dict[str, Any]:
    """How pixels are read and where that comes from; logged, for a wrong guess costs much accuracy."""
    logger.warning(
        "images: %d pixels (%s), normalised with mean %s and std %s (%s)",
        spec.image_size,
        _with_remedy(size_from, "--image-size"),
        ",".join(f"{x:g}" for x in spec.mean),
        ",".join(f"{x:g}" for x in spec.std),
        _with_remedy(normalised_from, "--mean and --std, or --normalize"),
    )
    return {
        "image_size": spec.image_size,
        "image_size_from": size_from,
        "resize": spec.resize,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalisation_from": normalised_from,
    }


def _with_remedy(source: str, options: str) -> str:
    return f"{source}; {options} if that is wrong" if source.startswith("guessed") else source


def warn_of_other_pixels(section: DataSection, spec: DataSpec, checkpoint: str | Path) -> None:
    """Warn where a recipe reads pixels in another way than its checkpoint was trained with, or guesses.

    A recipe says how, or what is usual for its data is taken: not what its checkpoint says.
    """
    known = read_info(checkpoint).get("data")
    known = known if isinstance(known, dict) else {}
    for key in ("image_size", "mean", "std"):
        used = spec.to_dict()[key]
        if known.get(key) not in (None, used):
            warnings.warn(
                f"{checkpoint} was trained with {key} {known[key]}, here it is {used}; set data.{key}",
                DataWarning,
                stacklevel=2,
            )
        elif key not in known and getattr(section, key) is None:
            warnings.warn(
                f"{checkpoint} does not say the {key} of its pixels; {used} is a guess, usual for the "
                f"data; set data.{key} if that is wrong",
                DataWarning,
                stacklevel=2,
            )
