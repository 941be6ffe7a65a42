"""Images and labels: in memory, or decoded from files when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from prune_dn.errors import DataError

BILINEAR = Image.Resampling.BILINEAR
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F"}


class Images(Protocol):
    """Labelled images: `labels` is (N,) int64, `take` gives (n, C, H, W) uint8."""

    @property
    def labels(self) -> Tensor: ...

    def take(self, indices: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images, (N, C, H, W) uint8; `digests` are those of their files, if they had any."""

    pixels: Tensor
    labels: Tensor
    digests: tuple[str, ...] = ()

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded each time. With one channel an image in colour is refused."""

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int
    in_channels: int
    resize: str = "crop"

    def take(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._decode(self.paths[i])[0] for i in indices])

    def _decode(self, path: Path) -> tuple[Tensor, str]:
        """The image, and a digest of its file."""
        with _reading(path):
            content = path.read_bytes()
            with Image.open(BytesIO(content)) as file:
                if self.in_channels == 1 and file.mode not in GREY_MODES:
                    raise DataError(
                        f"{path} is in colour, but the images that were looked at are grey; convert "
                        "it to grey, or all of them to colour"
                    )
                pixels = _decoded(file, self.image_size, self.in_channels, self.resize)
        return pixels, hashlib.blake2b(content, digest_size=8).hexdigest()

    def in_memory(self) -> MemoryImages:
        """All of them decoded, by as many threads as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            pixels, digests = zip(*threads.map(self._decode, self.paths), strict=True)
        return MemoryImages(torch.stack(pixels), self.labels, digests)


def decode(path: Path, image_size: int, in_channels: int, resize: str = "crop") -> Tensor:
    """One file as (C, image_size, image_size) uint8; `resize` is a name from RESIZES.

    The image stands upright (EXIF). 16-bit pixels are scaled, 65535 to 255; transparent ones lie on
    white; of several frames or pages it is the first. Raises DataError naming a file that cannot be
    decoded, or whose pixels have no known range (32 bits, floating point).
    """
    with _reading(path), Image.open(path) as file:
        return _decoded(file, image_size, in_channels, resize)


def _decoded(file: Image.Image, image_size: int, in_channels: int, resize: str) -> Tensor:
    _check_range(file)
    ImageOps.exif_transpose(file, in_place=True)
    image = _eight_bits(file).convert("L" if in_channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        image = RESIZES[resize](image, image_size)
    pixels = np.array(image, dtype=np.uint8).reshape(image_size, image_size, in_channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits a channel without transparency."""
    if is_deep(image):
        levels = np.asarray(image).astype(np.uint32)
        if (
            getattr(image, "tag_v2", {}).get(262) == 0
        ):  # of TIFF: 0 is white; of 8 bits Pillow knows
            levels = 65535 - levels
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB") if image.mode == "LAB" else image


def _check_range(image: Image.Image) -> None:
    if image.mode in ("I", "F") and not is_deep(image):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise DataError(
            f"has {kind} pixels (mode {image.mode}): what is black and what is white is not known; "
            "save it with 8 or 16 bits a pixel"
        )


def is_deep(image: Image.Image) -> bool:
    """Whether the pixels have 16 bits, 0 to 65535."""
    # Pillow gives those of PGM files, and before version 11 of PNG files, 32 bits to lie in
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels can be transparent."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side fitted, the centre of the longer one."""
    scale = size / min(image.size)
    width, height = (max(size, round(s * scale)) for s in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), BILINEAR).crop((left, top, left + size, top + size))


def _squash(image: Image.Image, size: int) -> Image.Image:
    """Both sides fitted, each by its own scale."""
    return image.resize((size, size), BILINEAR)


def _pad(image: Image.Image, size: int) -> Image.Image:
    """The longer side fitted, black beside or above and below."""
    return ImageOps.pad(image, (size, size), BILINEAR, color=0)


RESIZES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "crop": _crop,
    "squash": _squash,
    "pad": _pad,
}


def resize(pixels: Tensor, image_size: int) -> Tensor:
    """(N, C, H, W) uint8 to (N, C, image_size, image_size), bilinear."""
    if pixels.shape[-2:] == (image_size, image_size):
        return pixels
    size = (image_size, image_size)
    out = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    return out.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before its pixels are decoded."""

    path: Path
    size: tuple[int, int]  # width, height
    grey: bool
    deep: bool
    alpha: bool
    frames: bool  # more than one


def read_header(path: Path) -> Header:
    """Raises DataError naming a file that is no image."""
    with _reading(path), Image.open(path) as file:
        _check_range(file)
        found = file.size, file.mode in GREY_MODES, is_deep(file), has_alpha(file)
        return Header(path, *found, frames=_has_more(file))


def _has_more(file: Image.Image) -> bool:
    if file.format == "MPO":  # a photograph with previews of itself
        return False
    try:
        file.seek(1)
    except EOFError:
        return False
    return True


def brightest(path: Path) -> int:
    """The largest value of a grey image, as it is in the file."""
    with _reading(path), Image.open(path) as file:
        return int(np.asarray(file).max())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong: Pillow's decoders raise almost anything."""
    try:
        yield
    except DataError as error:
        text = str(error)
        raise DataError(text if str(path) in text else f"the image {path} {text}") from error
    except Exception as error:
        raise DataError(
            f"cannot decode the image {path} ({type(error).__name__}: {error}); "
            "replace the file or remove it"
        ) from error
