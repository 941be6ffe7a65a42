"""Accuracy and loss on a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn
from torch.utils.data import DataLoader

from prune_dn.data import ImageSet, loading, make_loader
from prune_dn.errors import DataError
from prune_dn.models.answers import eval_mode
from prune_dn.processes import process_state


@dataclass(frozen=True)
class EvalResult:
    """`accuracy` in [0, 1], mean cross-entropy, and over how many images."""

    accuracy: float
    loss: float
    n: int


@loading()
@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet | DataLoader,
    *,
    batch_size: int = 64,
    precision: str = "no",
) -> EvalResult:
    """Top-1 accuracy and cross-entropy of `model` in eval mode; training flags are restored.

    `precision="bf16"` runs under autocast. With several processes each takes every n-th batch, and
    all get the same result. Raises DataError when model and data disagree on the classes.
    """
    loader = make_loader(data, batch_size) if isinstance(data, ImageSet) else data
    state = process_state()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    with eval_mode(model):
        for number, (images, labels) in enumerate(loader):
            if number % state.num_processes != state.process_index:
                continue
            images, labels = images.to(device), labels.to(device)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            check_classes(logits.shape[1], labels, data)
            loss = F.cross_entropy(logits.double(), labels, reduction="sum")
            right = (logits.argmax(dim=1) == labels).sum()
            sums += torch.tensor([float(loss), float(right), len(labels)], dtype=torch.float64)
    if state.num_processes > 1:
        sums = reduce(sums.to(state.device), "sum").cpu()
    if not sums[2]:
        raise DataError("there are no images to evaluate on")
    return EvalResult(float(sums[1] / sums[2]), float(sums[0] / sums[2]), int(sums[2]))


def check_classes(answers: int, labels: torch.Tensor, data: object) -> None:
    """Raise DataError when the net's classes are not those of the data."""
    needed = data.spec.num_classes if isinstance(data, ImageSet) else int(labels.max()) + 1
    if answers < needed or (isinstance(data, ImageSet) and answers != needed):
        raise DataError(
            f"the model answers {answers} classes, the data has {needed}; use the data that it was "
            "trained on, or a model for these classes"
        )
