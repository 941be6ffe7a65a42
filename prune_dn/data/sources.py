"""Where images come from: the data sets by name."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from prune_dn.data.folders import (
    VALIDATION,
    Folder,
    copies,
    list_folder,
    look_at,
    notices,
)
from prune_dn.data.images import FileImages, Images, MemoryImages, resize
from prune_dn.errors import DataError

USUAL_SIZE = 224  # pixels a side, of images that have no size in common
Numbers = tuple[float, ...]
CIFAR_NORMALISATION = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALISATION: dict[str, tuple[Numbers, Numbers]] = {
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "CIFAR10": CIFAR_NORMALISATION,
    "CIFAR100": CIFAR_NORMALISATION,
}


@dataclass(frozen=True)
class Request:
    """How a data set is asked for: where it lies, and what becomes of its images."""

    root: Path
    image_size: int | None = None
    resize: str | None = None  # of images that are not square: a name from RESIZES
    download: bool = False
    memory_budget_mb: int = 4096


@dataclass(frozen=True)
class Source:
    """A data set as found: all training images, all test images, and how it is usually treated.

    `val` are validation images of its own. `contents` describe what each split holds, by file where
    there are files: equal contents are equal data. `notices` are for its owner.
    """

    classes: tuple[str, ...]
    train: Images
    test: Images
    image_size: int
    in_channels: int
    augment: str
    normalisation: tuple[Numbers, Numbers] | None = None  # mean, std
    val: Images | None = None
    resize: str | None = None
    contents: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def by_turns(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which the classes take turns, so that any prefix is balanced."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels))
    for label in labels.unique():
        mine = order[labels[order] == label]
        rank[mine] = torch.arange(len(mine)) + torch.rand(len(mine), generator=generator)
    return torch.argsort(rank)


def _digits(request: Request) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; every fifth of a class is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
    size = request.image_size or 32
    pixels, labels = resize(pixels, size), torch.from_numpy(found.target).long()
    order = by_turns(labels, torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Source(
        tuple("0123456789"),
        MemoryImages(pixels[train], labels[train]),
        MemoryImages(pixels[test], labels[test]),
        size,
        1,
        "shift",
        ((0.3058,), (0.3236,)),
        contents=_describe({"train": labels[train], "test": labels[test]}, (8, 8)),
    )


def _describe(splits: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, str]:
    """The contents of splits that are no files: from their labels and the shape of an image."""
    return {
        split: f"{len(labels)} images, {'x'.join(map(str, shape))}, labels "
        + hashlib.blake2b(labels.numpy().tobytes(), digest_size=8).hexdigest()
        for split, labels in splits.items()
    }


def _torchvision(name: str) -> Callable[[Request], Source]:
    def load(request: Request) -> Source:
        from torchvision import datasets

        root, size = request.root, request.image_size or 32
        folder = root / name.lower()
        if (folder / "train").is_dir():
            return _folder(replace(request, root=folder), NORMALISATION[name])
        splits = []
        try:
            for train in (True, False):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = getattr(datasets, name)(
                        str(root), train=train, download=request.download
                    )
                data, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets).long()
                pixels = data[:, None] if data.ndim == 3 else data.permute(0, 3, 1, 2)
                splits.append(MemoryImages(resize(pixels.contiguous(), size), labels))
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
            size,
            1 if grey else 3,
            "crop_flip",
            NORMALISATION[name],
            contents=_describe(
                {"train": splits[0].labels, "test": splits[1].labels}, found.data.shape[1:]
            ),
        )

    return load


def _folder(request: Request, normalisation: tuple[Numbers, Numbers] | None = None) -> Source:
    root = request.root
    folders = _splits(root)
    look = look_at(list(folders.values()))
    size, channels = request.image_size or look.side or USUAL_SIZE, look.channels
    images: dict[str, Images] = {}
    count = sum(len(folder.paths) for folder in folders.values())
    fits = count * channels * size * size <= request.memory_budget_mb * 2**20
    contents: dict[str, str] = {}
    for split, folder in folders.items():
        labels = torch.tensor(folder.labels)
        files = FileImages(folder.paths, labels, size, channels, request.resize or "crop")
        images[split] = files
        digests: Sequence[str] = [f"{path.stat().st_size} bytes" for path in folder.paths]
        if fits:
            images[split] = memory = files.in_memory()
            digests = memory.digests
        contents.update(zip(folder.names, digests, strict=True))
    if normalisation is not None and len(normalisation[0]) != channels:
        normalisation = None
    said = notices(root, folders, look, request.resize) + (copies(contents) if fits else [])
    if request.image_size is None and look.side is None:
        said.append(
            f"images under {root} have no size in common and image_size is not given: each becomes "
            f"{size} x {size} pixels"
        )
    return Source(
        folders["train"].classes,
        images["train"],
        images["test"],
        size,
        channels,
        "crop_flip" if size <= 64 else "random_resized_crop",
        normalisation,
        images.get("val"),
        request.resize or "crop",
        contents,
        tuple(said),
    )


def _splits(root: Path) -> dict[str, Folder]:
    """The folders train and test, and val if there is one; validation images alone are for testing."""
    for needed in (root, root / "train"):
        if not needed.is_dir():
            raise DataError(
                f"there is no folder {needed}; an image folder has train/CLASS/ and test/CLASS/ "
                "(or val/CLASS/): correct data.root"
            )
    found = [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(
            f"{root} has both {found[0].name}/ and {found[1].name}/; keep one for validation"
        )
    train = list_folder(root / "train")
    if (root / "test").is_dir():
        found.insert(0, root / "test")
    if not found:
        raise DataError(f"{root} has neither test/ nor val/ beside train/; add one to test on")
    others = [list_folder(path, train.classes) for path in found]
    return {"train": train, **dict(zip(("test", "val"), others, strict=False))}


DATASETS: dict[str, Callable[[Request], Source]] = {
    "digits": _digits,
    "fashion_mnist": _torchvision("FashionMNIST"),
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "image_folder": _folder,
}
