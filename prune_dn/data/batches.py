"""Batches of inputs that users give: checked in one way, and how a net is run on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.errors import PruneDNError, PruningError
from prune_dn.graph.inference import call
from prune_dn.models.answers import computed_weights
from prune_dn.models.examples import batch_size, batched, in_channels
from prune_dn.models.families import shares_memory
from prune_dn.models.losses import LossFunction, check_loss, describe


@dataclass(frozen=True)
class Batches:
    """Calibration batches, on the CPU or wherever they came from: inputs, and labels or None.

    Inputs are what the forward takes: images, a tuple of its arguments, or a dict of them by name. `loss` is
    what the user said that the outputs mean (see `find_loss`).
    """

    inputs: tuple[Any, ...]
    labels: tuple[Any, ...] | None
    loss: str | LossFunction | None = None

    def __len__(self) -> int:
        return sum(map(batch_size, self.inputs))


def each_batch(
    batches: Iterable[object],
    what: str = "calibration",
    error: type[PruneDNError] = PruningError,
) -> Iterator[tuple[Any, object]]:
    """The inputs of each batch, checked, and its second part, which is None where there is none.

    A tensor or a dict is inputs alone; of a tuple or list the first part is. Inputs are images
    (N, C, H, W) or volumes (N, C, D, H, W), a tuple or list of the forward's arguments, or a dict of them
    by name. Raises `error` for batches of another shape, and values that are not finite.
    """
    if isinstance(batches, Tensor):
        raise error(
            f"{what} is one tensor; give an iterable of batches, such as [images] or a loader"
        )
    for i, batch in enumerate(batches):
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        found = parts[0] if parts else batch
        if isinstance(found, tuple | list):
            found = tuple(found)
        several = isinstance(found, tuple | dict) and bool(found)
        _check_inputs(found, several, f"{what} batch {i}", error)
        yield found, parts[1] if len(parts) > 1 else None


def _check_inputs(found: Any, several: bool, what: str, error: type[PruneDNError]) -> None:
    """Raise `error` for what no forward takes."""
    tensors = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
    is_image = isinstance(found, Tensor) and found.ndim in (4, 5) and found.is_floating_point()
    if not (is_image or (several and tensors)):
        raise error(
            f"{what} is {describe(found)}; each batch must be images (N, C, H, W) or volumes "
            "(N, C, D, H, W) in floating point, a dict of the forward's arguments by name, or (inputs, labels), "
            "where inputs are images, such a dict, or a tuple of the forward's arguments"
        )
    if tensors[0].ndim == 0 or not len(tensors[0]):
        raise error(f"{what} holds no images")
    rows = {len(x) for x in tensors if x.ndim}
    if several and len(rows) > 1:
        raise error(
            f"{what} has inputs of {' and '.join(map(str, sorted(rows)))} rows: each tensor must have a row "
            "for each example; what is the same for all belongs into the model"
        )
    if not all(x.isfinite().all() for x in tensors):
        raise error(f"{what} holds NaN or infinity")


def read_batches(
    calibration: Iterable[object],
    *,
    needs_labels: bool = False,
    loss: str | LossFunction | None = None,
) -> Batches:
    """The batches of `calibration`, as `each_batch` reads them: inputs, or (inputs, labels, ...).

    Labels are a tensor, or nested containers of tensors, with a first dimension of N; anything else is
    no label.

    Raises PruningError for no batches, batches of another shape, values that are not finite, and
    labels that are missing where `needs_labels`; DataError for a loss that is unknown.
    """
    check_loss(loss)
    inputs, labels = [], []
    for i, (found, second) in enumerate(each_batch(calibration)):
        inputs.append(found)
        rows, leaves = batch_size(found), tree_leaves(second)
        if leaves and all(batched(x, rows) for x in leaves):
            labels.append(second)
        elif needs_labels:
            has = "none" if second is None else f"{describe(second)} for {rows} images"
            raise PruningError(
                "this criterion needs labels: give calibration batches of (images, labels); "
                f"batch {i} has {has}"
            )
    if not inputs:
        raise PruningError("calibration has no images; a generator can be read only once")
    return Batches(tuple(inputs), tuple(labels) if len(labels) == len(inputs) else None, loss)


def rows_of(inputs: Any, index: slice | Tensor) -> Any:
    """Some rows of each tensor that has one for each example."""
    rows = batch_size(inputs)
    return tree_map(lambda x: x[index] if batched(x, rows) else x, inputs)


def joined(parts: Sequence[Any]) -> Any:
    """The rows of several batches, or of what a net answered to them, as one."""
    return tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *parts)


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


def run_on(net: nn.Module, inputs: Any, what: str = "calibration") -> Any:
    """Run the net on a batch. Raises PruningError when it cannot take it."""
    is_image = isinstance(inputs, Tensor)
    try:
        return call(net, inputs)
    except TypeError as error:
        if isinstance(inputs, dict):
            how = "a dict is read as the forward's arguments by name; write labels beside it, (inputs, labels)"
        else:
            how = (
                "a tuple or list is read as (inputs, labels); write several inputs as ((first, second), labels), "
                "or as a dict of the forward's arguments by name, ({'first': ..., 'second': ...}, labels)"
            )
        raise PruningError(
            f"the model cannot be called with the inputs of a {what} batch: {error}; {how}"
        ) from error
    except (RuntimeError, ValueError) as error:
        if is_image and inputs.shape[1] != (channels := in_channels(net)):
            raise PruningError(
                f"{what} images have {inputs.shape[1]} channels; the model takes {channels}"
            ) from error
        shapes = [str(tuple(x.shape)) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        raise PruningError(
            f"the model cannot run on {what} {'images' if is_image else 'inputs'} of shape "
            f"{', '.join(shapes)}: {error}"
        ) from error
