"""The data that a command line names for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_dn.data import Datasets, load_datasets
from prune_dn.errors import DataError
from prune_dn.models import Net
from prune_dn.phases import check_fit
from prune_dn.profiling import default_image_size
from prune_dn.sources import CIFAR_NORMALISATION, DATASETS

NORMALISATIONS = {
    "cifar10": CIFAR_NORMALISATION,
    "cifar100": CIFAR_NORMALISATION,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class DataOptions:
    """The data that a command line names; what it leaves open comes from the checkpoint."""

    name: str | None = None
    root: str = "data"
    image_size: int | None = None
    resize: str | None = None
    mean: str | None = None
    std: str | None = None
    normalize: str | None = None
    limit: int | None = None
    seed: int = 0

    def load(self, info: Mapping[str, Any], model: Net, where: Path) -> Datasets:
        """The data sets. Raises DataError when they are not named, or do not fit the net."""
        known = info.get("data") or {}
        name = self.name or known.get("name")
        if name is None:
            raise DataError(
                f"{where} does not say what data it was trained on; add --data "
                f"({', '.join(sorted(DATASETS))}) and --data-root"
            )
        mean, std = self._normalisation(known)
        data = load_datasets(
            name,
            root=self.root,
            image_size=self.image_size
            or known.get("image_size")
            or default_image_size(model.config),
            resize=self.resize or known.get("resize"),
            seed=self.seed,
            limit=self.limit,
            mean=mean,
            std=std,
        )
        check_fit(model, data.spec, str(where))
        return data

    def _normalisation(self, known: Mapping[str, Any]) -> tuple[Any, Any]:
        if (self.mean is None) != (self.std is None):
            raise DataError("--mean and --std belong together; give both")
        if self.mean is not None and self.std is not None:
            return _numbers("--mean", self.mean), _numbers("--std", self.std)
        if self.normalize is not None:
            if self.normalize not in NORMALISATIONS:
                raise DataError(
                    f"--normalize {self.normalize!r} is unknown; choose "
                    f"{', '.join(NORMALISATIONS)}, or give --mean and --std"
                )
            return NORMALISATIONS[self.normalize]
        return known.get("mean"), known.get("std")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{option} {text!r}: give numbers with commas, 0.49,0.48,0.45") from None
