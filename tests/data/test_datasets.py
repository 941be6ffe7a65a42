"""Splits that keep choices honest, images that depend on nothing but the seed, and clear refusals."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from prune_dn.data import datasets as data_module
from prune_dn.data.datasets import Datasets, DataSpec, ImageSet, load_datasets, make_loader
from prune_dn.errors import DataError


def digits(**how: Any) -> Datasets:
    return load_datasets("digits", **{"image_size": 8, **how})


def raw(images: ImageSet) -> Counter[bytes]:
    """The images before augmentation and normalisation, with their labels, as a multiset."""
    pixels = images.images.take(images.indices.tolist())
    pairs = zip(pixels, images.labels, strict=True)
    return Counter(p.numpy().tobytes() + bytes([int(y)]) for p, y in pairs)


def all_of(images: ImageSet, **how: Any) -> tuple[Tensor, Tensor]:
    batches = list(make_loader(images, **{"batch_size": 50, **how}))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_are_all_there_once() -> None:
    found = digits()
    assert [len(s) for s in (found.train, found.val, found.test)] == [1294, 143, 360]
    true = load_digits()
    pixels = np.rint(true.images * 255 / 16).astype(np.uint8)
    want = Counter(p.tobytes() + bytes([y]) for p, y in zip(pixels, true.target, strict=True))
    assert raw(found.train) + raw(found.val) + raw(found.test) == want


def test_digits_splits_are_disjoint_and_stratified() -> None:
    found = digits()
    train, val = set(found.train.indices.tolist()), set(found.val.indices.tolist())
    assert not train & val and len(train | val) == 1437
    for part in (found.train, found.val, found.test):
        counts = torch.bincount(part.labels, minlength=10).float()
        assert (counts / len(part) - 0.1).abs().max() < 0.02
    assert torch.bincount(found.test.labels).tolist() == [36] * 10


def test_seed_draws_the_validation_split_and_leaves_the_test_images() -> None:
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(first.val.indices, again.val.indices)
    assert not torch.equal(first.val.indices, other.val.indices)
    assert torch.equal(all_of(first.test)[0], all_of(other.test)[0])
    limited = digits(seed=3, limit=50, val_fraction=0.3)
    assert raw(limited.test) == raw(first.test)
    rest = raw(first.train) + raw(first.val)
    assert not (raw(limited.train) + raw(limited.val)) - rest
    digits(seed=2**60), digits(seed=-1)


def test_limit_is_balanced() -> None:
    found = digits(limit=100)
    assert torch.bincount(found.train.labels).tolist() == [9] * 10
    assert torch.bincount(found.val.labels).tolist() == [1] * 10
    found = digits(limit=73, val_fraction=0.4)
    both = torch.cat([found.train.labels, found.val.labels])
    assert sorted(torch.bincount(both).tolist()) == [7] * 7 + [8] * 3


def test_every_class_stays_in_train() -> None:
    found = digits(limit=20, val_fraction=0.99)
    assert torch.bincount(found.train.labels).tolist() == [1] * 10
    assert torch.bincount(found.val.labels).tolist() == [1] * 10


def test_normalisation_is_pixels_over_255_less_mean_by_std() -> None:
    found = digits(image_size=16, augment=False, mean=(0.25,), std=(0.5,))
    images, labels = found.train[7]
    pixels = found.train.images.take([int(found.train.indices[7])])[0]
    want = (pixels.numpy() / 255 - 0.25) / 0.5
    np.testing.assert_allclose(images.numpy(), want, rtol=1e-6, atol=1e-6)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.shape == (1, 16, 16)
    usual = digits(image_size=32, augment=False)
    pixels = all_of(usual.train)[0]
    assert abs(float(pixels.mean())) < 0.02 and abs(float(pixels.std()) - 1) < 0.02


def test_one_of_mean_and_std_is_enough() -> None:
    assert digits(std=(0.5,)).spec.std == (0.5,) and digits(std=(0.5,)).spec.mean == (0.3058,)
    assert digits(mean=(0.0,)).spec.mean == (0.0,) and digits(mean=(0.0,)).spec.std == (0.3236,)


def test_spec_round_trip() -> None:
    spec = digits().spec
    assert spec.num_classes == 10 and spec.in_channels == 1 and spec.image_size == 8
    assert DataSpec.from_dict(spec.to_dict()) == spec
    assert all(not isinstance(v, tuple) for v in spec.to_dict().values())


def test_augmentation_does_not_depend_on_workers_or_batches() -> None:
    train = digits(limit=120).train
    train.set_epoch(3)
    whole = all_of(train, batch_size=len(train))[0]
    assert torch.equal(whole, all_of(train, batch_size=7)[0])
    assert torch.equal(whole, all_of(train, batch_size=16, num_workers=2)[0])
    assert torch.equal(whole, torch.stack([train[i][0] for i in range(len(train))]))
    mixed, labels = all_of(train, batch_size=9, shuffle=True, seed=5)
    order = torch.tensor(list(make_loader(train, 9, shuffle=True, seed=5).sampler))
    assert torch.equal(mixed, whole[order]) and torch.equal(labels, train.labels[order])


def test_augmentation_changes_with_epoch_and_seed_alone() -> None:
    train, other = digits(limit=60, seed=0).train, digits(limit=60, seed=0).train
    other.seed = 1
    seen = []
    for epoch in (0, 1):
        for images in (train, other):
            images.set_epoch(epoch)
            seen.append(all_of(images)[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    train.set_epoch(0)
    torch.manual_seed(99)
    assert torch.equal(all_of(train)[0], seen[0])
    for part in (digits(limit=60).val, digits().test):
        still = all_of(part)[0]
        part.set_epoch(5)
        assert torch.equal(all_of(part)[0], still)


def test_digits_are_moved_and_never_mirrored() -> None:
    found = digits(limit=200)
    assert found.train.augment == "shift" and found.val.augment == found.test.augment == "none"
    plain = digits(limit=200, augment=False, mean=(0.0,), std=(1.0,)).train
    moved = digits(limit=200, mean=(0.0,), std=(1.0,)).train
    before, after = (
        np.pad(all_of(s)[0][:, 0].numpy(), ((0, 0), (1, 1), (1, 1))) for s in (plain, moved)
    )
    changed = 0
    for a, b in zip(before, after, strict=True):
        windows = [a[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(np.array_equal(w, b[1:9, 1:9]) for w in windows)
        changed += not np.array_equal(a, b)
    assert changed > 100
    assert digits(augment="crop_flip").train.augment == "crop_flip"
    assert digits(augment=True).train.augment == "shift"


def test_loader_order_and_last_batch() -> None:
    train = digits(limit=60).train
    sizes = [len(y) for _, y in make_loader(train, 20)]
    assert sizes == [20, 20, 10]
    assert [len(y) for _, y in make_loader(train, 20, drop_last=True)] == [20, 20]
    loader = make_loader(train, 20, shuffle=True, seed=1)
    first = list(loader.sampler)
    assert sorted(first) == list(range(len(train))) and list(loader.sampler) == first
    assert list(make_loader(train, 20, shuffle=True, seed=2).sampler) != first
    train.set_epoch(1)
    assert list(loader.sampler) != first
    assert list(make_loader(train, 20).sampler) == list(range(len(train)))


# Image folders.


def noise(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_folder(
    root: Path,
    *,
    test: str = "test",
    shapes: tuple[tuple[int, ...], ...] = ((8, 8, 3),),
    ending: str = "png",
    each: int = 6,
) -> dict[str, np.ndarray]:
    """Random images; returns their pixels by relative path."""
    made = {}
    for split, count in (("train", each), (test, 2)):
        for name in ("cat", "dog", "emu"):
            for i in range(count):
                pixels = noise(*shapes[len(made) % len(shapes)], seed=len(made))
                path = root / split / name / f"{i}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                made[f"{split}/{name}/{i}.{ending}"] = pixels
    return made


def test_image_folder_round_trip(tmp_path: Path) -> None:
    made = make_folder(tmp_path)
    found = load_datasets("image_folder", root=tmp_path, augment=False, val_fraction=0.3)
    assert found.spec.classes == ("cat", "dog", "emu")
    assert (found.spec.image_size, found.spec.in_channels) == (8, 3)
    assert [len(s) for s in (found.train, found.val, found.test)] == [12, 6, 6]
    label = {"cat": 0, "dog": 1, "emu": 2}
    for split, parts in (("train", (found.train, found.val)), ("test", (found.test,))):
        want = Counter(
            pixels.transpose(2, 0, 1).tobytes() + bytes([label[path.split("/")[1]]])
            for path, pixels in made.items()
            if path.startswith(split)
        )
        assert sum((raw(part) for part in parts), Counter()) == want
    mean, std = torch.tensor(found.spec.mean), torch.tensor(found.spec.std)
    images = all_of(found.test)[0] * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    want = made["test/cat/0.png"].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(images[0].numpy(), want, atol=1e-6)


def test_image_folder_statistics_are_those_of_its_training_images(tmp_path: Path) -> None:
    make_folder(tmp_path, each=30)
    found = load_datasets("image_folder", root=tmp_path)
    pixels = found.train.images.take(found.train.indices.tolist()).double().numpy() / 255
    np.testing.assert_allclose(found.spec.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(found.spec.std, pixels.std(axis=(0, 2, 3)), atol=1e-4)
    given = load_datasets("image_folder", root=tmp_path, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)).spec
    assert given.mean == (0.1, 0.2, 0.3) and given.std == (1, 2, 3)
    one = load_datasets("image_folder", root=tmp_path, mean=(0.1, 0.2, 0.3)).spec
    assert one.mean == (0.1, 0.2, 0.3) and one.std == found.spec.std


@pytest.mark.filterwarnings("ignore::prune_dn.errors.DataWarning")  # tests/test_folders.py has them
@pytest.mark.parametrize(
    ("shapes", "ending", "size", "channels", "augment"),
    [
        (((8, 8),), "png", 8, 1, "crop_flip"),
        (((8, 8), (8, 8, 3)), "jpg", 8, 3, "crop_flip"),
        (((9, 14, 3), (20, 11, 3)), "jpg", 224, 3, "random_resized_crop"),
    ],
)
def test_image_folder_finds_size_and_channels(
    tmp_path: Path, shapes: Any, ending: str, size: int, channels: int, augment: str
) -> None:
    make_folder(tmp_path, shapes=shapes, ending=ending, test="val")
    found = load_datasets("image_folder", root=tmp_path)
    assert (found.spec.image_size, found.spec.in_channels) == (size, channels)
    assert found.train.augment == augment
    images, labels = next(iter(make_loader(found.test, 6)))
    assert images.shape == (6, channels, size, size) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.isfinite(images).all()
    assert all_of(load_datasets("image_folder", root=tmp_path, image_size=10).val)[0].shape[2] == 10


@pytest.mark.filterwarnings("ignore::prune_dn.errors.DataWarning")
def test_image_folder_over_the_memory_budget_is_the_same(tmp_path: Path) -> None:
    make_folder(tmp_path, shapes=((9, 14, 3), (12, 12)))
    how: dict[str, Any] = {"root": tmp_path, "image_size": 8}
    memory = load_datasets("image_folder", **how)
    files = load_datasets("image_folder", memory_budget_mb=0, **how)
    kinds = [type(d.train.images).__name__ for d in (memory, files)]
    assert kinds == ["MemoryImages", "FileImages"]
    assert memory.spec == files.spec
    for name in ("train", "val", "test"):
        first, second = (all_of(getattr(d, name), batch_size=4) for d in (memory, files))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert len(pickle.dumps(files.train)) < 20_000


def refused(match: str, name: str = "image_folder", **how: Any) -> None:
    with pytest.raises(DataError, match=match):
        load_datasets(name, **how)


def test_image_folder_with_mistakes(tmp_path: Path) -> None:
    refused(r"there is no folder .*/nowhere; .*train/CLASS/.*data\.root", root=tmp_path / "nowhere")
    refused(r"there is no folder .*/train;", root=tmp_path)
    make_folder(tmp_path, test="exam")
    refused("has neither test/ nor val/ beside train/; add one", root=tmp_path)
    (tmp_path / "exam").rename(tmp_path / "test")
    refused(r"mean is \[0\.5\]; give 3 numbers, one per channel$", root=tmp_path, mean=(0.5,))
    refused("std is .*between 1e-06 and 1000", root=tmp_path, std=(1, 1, 0))
    (tmp_path / "test" / "gnu").mkdir()
    refused(r"test has classes that the training images lack: gnu", root=tmp_path)
    (tmp_path / "test" / "gnu").rmdir()
    (tmp_path / "train" / "fox").mkdir()
    refused(r"train/fox has no images", root=tmp_path)
    (tmp_path / "train" / "fox").rmdir()
    broken = tmp_path / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])  # a sound head
    refused(r"cannot decode the image .*train/dog/3\.png", root=tmp_path, image_size=8)
    lazy = load_datasets(
        "image_folder", root=tmp_path, image_size=8, memory_budget_mb=0, mean=(0,) * 3, std=(1,) * 3
    )
    with pytest.raises(DataError, match=r"cannot decode the image .*train/dog/3\.png"):
        all_of(lazy.train), all_of(lazy.val)


def test_what_is_unknown_or_impossible() -> None:
    names = "cifar10, cifar100, digits, fashion_mnist, image_folder"
    refused(f"data set 'mnist' is unknown; choose from {names}", "mnist")
    refused(r"augment 'flop' is unknown; choose from crop_flip, none", "digits", augment="flop")
    for fraction in (0, 1, -0.5, float("nan")):
        refused(r"val_fraction is .*; it must lie in \(0, 1\)", "digits", val_fraction=fraction)
    for limit in (0, -5):
        refused(rf"limit is {limit}; give the number", "digits", limit=limit)
    refused(r"8 training images cannot be split .* larger limit", "digits", limit=8)
    refused(r"mean is \[\]; give 1 numbers", "digits", mean=())
    for mean in ((math.nan,), (-math.inf,), (123.675,)):
        refused(
            "mean is .*; for pixels in .*between 0 and 1 .*divide it by 255", "digits", mean=mean
        )
    for std in ((math.nan,), (math.inf,), (-1.0,), (1e-300,)):
        refused("std is .*between 1e-06 and 1000", "digits", std=std)
    for wrong in (("a",), "half", 0.5, (True,)):
        refused("mean is .*; give numbers, one per channel", "digits", mean=wrong)
    refused("image_size is 100000; give 1 to 16,384 pixels", "digits", image_size=100_000)


# The sets that torchvision keeps.


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_missing_set_says_where_it_looked(tmp_path: Path, name: str) -> None:
    class_name = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
    refused(
        rf"no {class_name[name]} under {tmp_path} .*/train/CLASS/.*`download: true`",
        name,
        root=tmp_path,
    )


def test_cifar10_kept_as_a_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "cifar10", shapes=((32, 32, 3),))
    spec = load_datasets("cifar10", root=tmp_path).spec
    assert (spec.name, spec.image_size, spec.mean) == ("cifar10", 32, (0.4914, 0.4822, 0.4465))


def test_fashion_mnist_kept_as_a_folder_is_grey(tmp_path: Path) -> None:
    make_folder(tmp_path / "fashionmnist", shapes=((28, 28),))
    spec = load_datasets("fashion_mnist", root=tmp_path).spec
    assert (spec.in_channels, spec.mean, spec.std) == (1, (0.286,), (0.353,))


def idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST: magic, sizes big-endian, bytes."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


def test_fashion_mnist_as_torchvision_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    pixels = noise(40, 28, 28, seed=1)
    for part in ("train", "t10k"):
        idx(folder / f"{part}-images-idx3-ubyte", pixels)
        idx(folder / f"{part}-labels-idx1-ubyte", np.arange(40, dtype=np.uint8) % 10)
    found = load_datasets("fashion_mnist", root=tmp_path, image_size=28)
    assert found.spec.classes[9] == "Ankle boot" and found.train.augment == "crop_flip"
    assert torch.equal(found.test.images.take([3])[0, 0], torch.from_numpy(pixels[3]))
    assert load_datasets("fashion_mnist", root=tmp_path).spec.image_size == 32
    whole = (folder / "train-images-idx3-ubyte").read_bytes()
    (folder / "train-images-idx3-ubyte").write_bytes(whole[:-500])
    refused(r"no FashionMNIST under .*put it there", "fashion_mnist", root=tmp_path)


def test_statistics_come_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 photographs at once would need gigabytes."""
    taken = []
    images = digits().train.images

    class Watched:
        labels = images.labels

        def take(self, indices: list[int]) -> Tensor:
            taken.append(len(indices))
            return images.take(indices)

    mean, std = data_module._statistics(Watched(), torch.arange(1000))
    assert sum(taken) == 1000 and max(taken) <= 64
    pixels = images.take(range(1000)).double() / 255
    assert mean[0] == pytest.approx(float(pixels.mean()), abs=1e-4)
    assert std[0] == pytest.approx(float(pixels.std()), abs=1e-4)


