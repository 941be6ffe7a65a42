"""Batches of images that users give: checked in one way, and how a net is run on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.errors import PruneDNError, PruningError
from prune_dn.models.answers import computed_weights
from prune_dn.models.examples import in_channels
from prune_dn.models.families import shares_memory
from prune_dn.models.losses import LossFunction, check_loss, describe


@dataclass(frozen=True)
class Batches:
    """Calibration batches, on the CPU or wherever they came from: images, and labels or None.

    `loss` is what the user said that the outputs mean (see `find_loss`).
    """

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None
    loss: str | LossFunction | None = None

    def __len__(self) -> int:
        return sum(len(images) for images in self.images)


def each_batch(
    batches: Iterable[object],
    what: str = "calibration",
    error: type[PruneDNError] = PruningError,
) -> Iterator[tuple[Tensor, object]]:
    """Images (N, C, H, W) or volumes (N, C, D, H, W) of each batch, checked, and its second part.

    None = there is none. Raises `error` for batches of another shape, and values that are not finite.
    """
    if isinstance(batches, Tensor):
        raise error(
            f"{what} is one tensor; give an iterable of batches, such as [images] or a loader"
        )
    for i, batch in enumerate(batches):
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        found = parts[0] if parts else batch
        if (
            not isinstance(found, Tensor)
            or found.ndim not in (4, 5)
            or not found.is_floating_point()
        ):
            raise error(
                f"{what} batch {i} is {describe(found)}; each batch must be images "
                "(N, C, H, W) or volumes (N, C, D, H, W) in floating point, or (images, labels)"
            )
        if not len(found):
            raise error(f"{what} batch {i} holds no images")
        if not torch.isfinite(found).all():
            raise error(f"{what} batch {i} holds NaN or infinity")
        yield found, parts[1] if len(parts) > 1 else None


def read_batches(
    calibration: Iterable[object],
    *,
    needs_labels: bool = False,
    loss: str | LossFunction | None = None,
) -> Batches:
    """The batches of `calibration`: image tensors (N, C, H, W), or (images, labels, ...) tuples.

    Labels are tensors with a first dimension of N; anything else is no label.

    Raises PruningError for no batches, batches of another shape, values that are not finite, and
    labels that are missing where `needs_labels`; DataError for a loss that is unknown.
    """
    check_loss(loss)
    images, labels = [], []
    for i, (found, second) in enumerate(each_batch(calibration)):
        images.append(found)
        if isinstance(second, Tensor) and second.shape[:1] == found.shape[:1]:
            labels.append(second)
        elif needs_labels:
            has = "none" if second is None else f"{describe(second)} for {len(found)} images"
            raise PruningError(
                "this criterion needs labels: give calibration batches of (images, labels); "
                f"batch {i} has {has}"
            )
    if not images:
        raise PruningError("calibration has no images; a generator can be read only once")
    return Batches(tuple(images), tuple(labels) if len(labels) == len(images) else None, loss)


def working_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients, that computes in float32 or better.

    In half precision a sum over the pixels of an image overflows, or loses most of its digits.
    Raises PruningError for weights that are computed, which torch cannot copy.
    """
    try:
        net = copy.deepcopy(model).eval().requires_grad_(False)
    except RuntimeError as error:
        why = next(computed_weights(model), error)
        raise PruningError(f"this {type(model).__name__} cannot be copied: {why}") from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()):
        net.float()
    if shares_memory(net):
        net.memory_efficient = False  # type: ignore[assignment]
    return net


def run_on(net: nn.Module, images: Tensor, what: str = "calibration") -> Any:
    """Run the net on images. Raises PruningError when it cannot take them."""
    if images.shape[1] != (channels := in_channels(net)):
        raise PruningError(
            f"{what} images have {images.shape[1]} channels; the model takes {channels}"
        )
    try:
        return net(images)
    except (RuntimeError, ValueError) as error:
        raise PruningError(
            f"the model cannot run on {what} images of shape {tuple(images.shape)}: {error}"
        ) from error
