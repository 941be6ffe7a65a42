"""How a net's images are read: their size and normalisation, and what of it was guessed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_dn.checkpoint import read_info
from prune_dn.data import DataSpec
from prune_dn.errors import DataError, DataWarning
from prune_dn.models import LightCNN, Net
from prune_dn.profiling import default_image_size
from prune_dn.recipe import DataSection

CHECKPOINT = "from the checkpoint"
GUESSED = "guessed: usual for the data, or measured on them"

logger = logging.getLogger(__name__)


def image_size_for(
    model: Net, info: Mapping[str, Any], given: int | None, where: Path
) -> tuple[int, str]:
    """The size of a net's images in pixels, and where it comes from.

    Raises DataError for another size than that of a Light CNN, whose linear layer fits one.
    """
    if isinstance(model, LightCNN):
        own = model.config.image_size
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
    return default_image_size(model.config), f"guessed: usual for the stem {model.config.stem!r}"


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