def test_calibration_images_are_plain_training_images() -> None:
    from prune_dn.data.datasets import calibration_loader

    train = load_datasets("digits", limit=100, image_size=16).train
    seen = torch.cat([images for images, _ in calibration_loader(train, 30, seed=1)])
    plain = train.images.take(train.indices.tolist()).float() / 255
    plain = (plain - train.spec.mean[0]) / train.spec.std[0]
    assert len(seen) == 90  # whole batches only
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(seen.flatten(1), plain.flatten(1), compute_mode=exact).min(dim=1).values
    assert float(distance.max()) < 1e-3


def test_calibration_images_can_be_those_of_the_first_epoch_at_any_time() -> None:
    from prune_dn.data.datasets import calibration_loader, make_loader

    train = load_datasets("digits", limit=100, image_size=16).train

    def drawn() -> torch.Tensor:
        return torch.cat(
            [x for x, _ in calibration_loader(train, 30, augment=train.augment, seed=1)]
        )

    expected = [images for images, _ in make_loader(train, 30, shuffle=True, seed=1)]
    first = drawn()
    assert torch.equal(first, torch.cat(expected)[:90])  # whole batches only
    train.set_epoch(5)
    assert torch.equal(drawn(), first)
    assert not torch.equal(next(iter(make_loader(train, 30, shuffle=True, seed=1)))[0], first[:30])


@pytest.mark.parametrize("root", ["a\0b", "x" * 256, "ä" * 128])
def test_roots_that_no_disk_has(root: str) -> None:
    for name in ("image_folder", "cifar10", "digits"):
        with pytest.raises(
            DataError, match=r"root '.* has a (NUL|name of more than 255 bytes) in it"
        ):
            load_datasets(name, root=root)
