"""Losses: what a net's outputs mean, for criteria, for the check of a refit, and for evaluation.

`softmax` is one class of several, `sigmoid` yes or no for each output (one output, multi-label),
`mse` numbers (regression, features); a callable is any other training loss. Outputs are raw logits or
numbers, (N, K) or (N, K, ...) with a prediction per pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_dn.errors import DataError

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss on outputs (N, K, ...), in three uses; each sums over images and positions.

    `error(outputs, labels)` is the training loss, a scalar. `draw(outputs, generator)` gives labels
    from the net's own prediction, for its Fisher information; None where the loss defines none.
    `distance(found, target)` compares two nets' outputs: 0 where they are equal, above 0 elsewhere,
    in float64. `check(labels, outputs)` says what is wrong with labels, or None.
    """

    name: str
    error: LossFunction
    draw: Callable[[Tensor, torch.Generator], Tensor] | None
    distance: LossFunction
    check: Callable[[Tensor, Tensor], str | None]


def _softmax_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels.long(), reduction="sum")


def _softmax_draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    rows = outputs.detach().double().softmax(1).movedim(1, -1).cpu()
    drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
    return drawn.reshape(rows.shape[:-1]).to(outputs.device)


def _softmax_distance(found: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the two predictions, in nats."""
    found, target = (x.double().log_softmax(1) for x in (found, target))
    return F.kl_div(found, target, reduction="sum", log_target=True)


def _softmax_check(labels: Tensor, outputs: Tensor) -> str | None:
    classes = outputs.shape[1]
    if classes < 2:
        return "the softmax of one output is always 1"
    if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        return f"labels have shape {tuple(labels.shape)}, one class for each prediction is needed"
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
        return f"labels must be integers from 0 to {classes - 1}"
    return None


def _sigmoid_error(outputs: Tensor, labels: Tensor) -> Tensor:
    labels = labels.reshape(outputs.shape).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")


def _sigmoid_draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    chance = outputs.detach().double().sigmoid().cpu()
    return torch.bernoulli(chance, generator=generator).to(outputs.device)


def _sigmoid_distance(found: Tensor, target: Tensor) -> Tensor:
    """Sum over outputs of the Kullback-Leibler divergence of yes and no, in nats."""
    found, target = found.double(), target.double()
    yes = target.sigmoid() * (F.logsigmoid(target) - F.logsigmoid(found))
    no = (-target).sigmoid() * (F.logsigmoid(-target) - F.logsigmoid(-found))
    return (yes + no).sum()


def _sigmoid_check(labels: Tensor, outputs: Tensor) -> str | None:
    problem = _same_shape(labels, outputs)
    if problem is None and not bool(((labels >= 0) & (labels <= 1)).all()):
        return "labels must lie between 0 and 1"
    return problem


def _mse_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels.reshape(outputs.shape)).square().sum() / 2


def _mse_draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return outputs.detach() + noise.to(outputs)


def _mse_distance(found: Tensor, target: Tensor) -> Tensor:
    """Half the sum of squared differences."""
    return (found.double() - target.double()).square().sum() / 2


def _mse_check(labels: Tensor, outputs: Tensor) -> str | None:
    problem = _same_shape(labels, outputs)
    return "labels are not finite" if problem is None and not labels.isfinite().all() else problem


def _same_shape(labels: Tensor, outputs: Tensor) -> str | None:
    """One number for each output; (N,) for (N, 1) is taken, a broadcast is not."""
    if labels.shape == outputs.shape or (
        outputs.shape[1] == 1 and labels.shape == outputs.shape[:1] + outputs.shape[2:]
    ):
        return None
    return f"labels have shape {tuple(labels.shape)}, the outputs {tuple(outputs.shape)}"


LOSSES: dict[str, Loss] = {
    "softmax": Loss("softmax", _softmax_error, _softmax_draw, _softmax_distance, _softmax_check),
    "sigmoid": Loss("sigmoid", _sigmoid_error, _sigmoid_draw, _sigmoid_distance, _sigmoid_check),
    "mse": Loss("mse", _mse_error, _mse_draw, _mse_distance, _mse_check),
}


def find_loss(loss: str | LossFunction | None, outputs: Tensor, labels: Tensor | None) -> Loss:
    """The loss that is named, or the only one that fits `outputs` and `labels` where it is None.

    Class numbers for several outputs mean `softmax`; numbers 0 and 1 for each output, of which not
    exactly one is 1, `sigmoid`; numbers outside [0, 1] `mse`. Everything else, and images without
    labels, could be several: that is refused. A callable is (outputs, labels) -> the mean over the
    batch, such as `torch.nn.BCEWithLogitsLoss()`.

    Raises DataError for a name that is unknown, a loss that cannot be guessed, and labels that do
    not fit.

    >>> find_loss(None, torch.zeros(4, 3), torch.tensor([0, 2, 1, 1])).name
    'softmax'
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise DataError(f"loss {loss!r} is unknown; choose {', '.join(LOSSES)}, or a callable")
        found = LOSSES[loss]
    elif loss is not None:
        found = _of_callable(loss)
    else:
        found = _guess(outputs, labels)
    if loss == "softmax" and outputs.shape[1] < 2:
        raise DataError("loss 'softmax' of one output is always 0: choose sigmoid or mse")
    if labels is not None and (problem := found.check(labels, outputs)) is not None:
        raise DataError(f"loss {found.name!r}: {problem}")
    return found


def _guess(outputs: Tensor, labels: Tensor | None) -> Loss:
    if labels is not None:
        if not labels.is_floating_point() and LOSSES["softmax"].check(labels, outputs) is None:
            return LOSSES["softmax"]
        if _same_shape(labels, outputs) is None:
            values = labels.reshape(outputs.shape).double()
            binary = bool(((values == 0) | (values == 1)).all())
            if binary and outputs.shape[1] > 1 and bool((values.sum(1) != 1).any()):
                return LOSSES["sigmoid"]
            if values.isfinite().all() and bool(((values < 0) | (values > 1)).any()):
                return LOSSES["mse"]
    given = "no labels" if labels is None else f"labels {tuple(labels.shape)} of {labels.dtype}"
    raise DataError(
        f"what the net's {outputs.shape[1]} outputs mean cannot be told from {given}: give "
        "loss='softmax' (one class of several), 'sigmoid' (yes or no for each output), 'mse' "
        "(numbers), or a callable (outputs, labels) -> mean loss"
    )


def _of_callable(function: LossFunction) -> Loss:
    def error(outputs: Tensor, labels: Tensor) -> Tensor:
        return function(outputs, labels) * len(outputs)

    name = getattr(function, "__name__", type(function).__name__)
    return Loss(name, error, None, _mse_distance, lambda labels, outputs: None)
