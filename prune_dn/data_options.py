"""The data that a command line names for a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_dn.data import Datasets, load_datasets
from prune_dn.errors import DataError
from prune_dn.models import LightCNN, Net
from prune_dn.phases import check_fit
from prune_dn.profiling import default_image_size
from prune_dn.sources import CIFAR_NORMALISATION, DATASETS

NORMALISATIONS = {
    "cifar10": CIFAR_NORMALISATION,
    "cifar100": CIFAR_NORMALISATION,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
CHECKPOINT = "from the checkpoint"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """The data that a command line names; what it leaves open comes from the checkpoint."""

    name: str | None = None
    root: str | None = None
    image_size: int | None = None
    resize: str | None = None
    mean: str | None = None
    std: str | None = None
    normalize: str | None = None
    limit: int | None = None
    seed: int = 0

    def load(
        self, info: Mapping[str, Any], model: Net, where: Path
    ) -> tuple[Datasets, dict[str, Any]]:
        """The data sets, and how their pixels are read: see `_pixels`, which is logged too.

        Raises DataError when they are not named, or do not fit the net.
        """
        known = info.get("data") or {}
        name = self.name or known.get("name")
        if name is None:
            raise DataError(
                f"{where} does not say what data it was trained on; add --data "
                f"({', '.join(sorted(DATASETS))}) and --data-root"
            )
        size, size_from = image_size_for(model, info, self.image_size, where)
        mean, std, normalised_from = self._normalisation(known)
        data = load_datasets(
            name,
            root="data" if self.root is None else self.root,
            image_size=size,
            resize=self.resize or known.get("resize"),
            seed=self.seed,
            limit=self.limit,
            mean=mean,
            std=std,
        )
        check_fit(model, data.spec, str(where))
        return data, _pixels(data, size_from, normalised_from)

    def refuse(self, why: str, *, but: Collection[str] = ()) -> None:
        """Raise DataError for an option that was given, but for some, where none has an effect."""
        for field in ("name", "root", "image_size", "resize", "mean", "std", "normalize", "limit"):
            if getattr(self, field) is not None and field not in but:
                option = {"name": "--data", "root": "--data-root"}.get(field)
                option = option or f"--{field.replace('_', '-')}"
                raise DataError(f"{option} has no effect: {why}; leave it out")

    def _normalisation(self, known: Mapping[str, Any]) -> tuple[Any, Any, str]:
        """Mean, std, and where they come from."""
        if (self.mean is None) != (self.std is None):
            raise DataError("--mean and --std belong together; give both")
        if self.mean is not None and self.std is not None:
            if self.normalize is not None:
                raise DataError("--normalize has no effect beside --mean and --std; leave it out")
            return _numbers("--mean", self.mean), _numbers("--std", self.std), "--mean and --std"
        if self.normalize is not None:
            if self.normalize not in NORMALISATIONS:
                raise DataError(
                    f"--normalize {self.normalize!r} is unknown; choose "
                    f"{', '.join(NORMALISATIONS)}, or give --mean and --std"
                )
            return *NORMALISATIONS[self.normalize], f"--normalize {self.normalize}"
        mean, std = known.get("mean"), known.get("std")
        if mean is not None and std is not None:
            return mean, std, CHECKPOINT
        return mean, std, "guessed: usual for the data, or measured on them"


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


def _pixels(data: Datasets, size_from: str, normalised_from: str) -> dict[str, Any]:
    """How pixels are read and where that comes from; logged, because a guess can cost much accuracy."""
    spec = data.spec
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


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{option} {text!r}: give numbers with commas, 0.49,0.48,0.45") from None
