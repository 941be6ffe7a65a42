"""Image folders: which files count, what is refused, and what their owner is told."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prune_dn.data import folders as module
from prune_dn.data.datasets import Datasets, load_datasets
from prune_dn.data.folders import list_folder, look_at
from prune_dn.errors import DataError, DataWarning

Pixels = tuple[int, ...]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make(root: Path, *splits: str, shape: Pixels = (8, 8), each: int = 4) -> Path:
    """`each` different images in the classes a and b of each split."""
    seed = 0
    for split in splits:
        for name in ("a", "b"):
            for i in range(each):
                seed += 1
                write(root / split / name / f"{i}.png", noise(*shape, seed=seed))
    return root


def load(root: Path, **how: Any) -> tuple[Datasets, list[str]]:
    """The data sets, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_datasets("image_folder", root=root, **how)
    assert all(w.category is DataWarning for w in caught)
    said = [str(w.message) for w in caught]
    assert list(found.notices) == said
    return found, said


def test_list_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/deep/1.PNG", "a/0.jpg", "a/notes.txt"):
        write(tmp_path / "b" / "x.png", noise(4, 4))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / "x.png").rename(tmp_path / name)
    found = list_folder(tmp_path)
    assert found.classes == ("a", "b") and found.labels == (0, 0, 1)
    assert [p.name for p in found.paths] == ["0.jpg", "1.PNG", "2.png"]
    assert found.names == [f"{tmp_path.name}/{x}" for x in ("a/0.jpg", "a/deep/1.PNG", "b/2.png")]
    again = list_folder(tmp_path, ("0", "a", "b"))
    assert again.classes == ("0", "a", "b") and again.labels == (1, 1, 2)
    with pytest.raises(DataError, match=r"classes that the training images lack: b; .* a, c"):
        list_folder(tmp_path, ("a", "c"))
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"/c has no images \(\.bmp, "):
        list_folder(tmp_path)
    with pytest.raises(DataError, match=r"has no class folders; put images under .*/CLASS/"):
        list_folder(tmp_path / "b")


@pytest.mark.parametrize(
    "hidden",
    [
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "a/deep/.cache/x.png",
        "a/._0.png",
        "a/__MACOSX/a/0.png",
        "__MACOSX/a/0.png",
        ".ipynb_checkpoints/x.png",
        ".Trash-0/files/x.png",
    ],
)
def test_hidden_files_and_folders_do_not_count(tmp_path: Path, hidden: str) -> None:
    make(tmp_path, "train", "test")
    write(tmp_path / "train" / hidden, noise(8, 8))
    assert list_folder(tmp_path / "train").classes == ("a", "b")
    assert len(list_folder(tmp_path / "train").paths) == 8
    assert load(tmp_path)[1] == []


def test_links_are_followed_once_and_folders_are_no_images(tmp_path: Path) -> None:
    make(tmp_path / "far", "train", each=2)
    make(tmp_path, "train", each=1)
    (tmp_path / "train" / "a" / "x.png").mkdir()
    (tmp_path / "train" / "a" / "more").symlink_to(tmp_path / "far" / "train" / "a")
    (tmp_path / "train" / "a" / "round").symlink_to(tmp_path / "train" / "a")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")  # to read it would wait for ever
    (tmp_path / "train" / "c").symlink_to(tmp_path / "far" / "train" / "b")
    found = list_folder(tmp_path / "train")
    assert [re.sub(".*/train/", "", name) for name in map(str, found.paths)] == [
        *("a/0.png", "a/more/0.png", "a/more/1.png", "b/0.png", "c/0.png", "c/1.png")
    ]
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"cannot decode the image .*gone\.png"):
        look_at([list_folder(tmp_path / "train")])


