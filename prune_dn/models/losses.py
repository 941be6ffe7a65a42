"""Losses: what a net's outputs mean, for criteria, for the check of a refit, and for evaluation.

`softmax` is one class of several, `sigmoid` yes or no for each output (one output, multi-label),
`mse` numbers (regression, features); a callable is any other training loss. Outputs are raw logits or
numbers: (N, K), (N,) for one output, or (N, K, ...) with a prediction per pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prune_dn.errors import DataError
from prune_dn.graph.inference import tensors

LossFunction = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss on outputs (N, K, ...), in its uses.

    `error(outputs, labels)` is the training loss, a scalar summed over images and positions.
    `draw(outputs, generator)` gives labels from the net's own prediction, for its Fisher
    information; None where the loss defines none. `distance(found, target)` compares two nets'
    outputs: 0 where they are equal, above 0 elsewhere, summed, in float64. `check(labels, outputs)`
    says what is wrong with labels, or None. What is reported: `mean(outputs, labels)` is torch's
    function of that loss, the mean over all predictions, and `accuracy` the share of predictions
    that are right; None where none is right or wrong.
    """

    name: str
    error: LossFunction
    draw: Callable[[Any, torch.Generator], Any] | None
    distance: LossFunction
    check: Callable[[Tensor, Any], str | None]
    mean: LossFunction
    accuracy: LossFunction | None


def _softmax_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels.long(), reduction="sum")


def _softmax_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels.long())


def _softmax_accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) == labels).double().mean()


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
    if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        return f"labels have shape {tuple(labels.shape)}, one class for each prediction is needed"
    wanted = f"labels must be integers from 0 to {classes - 1}"
    if labels.is_floating_point():
        return f"{wanted}, not {labels.dtype}"
    wrong = labels[(labels < 0) | (labels >= classes)]
    return f"{wanted}, not {int(wrong[0])}" if len(wrong) else None


def _sigmoid_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return _sigmoid_mean(outputs, labels) * outputs.numel()


def _sigmoid_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, _like(outputs, labels))


def _sigmoid_accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs > 0) == (_like(outputs, labels) > 0.5)).double().mean()


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
    return (outputs - _like(outputs, labels)).square().sum() / 2


def _mse_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, _like(outputs, labels))


def _mse_draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return outputs.detach() + noise.to(outputs)


def _mse_distance(found: Tensor, target: Tensor) -> Tensor:
    """Half the sum of squared differences."""
    return (found.double() - target.double()).square().sum() / 2


def _mse_check(labels: Tensor, outputs: Tensor) -> str | None:
    problem = _same_shape(labels, outputs)
    return "labels are not finite" if problem is None and not labels.isfinite().all() else problem


