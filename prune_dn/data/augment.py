"""Random changes to training images, on whole batches; the randomness is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# A transform of (N, C, H, W) uint8 images with (N, 4) numbers in [0, 1), one row per image.
Augmentation = Callable[[Tensor, Tensor], Tensor]


def shift(images: Tensor, chance: Tensor) -> Tensor:
    """Move each image by up to an eighth of its side; black comes in."""
    return _crop(images, chance, images.shape[-1] // 8)


def crop_flip(images: Tensor, chance: Tensor) -> Tensor:
    """Pad by an eighth of the side, crop at random, mirror every second image (CIFAR's standard)."""
    out = shift(images, chance)
    mirrored = chance[:, 2] < 0.5
    out[mirrored] = out[mirrored].flip(-1)
    return out


def random_resized_crop(images: Tensor, chance: Tensor) -> Tensor:
    """A random box of 25 to 100 % of the area, sides 3:4 to 4:3, scaled up; mirrored at random."""
    area = 0.25 + 0.75 * chance[:, 0]
    ratio = torch.exp((2 * chance[:, 1] - 1) * torch.log(torch.tensor(4 / 3)))
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where((chance[:, 2] * 1024) % 1 < 0.5, -1.0, 1.0)  # not tied to the place
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * mirror, high
    theta[:, 0, 2] = (2 * chance[:, 2] - 1) * (1 - wide)
    theta[:, 1, 2] = (2 * chance[:, 3] - 1) * (1 - high)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return out.round_().to(torch.uint8)


def none(images: Tensor, chance: Tensor) -> Tensor:
    """Leave the images as they are."""
    return images


AUGMENTATIONS: dict[str, Augmentation] = {
    f.__name__: f for f in (none, shift, crop_flip, random_resized_crop)
}


def _crop(images: Tensor, chance: Tensor, pad: int) -> Tensor:
    count, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    top = (chance[:, 0] * (2 * pad + 1)).long()
    left = (chance[:, 1] * (2 * pad + 1)).long()
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)