def test_look_at(tmp_path: Path) -> None:
    shapes: dict[str, list[Pixels]] = {
        "grey": [(8, 8)],
        "mixed": [(8, 8), (8, 8, 3)],
        "wide": [(8, 9), (8, 9)],
        "sizes": [(8, 8), (9, 9)],
    }
    want = {"grey": (8, 1), "mixed": (8, 3), "wide": (None, 1), "sizes": (None, 1)}
    for split, each in shapes.items():
        for i, shape in enumerate(each):
            write(tmp_path / split / "a" / f"{i}.png", noise(*shape))
        look = look_at([list_folder(tmp_path / split)])
        assert (look.side, look.channels) == want[split] and len(look.headers) == len(each)
    (tmp_path / "grey" / "a" / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        look_at([list_folder(tmp_path / "grey")])


def test_only_some_of_very_many_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in colour that was not looked at is refused when its turn comes, not made grey."""
    make(tmp_path, "train", "test", each=5)
    write(tmp_path / "train" / "b" / "4.png", noise(8, 8, 3))
    monkeypatch.setattr(module, "LOOKED_AT", 4)
    folder = list_folder(tmp_path / "train")
    assert [h.path.name for h in look_at([folder]).headers] == ["0.png", "3.png", "1.png", "4.png"]
    write(tmp_path / "train" / "b" / "3.png", noise(8, 8, 3, seed=1))
    write(tmp_path / "train" / "b" / "4.png", noise(8, 8))
    numbers: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)}
    refused = pytest.raises(DataError, match=r"b/3\.png is in colour, but .* grey; convert it")
    with refused:
        load(tmp_path)
    images = load(tmp_path, memory_budget_mb=0, **numbers)[0].train.images
    with refused:
        images.take(range(10))


def test_12_bits_in_16_are_refused(tmp_path: Path) -> None:
    """Scaled by the mode they would have 16 levels."""
    make(tmp_path, "train", "test")
    for i, path in enumerate((tmp_path / "train").rglob("*.png")):
        Image.fromarray(noise(8, 8, seed=i).astype(np.uint16) * 16).save(path)
    with pytest.raises(DataError, match=r"train/a/\d\.png, hold no value above 40\d\d of 65535"):
        load(tmp_path)
    for i, path in enumerate((tmp_path / "train").rglob("*.png")):
        Image.fromarray(noise(8, 8, seed=i).astype(np.uint16) * 257).save(path)
    found, said = load(tmp_path, augment=False)
    assert said == [] and found.spec.in_channels == 1
    want = torch.from_numpy(np.stack([noise(8, 8, seed=i) for i in range(8)]))
    have = found.train.images.take(range(8))[:, 0]
    assert sorted(have.flatten(1).tolist()) == sorted(want.flatten(1).tolist())


def test_a_validation_folder_is_the_validation_split(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", "val")
    found, said = load(tmp_path, limit=6, val_fraction=0.5)
    assert said == []
    assert [len(x) for x in (found.train, found.val, found.test)] == [6, 8, 8]
    for split in ("val", "test"):
        have = getattr(found, split).images.take(range(8))[:, 0]
        files = list_folder(tmp_path / split).paths
        want = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files]))
        assert torch.equal(have, want)
    (tmp_path / "val").rename(tmp_path / "valid")
    assert len(load(tmp_path)[0].val) == 8
    make(tmp_path, "validation")
    with pytest.raises(DataError, match=r"has both valid/ and validation/; keep one"):
        load(tmp_path)


def test_validation_images_alone_are_what_is_tested_on(tmp_path: Path) -> None:
    make(tmp_path, "train", "val")
    found, said = load(tmp_path, val_fraction=0.5)
    assert said == [] and [len(x) for x in (found.train, found.val, found.test)] == [4, 4, 8]


# What the owner is told.


def told(root: Path, want: str, **how: Any) -> Datasets:
    found, said = load(root, **how)
    assert len(said) == 1 and re.search(want, said[0]), said
    return found


def test_folders_that_are_not_read(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", "extra", "dev")
    told(tmp_path, r"also has dev, extra, which is not read$")


def test_images_that_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "train", "test")
    for name in ("x.png", "Thumbs.db", "notes.txt", "a/scan.dcm", "a/list.csv"):
        (tmp_path / "train" / name).write_bytes(b"x")
    told(tmp_path, r"^2 of 10 images are left out \(first: train/x\.png\): .* no class folder")


def test_a_class_without_test_images(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", "val")
    for split in ("test", "val"):
        os.rename(tmp_path / split / "b", tmp_path / f".{split}")
    found, said = load(tmp_path)
    assert [re.sub(".*/", "", text) for text in said] == [
        "test has no images of b",
        "val has no images of b",
    ]
    assert found.spec.classes == ("a", "b")
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(DataError, match=r"test/b has no images"):
        load(tmp_path)
    (tmp_path / "test" / "b").rmdir()
    os.rename(tmp_path / ".test", tmp_path / "test" / "B")
    with pytest.raises(DataError, match=r"test has classes that the training images lack: B"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_few_in_colour_make_all_colour(tmp_path: Path, split: str) -> None:
    make(tmp_path, "train", "test", each=40)
    colour = [write(tmp_path / split / "b" / f"{i}.png", noise(8, 8, 3, seed=i)) for i in (3, 33)]
    first = rf"\(first: {split}/b/3\.png\)"
    found = told(tmp_path, rf"^2 of 160 images are in colour {first}, .* 3 channels$")
    assert found.spec.in_channels == 3
    files = list_folder(tmp_path / split).paths
    for path in colour:
        have = getattr(found, split).images.take([files.index(path)])[0]
        np.testing.assert_array_equal(have.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_what_is_not_square(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", shape=(8, 16))
    write(tmp_path / "test" / "b" / "3.png", noise(8, 8))
    found = told(
        tmp_path,
        r"^15 of 16 images are not square \(first: train/a/0\.png\): .*squash or pad .* crop to say",
        image_size=8,
    )
    assert found.spec.resize == "crop" and found.spec.to_dict()["resize"] == "crop"
    wide = np.asarray(Image.open(tmp_path / "train" / "a" / "0.png"))
    np.testing.assert_array_equal(found.train.images.take([0])[0, 0].numpy(), wide[:, 4:12])
    for how in ("crop", "squash", "pad"):
        found, said = load(tmp_path, image_size=16, resize=how)
        assert said == [] and found.spec.resize == how
    np.testing.assert_array_equal(found.train.images.take([0])[0, 0, 4:12].numpy(), wide)
    with pytest.raises(DataError, match="resize 'stretch' is unknown; choose from crop, pad, sq"):
        load(tmp_path, resize="stretch")


def test_sizes_that_differ(tmp_path: Path) -> None:
    make(tmp_path, "train", "test")
    write(tmp_path / "test" / "b" / "3.png", noise(9, 9))
    found = told(tmp_path, r"no size in common and image_size is not given: .* 224 x 224 pixels$")
    assert found.spec.image_size == 224
    assert load(tmp_path, image_size=8)[1] == []


def test_transparency_and_frames(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", shape=(8, 8, 3))
    write(tmp_path / "train" / "a" / "1.png", noise(8, 8, 4))
    told(tmp_path, r"^1 of 16 images have an alpha channel \(first: train/a/1\.png\).*on white$")
    pages = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(2)]
    (tmp_path / "train" / "a" / "1.png").unlink()
    pages[0].save(tmp_path / "train" / "a" / "1.tif", save_all=True, append_images=pages[1:])
    told(
        tmp_path,
        r"^1 of 16 images have several frames or pages \(first: .*1\.tif\).* first is read$",
    )


def test_copies(tmp_path: Path) -> None:
    make(tmp_path, "train", "test", "val")
    train, test, val = (tmp_path / split for split in ("train", "test", "val"))
    for source, target in (
        (train / "a" / "1.png", test / "b" / "9.png"),
        (train / "a" / "2.png", test / "b" / "10.png"),
        (train / "b" / "0.png", val / "b" / "0.png"),
        (train / "b" / "3.png", train / "a" / "copy.png"),
        (test / "a" / "0.png", test / "a" / "copy.png"),  # harms nothing
    ):
        target.write_bytes(source.read_bytes())
    _, said = load(tmp_path)
    assert [text.partition(";")[0] for text in said] == [
        "train holds copies of other training images: 1 (first: train/b/3.png is train/a/copy.png)",
        "test holds copies of training images: 2 (first: test/b/10.png is train/a/2.png)",
        "val holds copies of training images: 1 (first: val/b/0.png is train/b/0.png)",
    ]
    assert len(load(tmp_path, memory_budget_mb=0, mean=(0.5,), std=(0.5,))[1]) == 0


# Contents: equal contents are equal data.


def test_contents_are_those_of_the_files(tmp_path: Path) -> None:
    import hashlib

    make(tmp_path, "train", "test", "val")
    contents = load(tmp_path)[0].contents
    want = {
        path.relative_to(tmp_path).as_posix(): hashlib.blake2b(
            path.read_bytes(), digest_size=8
        ).hexdigest()
        for split in ("train", "test", "val")
        for path in sorted((tmp_path / split).rglob("*.png"))
    }
    assert contents == want
    sizes = load(tmp_path, memory_budget_mb=0)[0].contents
    assert sizes == {name: f"{(tmp_path / name).stat().st_size} bytes" for name in want}


def test_contents_of_sets_that_are_no_files() -> None:
    first, again, small = (
        load_datasets("digits", image_size=size, seed=seed).contents
        for size, seed in ((8, 0), (8, 1), (16, 0))
    )
    assert first == again == small and set(first) == {"train", "test"}
    assert first["train"].startswith("1437 images, 8x8, labels ")


def test_a_root_in_a_hidden_folder_is_read(tmp_path: Path) -> None:
    make(tmp_path / ".cache" / "__MACOSX", "train", "test")
    assert len(load(tmp_path / ".cache" / "__MACOSX")[0].test) == 8


def test_commands_resize_as_the_checkpoint_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No warning where the checkpoint says how; --resize says otherwise."""
    from prune_dn.checkpoints.checkpoint import save
    from prune_dn.cli import main
    from prune_dn.models import densenet
    from prune_dn.training import evaluate

    make(tmp_path / "data", "train", "test", shape=(8, 24))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = densenet((2,), 4, bn_size=2, stem="cifar", num_classes=2, in_channels=1)
    how: dict[str, Any] = {"image_size": 8, "mean": (0.5,), "std": (0.25,)}
    sets = {x: load(tmp_path / "data", resize=x, **how)[0] for x in ("crop", "squash", "pad")}
    losses = {x: evaluate(net, data.test).loss for x, data in sets.items()}
    assert len(set(losses.values())) == 3
    save(net, "net.safetensors", info={"data": sets["squash"].spec.to_dict()})
    for more, resize in ([], "squash"), (["--resize", "pad"], "pad"), (["--resize=crop"], "crop"):
        assert main(["evaluate", "net.safetensors", "--json", *more]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["loss"] == pytest.approx(losses[resize], rel=1e-6)
        assert "not square" not in err
    assert main(["evaluate", "net.safetensors", "--resize", "stretch"]) == 2
    assert "resize 'stretch' is unknown; choose from crop, pad, squash" in capsys.readouterr().err