def _like(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels.reshape(outputs.shape).to(outputs)


def _same_shape(labels: Tensor, outputs: Tensor) -> str | None:
    """One number for each output; (N,) for (N, 1) is taken, a broadcast is not."""
    shapes = [x.squeeze(1).shape if x.ndim > 1 else x.shape for x in (labels, outputs)]
    if shapes[0] == shapes[1]:
        return None
    return f"labels have shape {tuple(labels.shape)}, the outputs {tuple(outputs.shape)}"


LOSSES: dict[str, Loss] = {
    "softmax": Loss(
        "softmax",
        _softmax_error,
        _softmax_draw,
        _softmax_distance,
        _softmax_check,
        _softmax_mean,
        _softmax_accuracy,
    ),
    "sigmoid": Loss(
        "sigmoid",
        _sigmoid_error,
        _sigmoid_draw,
        _sigmoid_distance,
        _sigmoid_check,
        _sigmoid_mean,
        _sigmoid_accuracy,
    ),
    "mse": Loss("mse", _mse_error, _mse_draw, _mse_distance, _mse_check, _mse_mean, None),
}
USUAL = "softmax"  # of class-labelled data


def find_loss(loss: str | LossFunction | None, outputs: Any, labels: Any) -> Loss:
    """The loss that is named, or `softmax` where `loss` is None and `labels` are class numbers.

    Integers below the number of outputs, one for each prediction, can mean nothing else. Other labels
    (0 and 1 may be yes and no, or numbers), and images without labels, could be several: that is
    refused. A callable is (outputs, labels) -> the mean over the batch, such as
    `torch.nn.BCEWithLogitsLoss()`. Outputs that are several tensors are for a callable, and for `mse`, which
    adds up over all of them.

    Raises DataError for a name that is unknown, a loss that cannot be guessed, and labels or outputs
    that do not fit.

    >>> find_loss(None, torch.zeros(4, 3), torch.tensor([0, 2, 1, 1])).name
    'softmax'
    """
    check_loss(loss)
    if callable(loss):
        return _of_callable(loss)
    if loss == "mse" and not isinstance(outputs, Tensor) and tensors(outputs):
        return _of_several(outputs, labels)
    if not isinstance(outputs, Tensor) or not outputs.ndim:
        raise DataError(
            f"the model gives {describe(outputs)}; loss={loss!r} needs outputs (N, K) or (N, K, ...). "
            "Give loss='mse', a callable (outputs, labels) -> mean loss, or a model with one tensor as its output"
        )
    width = outputs.shape[1] if outputs.ndim > 1 else 1
    if loss is None:
        classes = labels is not None and not labels.is_floating_point() and width > 1
        if labels is None or not classes or labels.shape != outputs.shape[:1] + outputs.shape[2:]:
            given = "no labels" if labels is None else f"labels that are {describe(labels)}"
            raise DataError(
                f"what the {width} output{'s'[: width > 1]} of the model mean cannot be told from "
                f"{given}: give loss='softmax' (one class of several), 'sigmoid' (yes or no for each "
                "output), 'mse' (numbers), or a callable (outputs, labels) -> mean loss"
            )
    found = LOSSES[loss or USUAL]
    if found.name == "softmax" and width < 2:
        raise DataError("loss 'softmax' of one output is always 0: choose sigmoid or mse")
    if labels is not None and (problem := found.check(labels, outputs)) is not None:
        raise DataError(f"loss {found.name!r}: {problem}")
    return found


def _of_several(outputs: Any, labels: Any) -> Loss:
    """`mse` of a model that gives several tensors, as lists of them: the sum over all."""
    one = LOSSES["mse"]
    if labels is not None:
        pairs = list(zip(tensors(outputs), tree_leaves(labels), strict=False))
        many = len(tensors(outputs)), len(tree_leaves(labels))
        problems = [f"the model gives {many[0]} tensors, the labels are {many[1]}"] * (
            many[0] != many[1]
        )
        problems += [p for x, y in pairs if (p := one.check(y, x)) is not None]
        if problems:
            raise DataError(f"loss 'mse': {problems[0]}")

    def error(outputs: Any, labels: Any) -> Tensor:
        pairs = zip(tensors(outputs), tree_leaves(labels), strict=True)
        return sum((one.error(x, y) for x, y in pairs), torch.zeros(()))

    def mean(outputs: Any, labels: Any) -> Tensor:
        return 2 * error(outputs, labels) / sum(x.numel() for x in tensors(outputs))

    def draw(outputs: Any, generator: torch.Generator) -> Any:
        assert one.draw is not None
        return [one.draw(x, generator) for x in tensors(outputs)]

    return dataclasses.replace(
        one, error=error, draw=draw, check=lambda labels, outputs: None, mean=mean
    )


def check_loss(loss: object) -> None:
    """Raise DataError for what is no name of a loss, no callable, and not None."""
    if isinstance(loss, type):
        raise DataError(f"loss is the class {loss.__name__}; give one of it, {loss.__name__}()")
    if loss is not None and not callable(loss) and loss not in LOSSES:
        raise DataError(f"loss {loss!r} is unknown; choose {', '.join(LOSSES)}, or a callable")


def describe(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def loss_name(loss: str | LossFunction | None) -> str | None:
    """A name for the record."""
    if loss is None or isinstance(loss, str):
        return loss
    return str(getattr(loss, "__name__", type(loss).__name__))


def _of_callable(function: LossFunction) -> Loss:
    name = str(loss_name(function))

    def mean(outputs: Any, labels: Tensor) -> Tensor:
        try:
            value = function(outputs, labels)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"loss {name!r} cannot take outputs that are {describe(outputs)} and labels that are "
                f"{describe(labels)}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(
                f"loss {name!r} gives {describe(value)}; it must give one number, the mean over "
                "the batch"
            )
        return value.reshape(())

    def error(outputs: Any, labels: Tensor) -> Tensor:
        return mean(outputs, labels) * len(labels)

    return Loss(name, error, None, _mse_distance, lambda labels, outputs: None, mean, None)
