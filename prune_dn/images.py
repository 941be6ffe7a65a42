"""Images and labels: in memory, or decoded from files when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from prune_dn.errors import DataError

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}


class Images(Protocol):
    """Labelled images: `labels` is (N,) int64, `take` gives (n, C, H, W) uint8."""

    @property
    def labels(self) -> Tensor: ...

    def take(self, indices: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images, (N, C, H, W) uint8."""

    pixels: Tensor
    labels: Tensor

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded each time."""

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int
    in_channels: int

    def take(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._decode(self.paths[i]) for i in indices])

    def _decode(self, path: Path) -> Tensor:
        return decode(path, self.image_size, self.in_channels)

    def in_memory(self) -> MemoryImages:
        """All of them decoded, by as many threads as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            pixels = torch.stack(list(threads.map(self._decode, self.paths)))
        return MemoryImages(pixels, self.labels)


def decode(path: Path, image_size: int, in_channels: int) -> Tensor:
    """One file as (C, image_size, image_size) uint8; the shorter side is fitted, then the centre
    cropped. Raises DataError naming a file that cannot be decoded."""
    with _opened(path) as file:
        image = file.convert("L" if in_channels == 1 else "RGB")
    width, height = image.size
    if (width, height) != (image_size, image_size):
        scale = image_size / min(width, height)
        width, height = (max(image_size, round(s * scale)) for s in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.array(image, dtype=np.uint8).reshape(image_size, image_size, in_channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resize(pixels: Tensor, image_size: int) -> Tensor:
    """(N, C, H, W) uint8 to (N, C, image_size, image_size), bilinear."""
    if pixels.shape[-2:] == (image_size, image_size):
        return pixels
    size = (image_size, image_size)
    out = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    return out.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Folder:
    """The files of an image folder's split, by class."""

    path: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def list_folder(path: Path, classes: tuple[str, ...] | None = None) -> Folder:
    """The image files of `path`/CLASS/, with labels by sorted class name (or by `classes`).

    Raises DataError for a folder without classes, an empty class, or a class not in `classes`.
    """
    found = tuple(sorted(d.name for d in path.iterdir() if d.is_dir() and d.name[0] != "."))
    if not found:
        raise DataError(f"{path} has no class folders; put images under {path}/CLASS/")
    strange = [name for name in found if classes is not None and name not in classes]
    if strange and classes is not None:
        raise DataError(
            f"{path} has classes that the training images lack: {', '.join(strange)}; "
            f"the training classes are {', '.join(classes)}"
        )
    classes = classes or found
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        files = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in ENDINGS)
        if not files:
            raise DataError(f"{path / name} has no images ({', '.join(sorted(ENDINGS))})")
        paths += files
        labels += [classes.index(name)] * len(files)
    return Folder(path, classes, tuple(paths), tuple(labels))


def look_at(paths: Sequence[Path]) -> tuple[int | None, int]:
    """Size and channels of the first files: (the side that all share, or None; 1 if all are grey)."""
    seen = [_size_and_mode(path) for path in paths]
    (width, height), modes = seen[0][0], {mode for _, mode in seen}
    side = width if len({size for size, _ in seen}) == 1 and width == height else None
    return side, 1 if modes <= {"1", "L", "I;16"} else 3


def _size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    with _opened(path) as file:
        return file.size, file.mode


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot decode the image {path} ({type(error).__name__}: {error}); "
            "replace the file or remove it"
        ) from error
