"""Sizes of images, in pixels."""

from __future__ import annotations

from numbers import Integral

from prune_dn.errors import ConfigError

ImageSize = int | tuple[int, int]


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels. Raises ConfigError for anything but one integer or two."""
    given = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(given) != 2 or any(
        isinstance(s, bool) or not isinstance(s, Integral) or s < 1 for s in given
    ):
        raise ConfigError(f"image_size is {image_size!r}; give pixels, or (height, width)")
    return int(given[0]), int(given[1])
