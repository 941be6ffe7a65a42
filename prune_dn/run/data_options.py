"""The data that a command line names for a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.data.datasets import Datasets, load_datasets
from prune_dn.data.sources import CIFAR_NORMALISATION, DATASETS
from prune_dn.errors import DataError, PruningError
from prune_dn.run.pixels import CHECKPOINT, GUESSED, check_fit, image_size_for, say_pixels

NORMALISATIONS = {
    "cifar10": CIFAR_NORMALISATION,
    "cifar100": CIFAR_NORMALISATION,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


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
        self, info: Mapping[str, Any], model: nn.Module, where: Path
    ) -> tuple[Datasets, dict[str, Any]]:
        """The data sets, and how their pixels are read: see `say_pixels`.

        Raises DataError when they are not named, or do not fit the net.
        """
        known = info.get("data") or {}
        name, root = self.name or known.get("name"), self.root
        if root is None and self.name not in DATASETS and Path(self.name or "\0").is_dir():
            name, root = "image_folder", self.name
        if name is None:
            raise DataError(
                f"{where} does not say what data it was trained on; add --data "
                f"({', '.join(sorted(DATASETS))}) and --data-root"
            )
        if name == "digits" and self.root is not None:
            raise DataError(
                "--data-root has no effect: digits come with scikit-learn; leave it out"
            )
        size, size_from = image_size_for(model, info, self.image_size, where)
        mean, std, normalised_from = self._normalisation(known)
        data = load_datasets(
            name,
            root="data" if root is None else root,
            image_size=size,
            resize=self.resize or known.get("resize"),
            seed=self.seed,
            limit=self.limit,
            mean=mean,
            std=std,
        )
        check_fit(model, data.spec, str(where))
        return data, say_pixels(data.spec, size_from, normalised_from)

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
        return mean, std, GUESSED


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{option} {text!r}: give numbers with commas, 0.49,0.48,0.45") from None


def refuse_calibration(images: int | None, criterion: str | None, why_else: str = "") -> None:
    """Raise PruningError when `--calibration` was given, but nothing would read the images."""
    if images is not None:
        what = "the default criterion" if criterion is None else f"criterion {criterion!r}"
        raise PruningError(
            f"--calibration has no effect: {what} reads only the weights{why_else}; leave it out"
        )
