"""Files become pixels: sizes, modes, memory or not, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune_dn.errors import DataError
from prune_dn.images import FileImages, decode, list_folder, look_at, resize


def write(path: Path, pixels: np.ndarray, **how: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "PNG"])
def test_decode_gives_the_very_pixels(tmp_path: Path, ending: str) -> None:
    pixels = noise(8, 8, 3)
    out = decode(write(tmp_path / f"a.{ending}", pixels), 8, 3)
    assert out.dtype == torch.uint8 and out.is_contiguous()
    np.testing.assert_array_equal(out.numpy(), pixels.transpose(2, 0, 1))


def test_decode_jpeg_is_near(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 4
    out = decode(write(tmp_path / "a.jpg", smooth, quality=95), 16, 1)
    assert np.abs(out[0].numpy().astype(int) - smooth).max() < 8


def test_grey_and_rgb_become_each_other(tmp_path: Path) -> None:
    grey = noise(8, 8)
    path = write(tmp_path / "grey.png", grey)
    assert torch.equal(decode(path, 8, 3), torch.from_numpy(grey).expand(3, 8, 8))
    colour = noise(8, 8, 3)
    out = decode(write(tmp_path / "colour.png", colour), 8, 1)
    weighted = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(out[0].numpy() - weighted).max() < 1


def test_uneven_image_is_fitted_and_cropped_at_the_centre(tmp_path: Path) -> None:
    """Left third black, middle grey, right white: of 24x8 the centre 8x8 is grey alone."""
    pixels = np.repeat(np.array([0, 100, 255], dtype=np.uint8), 8)[None].repeat(8, axis=0)
    assert (decode(write(tmp_path / "wide.png", pixels), 8, 1) == 100).all()
    assert (decode(write(tmp_path / "high.png", pixels.T.copy()), 8, 1) == 100).all()
    small = decode(tmp_path / "wide.png", 4, 1)
    assert small.shape == (1, 4, 4) and (small[:, :, 1:3] == 100).all()
    assert decode(write(tmp_path / "thin.png", noise(1, 9)), 5, 3).shape == (3, 5, 5)


def test_in_memory_equals_decoded_each_time(tmp_path: Path) -> None:
    shapes = [(9, 12, 3), (8, 8), (20, 7, 3), (8, 8, 3)]
    paths = tuple(
        write(tmp_path / f"{i}.png", noise(*shape, seed=i)) for i, shape in enumerate(shapes)
    )
    files = FileImages(paths, torch.tensor([0, 1, 1, 0]), 8, 3)
    memory = files.in_memory()
    assert memory.pixels.shape == (4, 3, 8, 8) and torch.equal(memory.labels, files.labels)
    assert torch.equal(memory.take([2, 0, 3, 2]), files.take([2, 0, 3, 2]))
    assert torch.equal(memory.take([1])[0], decode(paths[1], 8, 3))


def test_resize() -> None:
    flat = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, 20), torch.full((2, 1, 20, 20), 77, dtype=torch.uint8))
    images = torch.from_numpy(noise(2, 1, 8, 8))
    assert resize(images, 8) is images
    halved = resize(images.repeat_interleave(4, 2).repeat_interleave(4, 3), 8)
    ours, pillow = halved[0, 0].int(), Image.fromarray(images[0, 0].numpy())
    big = pillow.resize((32, 32), Image.Resampling.NEAREST)
    theirs = torch.from_numpy(np.array(big.resize((8, 8), Image.Resampling.BILINEAR))).int()
    assert (ours - theirs).abs().max() <= 1


def test_look_at(tmp_path: Path) -> None:
    grey = write(tmp_path / "a.png", noise(8, 8))
    colour = write(tmp_path / "b.png", noise(8, 8, 3))
    wide = write(tmp_path / "c.png", noise(8, 9))
    assert look_at([grey]) == (8, 1)
    assert look_at([grey, colour]) == (8, 3)
    assert look_at([wide, wide]) == (None, 1)
    assert look_at([grey, wide]) == (None, 1)


def test_what_cannot_be_decoded(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    whole = write(tmp_path / "whole.png", noise(32, 32, 3))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-900])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (text, cut, empty, tmp_path / "missing.png"):
        with pytest.raises(DataError, match=rf"cannot decode the image .*{path.name} .*replace"):
            decode(path, 8, 3)
    with pytest.raises(DataError, match=r"text\.png"):
        look_at([whole, text])
    with pytest.raises(DataError, match=r"cut\.png"):
        FileImages((whole, cut), torch.tensor([0, 0]), 8, 3).in_memory()


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bomb.png", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png .*DecompressionBombError"):
        decode(path, 8, 1)


def test_list_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/deep/1.PNG", "a/0.jpg", "a/notes.txt", ".hidden/3.png"):
        write(tmp_path / "x.png", noise(4, 4))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "x.png").read_bytes())
    found = list_folder(tmp_path)
    assert found.classes == ("a", "b") and found.labels == (0, 0, 1)
    assert [p.name for p in found.paths] == ["0.jpg", "1.PNG", "2.png"]
    again = list_folder(tmp_path, ("0", "a", "b"))
    assert again.classes == ("0", "a", "b") and again.labels == (1, 1, 2)
    with pytest.raises(DataError, match=r"classes that the training images lack: b; .* a, c"):
        list_folder(tmp_path, ("a", "c"))
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"/c has no images \(\.bmp, "):
        list_folder(tmp_path)
    with pytest.raises(DataError, match=r"has no class folders; put images under .*/CLASS/"):
        list_folder(tmp_path / "b")
