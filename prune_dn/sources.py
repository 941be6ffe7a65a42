"""Where images come from: the data sets by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prune_dn.errors import DataError
from prune_dn.images import FileImages, Images, MemoryImages, list_folder, look_at, resize

Numbers = tuple[float, ...]
CIFAR_NORMALISATION = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALISATION: dict[str, tuple[Numbers, Numbers]] = {
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "CIFAR10": CIFAR_NORMALISATION,
    "CIFAR100": CIFAR_NORMALISATION,
}


@dataclass(frozen=True)
class Source:
    """A data set as found: all training images, all test images, and how it is usually treated."""

    classes: tuple[str, ...]
    train: Images
    test: Images
    image_size: int
    in_channels: int
    augment: str
    normalisation: tuple[Numbers, Numbers] | None = None  # mean, std


def by_turns(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which the classes take turns, so that any prefix is balanced."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels))
    for label in labels.unique():
        mine = order[labels[order] == label]
        rank[mine] = torch.arange(len(mine)) + torch.rand(len(mine), generator=generator)
    return torch.argsort(rank)


def _digits(root: Path, image_size: int | None, download: bool, budget: int) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; every fifth of a class is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
    pixels, labels = resize(pixels, image_size or 32), torch.from_numpy(found.target).long()
    order = by_turns(labels, torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Source(
        tuple("0123456789"),
        MemoryImages(pixels[train], labels[train]),
        MemoryImages(pixels[test], labels[test]),
        image_size or 32,
        1,
        "shift",
        ((0.3058,), (0.3236,)),
    )


def _torchvision(name: str) -> Callable[[Path, int | None, bool, int], Source]:
    def load(root: Path, image_size: int | None, download: bool, budget: int) -> Source:
        from torchvision import datasets

        folder = root / name.lower()
        if (folder / "train").is_dir():
            return _folder(folder, image_size, download, budget, NORMALISATION[name])
        splits = []
        try:
            for train in (True, False):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = getattr(datasets, name)(str(root), train=train, download=download)
                data, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets).long()
                pixels = data[:, None] if data.ndim == 3 else data.permute(0, 3, 1, 2)
                splits.append(MemoryImages(resize(pixels.contiguous(), image_size or 32), labels))
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"no {name} under {root} ({reason}); put it there, as "
                f"torchvision keeps it or as images in {folder}/train/CLASS/ and "
                f"{folder}/test/CLASS/, or say `download: true`"
            ) from error
        grey = name == "FashionMNIST"
        return Source(
            tuple(found.classes),
            splits[0],
            splits[1],
            image_size or 32,
            1 if grey else 3,
            "crop_flip",
            NORMALISATION[name],
        )

    return load


def _folder(
    root: Path,
    image_size: int | None,
    download: bool,
    budget: int,
    normalisation: tuple[Numbers, Numbers] | None = None,
) -> Source:
    for needed in (root, root / "train"):
        if not needed.is_dir():
            raise DataError(
                f"there is no folder {needed}; an image folder has train/CLASS/ and test/CLASS/ "
                "(or val/CLASS/): correct data.root"
            )
    test = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if test is None:
        raise DataError(f"{root} has neither test/ nor val/ beside train/; add one to test on")
    lists = [list_folder(root / "train")]
    lists.append(list_folder(test, lists[0].classes))
    side, channels = look_at(lists[0].paths[:: max(len(lists[0].paths) // 32, 1)])
    size = image_size or side or 224
    splits: list[Images] = []
    fits = sum(len(x.paths) for x in lists) * channels * size * size <= budget * 2**20
    for part in lists:
        files = FileImages(part.paths, torch.tensor(part.labels), size, channels)
        splits.append(files.in_memory() if fits else files)
    if normalisation is not None and len(normalisation[0]) != channels:
        normalisation = None
    augment = "crop_flip" if size <= 64 else "random_resized_crop"
    return Source(lists[0].classes, splits[0], splits[1], size, channels, augment, normalisation)


DATASETS: dict[str, Callable[[Path, int | None, bool, int], Source]] = {
    "digits": _digits,
    "fashion_mnist": _torchvision("FashionMNIST"),
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "image_folder": _folder,
}
