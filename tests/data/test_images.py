"""Files become pixels: sizes, modes, memory or not, and what cannot be read."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from prune_dn.data.images import FileImages, brightest, decode, read_header, resize
from prune_dn.errors import DataError


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
        read_header(text)
    with pytest.raises(DataError, match=r"cut\.png"):
        FileImages((whole, cut), torch.tensor([0, 0]), 8, 3).in_memory()


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bomb.png", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png .*DecompressionBombError"):
        decode(path, 8, 1)


# Modes: each becomes what a viewer shows, or is refused by name.


def png(bits: int, kind: int, pixels: np.ndarray) -> bytes:
    """A PNG file by its specification: kind 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in pixels)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 0 to 65520


@pytest.mark.parametrize("kind", ["png", "pgm", "little.tif", "big.tif", "jp2"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"deep.{kind}"
    if kind == "png":
        path.write_bytes(png(16, 0, DEEP))
    elif kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP.astype(">u2" if kind == "big.tif" else "<u2")).save(path)
    want = np.round(DEEP / 65535 * 255)
    np.testing.assert_array_equal(decode(path, 8, 1)[0].numpy(), want)
    assert torch.equal(decode(path, 8, 3), decode(path, 8, 1).expand(3, 8, 8))
    header = read_header(path)
    assert header.deep and header.grey and brightest(path) == 65520


def test_16_bits_whose_zero_is_white(tmp_path: Path) -> None:
    """PhotometricInterpretation 0, as of scanned films."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(DEEP).save(tmp_path / "film.tif", tiffinfo=tags)
    want = np.round((65535 - DEEP.astype(int)) / 65535 * 255)
    np.testing.assert_array_equal(decode(tmp_path / "film.tif", 8, 1)[0].numpy(), want)


def test_16_bits_in_colour_and_with_alpha(tmp_path: Path) -> None:
    colour = np.stack([DEEP, DEEP[::-1], DEEP.T], axis=2)
    (tmp_path / "rgb.png").write_bytes(png(16, 2, colour))
    out = decode(tmp_path / "rgb.png", 8, 3).numpy().transpose(1, 2, 0)
    assert np.abs(out - colour / 65535 * 255).max() <= 1
    opaque = np.stack([DEEP, np.full_like(DEEP, 65535)], axis=2)
    (tmp_path / "la.png").write_bytes(png(16, 4, opaque))
    assert np.abs(decode(tmp_path / "la.png", 8, 1)[0].numpy() - DEEP / 65535 * 255).max() <= 1


@pytest.mark.parametrize("ending", ["tif", "pfm"])
def test_what_has_no_known_range_is_refused(tmp_path: Path, ending: str) -> None:
    for pixels, mode in ((DEEP.astype(np.float32), "F"), (DEEP.astype(np.int32) * 99, "I")):
        if (mode, ending) == ("I", "pfm"):
            continue
        path = tmp_path / f"{mode}.{ending}"
        Image.fromarray(pixels).save(path)
        for read in (lambda p: decode(p, 8, 1), read_header):
            with pytest.raises(DataError, match=rf"{path.name} has .*mode {mode}.*8 or 16 bits"):
                read(path)


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    """Black letters on nothing are black letters on white, not a black square."""
    rgba = noise(8, 8, 4)
    rgba[:4, :, 3] = 0
    path = write(tmp_path / "rgba.png", rgba)
    alpha = rgba[..., 3:].astype(float) / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    out = decode(path, 8, 3).numpy().transpose(1, 2, 0)
    assert np.abs(out - want).max() <= 1 and (out[:4] == 255).all()
    la = np.dstack([rgba[..., 0], rgba[..., 3]])
    path = write(tmp_path / "la.png", la)
    assert np.abs(decode(path, 8, 1)[0].numpy() - want[..., 0]).max() <= 1
    palette = Image.fromarray(noise(8, 8, 3)).quantize(8)
    index = np.asarray(palette)
    for name, clear in (("one", 3), ("bytes", bytes([255, 255, 255, 0]))):
        palette.save(tmp_path / f"{name}.png", transparency=clear)
        out = decode(tmp_path / f"{name}.png", 8, 3).numpy().transpose(1, 2, 0)
        solid = np.asarray(palette.convert("RGB"))
        np.testing.assert_array_equal(out, np.where((index == 3)[..., None], 255, solid))
    grey = Image.fromarray(index)
    grey.save(tmp_path / "key.png", transparency=3)
    want = np.where(index == 3, 255, index)
    np.testing.assert_array_equal(decode(tmp_path / "key.png", 8, 1)[0].numpy(), want)
    for name in ("rgba", "la", "one", "bytes", "key"):
        assert read_header(tmp_path / f"{name}.png").alpha


def test_other_modes(tmp_path: Path) -> None:
    """Two levels, palettes, print and video colours, each against the formula of its colours."""
    bits = noise(8, 8) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(decode(tmp_path / "bits.png", 8, 1)[0].numpy(), bits * 255)
    inks = noise(8, 8, 4)
    Image.frombytes("CMYK", (8, 8), inks.tobytes()).save(tmp_path / "inks.tif")
    c, k = inks[..., :3].astype(float), inks[..., 3:].astype(float)
    out = decode(tmp_path / "inks.tif", 8, 3).numpy().transpose(1, 2, 0)
    assert np.abs(out - (255 - c) * (255 - k) / 255).max() <= 1
    video = np.full((8, 8, 3), (100, 128, 128), np.uint8)  # no colour at all
    Image.frombytes("YCbCr", (8, 8), video.tobytes()).save(tmp_path / "video.tif")
    assert (decode(tmp_path / "video.tif", 8, 3) == 100).all()
    lab = np.zeros((8, 8, 3), np.uint8)
    lab[:4, :, 0] = 255
    Image.frombytes("LAB", (8, 8), lab.tobytes()).save(tmp_path / "lab.tif")
    for channels in (1, 3):
        out = decode(tmp_path / "lab.tif", 8, channels)
        assert (out[:, :4] > 250).all() and (out[:, 4:] < 5).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path: Path, orientation: int) -> None:
    """EXIF tag 274 says where the first row and column of the file are shown."""
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8)
    stored = [
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        upright.T,
        np.rot90(upright),
        upright[::-1, ::-1].T,
        np.rot90(upright, -1),
    ][orientation - 1]
    exif = Image.Exif()
    exif[274] = orientation
    for ending in ("png", "tif"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        np.testing.assert_array_equal(decode(path, 8, 1)[0].numpy(), upright)
        deep = np.ascontiguousarray(stored).astype(np.uint16) * 257
        Image.fromarray(deep).save(path, exif=exif)
        np.testing.assert_array_equal(decode(path, 8, 1)[0].numpy(), upright)


@pytest.mark.parametrize("ending", ["gif", "tif", "png", "webp"])
def test_of_several_frames_the_first(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (40, 200)]
    path = tmp_path / f"many.{ending}"
    how = {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **how)
    assert (decode(path, 8, 1) == 40).all() and read_header(path).frames
    frames[0].save(path)
    assert not read_header(path).frames


def test_resize_of_what_is_not_square(tmp_path: Path) -> None:
    """Thirds: black, grey, white."""
    wide = np.repeat(np.array([0, 100, 255], dtype=np.uint8), 8)[None].repeat(12, axis=0)
    for pixels, turn in ((wide, False), (wide.T.copy(), True)):
        path = write(tmp_path / "a.png", pixels)
        out = {how: decode(path, 24, 1, how)[0].numpy() for how in ("crop", "squash", "pad")}
        if turn:
            out = {how: image.T for how, image in out.items()}
        assert out["crop"][5, [0, 12, 23]].tolist() == [0, 100, 255]
        assert (out["crop"][:, 2] == out["crop"][0, 2]).all()
        np.testing.assert_array_equal(out["squash"], np.repeat(wide, 2, axis=0))
        np.testing.assert_array_equal(out["pad"][6:18], wide)
        assert not out["pad"][:6].any() and not out["pad"][18:].any()
    square = write(tmp_path / "b.png", noise(12, 12))
    first, *others = (decode(square, 8, 1, how) for how in ("crop", "squash", "pad"))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tif", "bmp", "webp", "ppm"])
def test_damaged_files_are_named(tmp_path: Path, ending: str) -> None:
    """Whatever a decoder makes of flipped and missing bytes: an image, or a DataError."""
    exif = Image.Exif()
    exif[274] = 6
    how = {"exif": exif} if ending in ("png", "jpg", "tif", "webp") else {}
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(16, 16, 3)).save(path, **how)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(150):
        content = bytearray(
            whole[: draw.integers(0, len(whole) + 1)] if draw.random() < 0.3 else whole
        )
        for place in draw.integers(0, max(len(content), 1), draw.integers(0, 4) * bool(content)):
            content[place if draw.random() < 0.3 else place % min(80, len(content))] = (
                draw.integers(256)
            )
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own
            try:
                assert decode(path, 8, 3).shape == (3, 8, 8)
                read_header(path)
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 10 and all(path.name in text for text in refused)
