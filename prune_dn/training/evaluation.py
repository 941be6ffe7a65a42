"""Accuracy and loss on a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.processes import process_state
from prune_dn.data.batches import each_batch
from prune_dn.data.datasets import ImageSet, loading, make_loader
from prune_dn.errors import DataError
from prune_dn.graph.inference import call
from prune_dn.models.answers import eval_mode
from prune_dn.models.examples import batch_size as rows_in
from prune_dn.models.examples import batched, for_net
from prune_dn.models.losses import LossFunction, describe, find_loss
from prune_dn.training.precision import in_float32


@dataclass(frozen=True)
class EvalResult:
    """What a loss says of a net, on average over `n` images.

    `accuracy` in [0, 1] is the share of right predictions: of `softmax` the top class of each (and
    of each pixel, where outputs are maps), of `sigmoid` each single yes or no, at a probability of
    0.5; None where nothing is right or wrong (`mse`, a callable). `loss` is the mean over all
    predictions, as torch's own functions give it: cross-entropy, binary cross-entropy, mean squared
    error, or what the callable gives.
    """

    accuracy: float | None
    loss: float
    n: int


@usual_defaults()
@loading()
@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet | DataLoader,
    *,
    batch_size: int = 64,
    precision: str = "no",
    loss: str | LossFunction | None = None,
) -> EvalResult:
    """Accuracy and loss of `model` in eval mode; training flags are restored.

    A `DataLoader` gives (images, labels), or (inputs, labels) with several inputs (see `each_batch`). `loss`
    says what the outputs mean: `softmax`, the default where labels are class numbers, `sigmoid`, `mse`,
    or a callable (outputs, labels) -> mean over the batch. Images are cast to the dtype of the model; `precision="bf16"` runs it in float32 under
    autocast. With several processes each takes every n-th batch, and all get the same result.

    Raises DataError when model and data disagree on the classes, for batches or labels that do not
    fit, a loss that cannot be guessed, and outputs that are not finite.
    """
    loader = make_loader(data, batch_size) if isinstance(data, ImageSet) else data
    state = process_state()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right, images, images with a right or wrong
    low = precision == "bf16"
    with eval_mode(model), in_float32(model if low else None):
        like = next(model.parameters(), torch.empty(0))  # a deployed file has none
        for number, (inputs, labels) in enumerate(each_batch(loader, "data", DataError)):
            if number % state.num_processes != state.process_index:
                continue
            rows, leaves = rows_in(inputs), tree_leaves(labels)
            if not leaves or not all(batched(x, rows) for x in leaves):
                raise DataError(
                    f"data batch {number} has {rows} images, and as their labels "
                    f"{describe(labels)}; each batch must be (images, labels)"
                )
            labels = tree_map(lambda x: x.to(like.device), labels)
            inputs = tree_map(_channels_last, for_net(inputs, model))
            with torch.autocast(like.device.type, torch.bfloat16, enabled=low):
                outputs = call(model, inputs)
            if isinstance(data, ImageSet):
                check_classes(outputs, data)
            found = find_loss(loss, outputs, labels)
            outputs = outputs if callable(loss) else tree_map(_double, outputs)
            if math.isnan(mean := float(found.mean(outputs, labels))):
                raise DataError(
                    f"the loss on data batch {number} is NaN: the model's outputs are not finite; "
                    "look at its weights, and at how the images are normalised"
                )
            row = [mean, 0.0, 1.0, 0.0]
            if found.accuracy is not None:
                row[1], row[3] = float(found.accuracy(outputs, labels)), 1.0
            sums += rows * torch.tensor(row, dtype=torch.float64)
    if state.num_processes > 1:
        sums = reduce(sums.to(state.device), "sum").cpu()
    if not sums[2]:
        raise DataError("there are no images to evaluate on")
    share = float(sums[1] / sums[3]) if sums[3] else None
    return EvalResult(share, float(sums[0] / sums[2]), int(sums[2]))


@usual_defaults()
@loading()
@torch.no_grad()
def accuracy_per_image(
    model: nn.Module,
    data: ImageSet,
    *,
    batch_size: int = 64,
    loss: str | LossFunction | None = None,
) -> Tensor:
    """The accuracy of each image alone, (N,) in [0, 1] and in the order of `data`; arguments as of `evaluate`.

    Of one class an image it is 0 or 1, of maps the share of right pixels. Raises DataError as `evaluate` does,
    and for a loss where nothing is right or wrong.
    """
    found = []
    with eval_mode(model):
        like = next(model.parameters())
        for images, labels in each_batch(make_loader(data, batch_size), "data", DataError):
            outputs = model(images.to(like).contiguous(memory_format=torch.channels_last)).double()
            labels = torch.as_tensor(labels, device=like.device)
            check_classes(outputs, data)
            right = find_loss(loss, outputs, labels).accuracy
            if right is None:
                raise DataError(f"a loss of {loss!r} has no accuracy: nothing is right or wrong")
            found += [
                float(right(outputs[i : i + 1], labels[i : i + 1])) for i in range(len(images))
            ]
    return torch.tensor(found, dtype=torch.float64)


def _channels_last(x: Any) -> Any:
    is_image = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if is_image else x


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_classes(outputs: Tensor, data: ImageSet) -> None:
    """Raise DataError when the net's classes are not those of the data."""
    answers = outputs.shape[1] if outputs.ndim > 1 else 1
    if answers != (needed := data.spec.num_classes):
        raise DataError(
            f"the model answers {answers} classes, the data has {needed}; use the data that it was "
            "trained on, or a model for these classes"
        )
