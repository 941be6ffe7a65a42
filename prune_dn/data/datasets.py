"""Data sets by name, split for honest choices, and loaders that keep a small CPU busy."""

from __future__ import annotations

import itertools
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from prune_dn.base import limits
from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import wrong_name
from prune_dn.data.augment import AUGMENTATIONS
from prune_dn.data.images import RESIZES, Images
from prune_dn.data.sources import DATASETS, Numbers, Request, by_turns
from prune_dn.errors import DataError, DataWarning

CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class DataSpec:
    """What a net must know about its data. `mean` and `std` are those of pixels in [0, 1]; `resize`
    is how images that are not square become so (None where all are)."""

    name: str
    classes: tuple[str, ...]
    image_size: int
    in_channels: int
    mean: Numbers
    std: Numbers
    resize: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> DataSpec:
        """What `to_dict` gave."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return DataSpec(**fields)


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images that come as normalised float32, whole batches at a time.

    What augmentation does to an image depends on the seed, the epoch (`set_epoch`) and the image
    alone: not on batches, workers, or what ran before.
    """

    def __init__(
        self,
        images: Images,
        indices: Tensor,
        spec: DataSpec,
        *,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        self.images = images
        self.indices = indices
        self.spec = spec
        self.augment = augment
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of an epoch."""
        self.epoch = epoch
        if self.augment != "none":
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 1))
            self._chance = torch.rand(len(self), 4, generator=generator)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def balanced(self, limit: int, seed: int = 0) -> ImageSet:
        """At most `limit` of the images, evenly from the classes, without augmentation."""
        order = by_turns(self.labels, torch.Generator().manual_seed(seed))
        return ImageSet(self.images, self.indices[order[:limit].sort().values], self.spec)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: images (n, C, H, W) float32 normalised, labels (n,) int64."""
        picked = self.indices[torch.as_tensor(indices)]
        pixels = self.images.take(picked.tolist())
        if self.augment != "none":
            pixels = AUGMENTATIONS[self.augment](pixels, self._chance[torch.as_tensor(indices)])
        mean = torch.tensor(self.spec.mean).view(-1, 1, 1)
        std = torch.tensor(self.spec.std).view(-1, 1, 1)
        images = pixels.float().div_(255).sub_(mean).div_(std).contiguous()
        return images, self.images.labels[picked]


@dataclass(frozen=True)
class Datasets:
    """Training images, validation images (for every choice), test images.

    `contents` describe what the splits hold, file by file: equal contents are equal data. `notices`
    are what `load_datasets` warned of.
    """

    spec: DataSpec
    train: ImageSet
    val: ImageSet
    test: ImageSet
    contents: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@usual_defaults()
def load_datasets(
    name: str,
    *,
    root: str | Path = "data",
    image_size: int | None = None,
    resize: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    augment: str | bool | None = None,
    download: bool = False,
    limit: int | None = None,
    memory_budget_mb: int = 4096,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Datasets:
    """A data set by name: `digits`, `fashion_mnist`, `cifar10`, `cifar100` or `image_folder`.

    `val_fraction` of each class's training images are held out; `limit` takes that many training
    images in all, evenly from the classes. `augment` is a name from AUGMENTATIONS, False for none,
    or None for what is usual for the set.

    `image_folder` reads `root`/train/CLASS/, `root`/test/CLASS/, and `root`/val/CLASS/, which takes
    the place of images held out (without test/ it is what is tested on). Images that are not square
    are cropped at the centre; `resize="squash"` and `"pad"` (black) keep all of them. If any image is
    in colour all have 3 channels. Decoded images stay in memory if they fit `memory_budget_mb`. Mean
    and std come from the training images unless given. `images.decode` says what becomes of 16-bit
    and transparent pixels.

    Raises DataError for what is missing, unreadable or impossible; warns (DataWarning) of what the
    owner of the images may not expect.

    >>> data = load_datasets("digits")
    >>> len(data.train), len(data.val), len(data.test)
    (1294, 143, 360)
    """
    check_normalisation(mean, std)
    if name not in DATASETS:
        raise DataError(f"data set {name!r} is unknown; choose from {', '.join(sorted(DATASETS))}")
    if problem := wrong_name(root):
        raise DataError(f"root {str(root)!r:.80} {problem}")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; it must lie in (0, 1)")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give the number of training images, or None for all")
    if image_size is not None and not 1 <= image_size <= limits.IMAGE_SIZE:
        raise DataError(f"image_size is {image_size}; give 1 to {limits.IMAGE_SIZE:,} pixels")
    if resize is not None and resize not in RESIZES:
        raise DataError(f"resize {resize!r} is unknown; choose from {', '.join(sorted(RESIZES))}")
    source = DATASETS[name](Request(Path(root), image_size, resize, download, memory_budget_mb))
    for notice in source.notices:
        warnings.warn(notice, DataWarning, stacklevel=2)
    chosen = source.augment if augment is None or augment is True else augment or "none"
    if chosen not in AUGMENTATIONS:
        raise DataError(
            f"augment {chosen!r} is unknown; choose from {', '.join(sorted(AUGMENTATIONS))}"
        )
    generator = torch.Generator().manual_seed(_mix(seed, 0, 0))
    mixed = by_turns(source.train.labels, generator)
    if limit is not None:
        mixed = mixed[:limit]
    if source.val is None:
        train, val = _split(source.train.labels, mixed, val_fraction)
    else:
        train, val = mixed.sort().values, torch.arange(len(source.val.labels))
    if mean is None or std is None:
        usual = source.normalisation or _statistics(source.train, train)
        mean = usual[0] if mean is None else mean
        std = usual[1] if std is None else std
    check_normalisation(mean, std, source.in_channels)
    spec = DataSpec(
        name,
        source.classes,
        source.image_size,
        source.in_channels,
        tuple(mean),
        tuple(std),
        source.resize,
    )
    everything = torch.arange(len(source.test.labels))
    return Datasets(
        spec,
        ImageSet(source.train, train, spec, augment=chosen, seed=seed),
        ImageSet(source.train if source.val is None else source.val, val, spec),
        ImageSet(source.test, everything, spec),
        source.contents,
        source.notices,
    )


def check_normalisation(
    mean: Numbers | None, std: Numbers | None, channels: int | None = None
) -> None:
    """Raise DataError for what cannot be the mean or std of pixels in [0, 1] (None = not given)."""
    for label, numbers, (low, high) in (("mean", mean, (0.0, 1.0)), ("std", std, limits.STD)):
        if numbers is None:
            continue
        right = isinstance(numbers, list | tuple) and all(_is_number(x) for x in numbers)
        shown = list(numbers) if right else numbers
        if not right or (channels is not None and len(numbers) != channels):
            wanted = "numbers" if channels is None else f"{channels} numbers"
            raise DataError(f"{label} is {shown}; give {wanted}, one per channel")
        if not all(low <= number <= high for number in numbers):
            raise DataError(
                f"{label} is {shown}; for pixels in [0, 1] it lies between {low:g} and {high:g} "
                "(where it is one of pixels in [0, 255], divide it by 255)"
            )


def make_loader(
    dataset: ImageSet,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (images, labels). The order depends on `seed` and the dataset's epoch alone."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=_Order(dataset, shuffle, seed),
        num_workers=num_workers,
        drop_last=drop_last,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
    )


def calibration_loader(
    dataset: ImageSet, batch_size: int, *, augment: str = "none", seed: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of training images: as they will be met in use, or augmented.

    Running statistics are recalibrated on images that are augmented as in training.
    """
    images = ImageSet(
        dataset.images, dataset.indices, dataset.spec, augment=augment, seed=dataset.seed
    )
    return make_loader(
        images, batch_size, shuffle=True, seed=seed, drop_last=len(images) > batch_size
    )


@usual_defaults()
def calibration_batches(
    dataset: ImageSet, images: int | None = None, *, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """At most `images` training images, drawn by `seed`, in batches of 32, with labels.

    None = CALIBRATION_IMAGES.
    """
    images = CALIBRATION_IMAGES if images is None else images
    loader = calibration_loader(dataset, min(32, len(dataset)), seed=seed)
    batches = list(itertools.islice(loader, -(-images // 32)))
    over = sum(len(labels) for _, labels in batches) - images
    if over > 0:
        x, y = batches[-1]
        batches[-1] = (x[:-over], y[:-over])
    return batches


@contextmanager
def loading() -> Iterator[None]:
    """Say plainly, as a DataError, what worker processes met in a loop over a loader.

    torch hands on a worker's error with its traceback as the text, and says of a worker that was
    killed no more than that. Also a decorator.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught DataError"):
            raise
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if not _is_lost_worker(error):
            raise
        if not isinstance(error, RuntimeError):
            with suppress(RuntimeError):
                time.sleep(1)  # torch's own word of it comes by a signal: let it come here
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"a process that loads images ended ({said}): it was killed, "
            "often for lack of memory; set num_workers lower (0 loads in the main process), or "
            "give it more memory"
        ) from error


def _is_lost_worker(error: Exception) -> bool:
    """Whether torch says so, or was cut off while it received a batch."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    return any(x.name == "_try_get_data" for x in traceback.extract_tb(error.__traceback__))


class _Order(Sampler[int]):
    def __init__(self, dataset: ImageSet, shuffle: bool, seed: int) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        if not self.shuffle:
            return iter(range(count))
        generator = torch.Generator().manual_seed(_mix(self.seed, self.dataset.epoch, 2))
        return iter(torch.randperm(count, generator=generator).tolist())

    def __len__(self) -> int:
        return len(self.dataset)


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mix(seed: int, epoch: int, use: int) -> int:
    return ((seed * 1_000_003 + epoch) * 7 + use) % 2**63


def _split(labels: Tensor, order: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Hold out `fraction` of each class. (train, val) positions, sorted."""
    held = []
    for label in labels[order].unique():
        mine = order[labels[order] == label]
        held.append(mine[: min(max(round(fraction * len(mine)), 1), len(mine) - 1)])
    val = torch.cat(held).sort().values if held else order[:0]
    train = order[~torch.isin(order, val)].sort().values
    if not len(val) or not len(train):
        raise DataError(
            f"{len(order)} training images cannot be split into training and validation; "
            "each needs at least one image: give more images, or a larger limit"
        )
    return train, val


def _statistics(images: Images, indices: Tensor) -> tuple[Numbers, Numbers]:
    """Mean and std per channel over at most 2,000 images."""
    some = indices[:: max(len(indices) // 2000, 1)][:2000]
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for part in some.split(64):
        pixels = images.take(part.tolist()).double() / 255
        count += pixels[:, 0].numel()
        total = total + pixels.sum(dim=(0, 2, 3))
        squares = squares + (pixels**2).sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
