"""Augmentation on batches equals a slow, plain rule for each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prune_dn.data.augment import AUGMENTATIONS, crop_flip, none, random_resized_crop, shift


def pictures(count: int, size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8)
    return images, torch.rand(count, 4)


def slow_crop(image: np.ndarray, chance: list[float], mirror: bool) -> np.ndarray:
    """Pixel by pixel, as the paper's recipe says: pad with 0, cut a window, mirror."""
    channels, size, _ = image.shape
    pad = size // 8
    top = int(np.float32(chance[0]) * np.float32(2 * pad + 1)) - pad
    left = int(np.float32(chance[1]) * np.float32(2 * pad + 1)) - pad
    out = np.zeros_like(image)
    for c in range(channels):
        for y in range(size):
            for x in range(size):
                column = size - 1 - x if mirror else x
                row, column = y + top, column + left
                if 0 <= row < size and 0 <= column < size:
                    out[c, y, x] = image[c, row, column]
    return out


@pytest.mark.parametrize(("size", "channels"), [(16, 3), (8, 1), (7, 1)])
def test_crop_flip_against_a_slow_rule(size: int, channels: int) -> None:
    images, chance = pictures(40, size, channels)
    kept = images.clone()
    flipped, moved = crop_flip(images, chance), shift(images, chance)
    assert torch.equal(images, kept), "the images themselves must stay"
    mirrored = 0
    for i in range(40):
        mirror = float(chance[i, 2]) < 0.5
        mirrored += mirror
        want = slow_crop(images[i].numpy(), chance[i].tolist(), mirror)
        np.testing.assert_array_equal(flipped[i].numpy(), want)
        np.testing.assert_array_equal(
            moved[i].numpy(), slow_crop(images[i].numpy(), chance[i].tolist(), False)
        )
    assert 5 < mirrored < 35


def test_every_place_is_reached_and_none_beyond() -> None:
    """Also by the largest number that torch.rand can give."""
    images = (
        torch.arange(1, 257).clamp(max=255).to(torch.uint8).view(1, 1, 16, 16).repeat(500, 1, 1, 1)
    )
    chance = torch.rand(500, 4)
    chance[0], chance[1] = 0.0, 1 - 2**-24
    out = shift(images, chance)
    assert len({o.numpy().tobytes() for o in out}) == 25
    assert torch.equal(out[0, 0, 2:, 2:], images[0, 0, :14, :14])
    assert torch.equal(out[1, 0, :14, :14], images[1, 0, 2:, 2:])


def test_random_resized_crop_of_the_whole_image_is_the_image() -> None:
    """Area 1 and ratio 1 cut nothing; only the mirror is left."""
    images, _ = pictures(2, 8)
    chance = torch.tensor([[1.0, 0.5, 0.0, 0.3], [1.0, 0.5, 0.75 / 1024, 0.9]])
    out = random_resized_crop(images, chance)
    assert torch.equal(out[0], images[0].flip(-1))
    assert torch.equal(out[1], images[1])


def test_random_resized_crop_cuts_the_box_it_says() -> None:
    """On a ramp a crop shows where it was taken: the columns' values are positions."""
    count, size = 400, 64
    ramp = torch.arange(size).mul(4).to(torch.uint8).expand(count, 1, size, size).contiguous()
    chance = torch.rand(count, 4)
    rows = random_resized_crop(ramp, chance)[:, 0].float() / 4  # (N, H, W): x of each pixel
    assert (rows.std(dim=1) == 0).all(), "a ramp along x must stay the same in every row"
    first, last = rows[:, 0, 1], rows[:, 0, -2]
    wide = (last - first).abs() / (size - 3)
    area, ratio = 0.25 + 0.75 * chance[:, 0], (4 / 3) ** (2 * chance[:, 1] - 1)
    assert torch.allclose(wide, (area * ratio).sqrt().clamp(max=1), atol=0.03)
    middle = (rows[:, 0, size // 2 - 1] + rows[:, 0, size // 2]) / 2
    place = (size - 1) / 2 + (2 * chance[:, 2] - 1) * (1 - wide) * size / 2
    assert torch.allclose(middle, place, atol=1.5)
    mirrored = last < first
    assert 120 < int(mirrored.sum()) < 280
    for side in (chance[:, 2] < 0.25, chance[:, 2] > 0.75):  # mirrors are not tied to the place
        assert 0.3 < float(mirrored[side].float().mean()) < 0.7


def test_names() -> None:
    images, chance = pictures(3, 8)
    assert sorted(AUGMENTATIONS) == ["crop_flip", "none", "random_resized_crop", "shift"]
    assert torch.equal(none(images, chance), images)
    for change in AUGMENTATIONS.values():
        out = change(images, chance)
        assert out.shape == images.shape and out.dtype == torch.uint8
