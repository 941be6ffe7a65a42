"""Sizes of images and of a DenseNet's maps, in pixels."""

from __future__ import annotations

from numbers import Integral

from prune_dn.errors import ConfigError
from prune_dn.models.config import DenseNetConfig
from prune_dn.models.config import ImageSize as ImageSize
from prune_dn.models.light_cnn_config import LightCNNConfig


def default_image_size(config: DenseNetConfig | LightCNNConfig) -> int:
    """32 pixels for a cifar stem, 224 for an imagenet stem; a Light CNN takes one size."""
    if isinstance(config, LightCNNConfig):
        return config.image_size
    return 32 if config.stem == "cifar" else 224


def stem_pixels(config: DenseNetConfig, image_size: ImageSize | None) -> int:
    """Output pixels of the first conv."""
    height, width = _sides(config, image_size)
    if config.stem == "imagenet":
        height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height * width


def block_pixels(config: DenseNetConfig, image_size: ImageSize | None) -> list[int]:
    """Pixels of each block's stream. Raises ConfigError where the image is too small."""
    height, width = given = _sides(config, image_size)
    if config.stem == "imagenet":
        height, width = (height + 3) // 4, (width + 3) // 4
    pixels = []
    for _ in config.blocks:
        if height < 1 or width < 1:
            raise ConfigError(
                f"images of {given[0]}x{given[1]} pixels are too small for "
                f"{len(config.blocks)} blocks with a {config.stem} stem"
            )
        pixels.append(height * width)
        height, width = height // 2, width // 2
    return pixels


def _sides(config: DenseNetConfig, image_size: ImageSize | None) -> tuple[int, int]:
    return sides(default_image_size(config) if image_size is None else image_size)


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels. Raises ConfigError for anything but one integer or two."""
    given = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(given) != 2 or any(
        isinstance(s, bool) or not isinstance(s, Integral) or s < 1 for s in given
    ):
        raise ConfigError(f"image_size is {image_size!r}; give pixels, or (height, width)")
    return int(given[0]), int(given[1])
