"""Criteria: what a reader loses with each channel that it reads.

Every unit is judged where it is *read*, behind a norm. (The norm of a filter itself says nothing in
a pre-activation net: the norms behind it undo any scale.) An edge is one reading; a bottleneck
channel is one reading, by conv2; a stream channel is read by every later layer, and its importance
is the sum over its readers. Of what competes (MFM) a unit has the sum over what it makes, and its
siblings share that (see `siblings`); only a criterion that needs `wins` looks at the competition.

A criterion is a function `(reading) -> (channels,)`, finite, higher = keep, registered by name with
what it needs from calibration images, a dataclass (see `statistics`). Scores are compared between
readers as they are: `reconstruction`, `taylor` and `fisher` are in units of the loss, and the others
in those of their formula.

>>> import torch
>>> @register_criterion("example")
... def example(reading):
...     return reading.weight.detach().abs().amax(dim=(0, 2, 3))
>>> sorted(CRITERIA)
['activation', 'bn_scale', 'example', 'fisher', 'fpgm', 'l1', 'l2', 'lamp', 'mfm_win_rate', 'random', 'reconstruction', 'taylor']
>>> del CRITERIA["example"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.errors import PruningError
from prune_dn.pruning.elimination import elimination_losses
from prune_dn.pruning.statistics import Activations, Gradients, Gram, Wins, check_statistic

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A norm and the conv (or classifier) that reads its activated output.

    `weight` is (outputs, channels, kernel, kernel); `generator` is for random criteria;
    `statistics` hold what the criterion needs from calibration images. `norm` is None where no
    norm is in front of the layer, as where a norm follows the conv that makes a channel.
    """

    name: str
    norm: _BatchNorm | None
    weight: Tensor
    generator: torch.Generator
    statistics: Any = None


class Criterion(NamedTuple):
    """A function from a reading to (channels,), and what it needs from calibration images."""

    function: Callable[[Reading], Tensor]
    need: type[Any] | None


CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str, *, need: type[Any] | None = None
) -> Callable[[Callable[[Reading], Tensor]], Callable[[Reading], Tensor]]:
    """Make a criterion available by name, also to recipes. A name that is taken raises.

    `need`: a class of statistics, such as `Activations`, `Gradients` (with labels), `Gram` or `Wins`, whose
    instance is the reading's `statistics`; None = the weights say it all. With `Wins` a reading is an MFM or a competing reader: its channels are the siblings.
    """
    if need is not None:
        check_statistic(need)

    def register(function: Callable[[Reading], Tensor]) -> Callable[[Reading], Tensor]:
        if name in CRITERIA:
            raise PruningError(f"criterion {name!r} is registered already; choose another name")
        CRITERIA[name] = Criterion(function, need)
        return function

    return register


@register_criterion("bn_scale")
def bn_scale(reading: Reading) -> Tensor:
    """|gamma| of the reader's norm: Network Slimming (arXiv:1708.06519)."""
    assert reading.norm is not None
    return reading.norm.weight.detach().abs()


@register_criterion("l1")
def l1(reading: Reading) -> Tensor:
    """Sum of |weights| that read the channel; after "Pruning Filters" (arXiv:1608.08710)."""
    return reading.weight.detach().abs().sum(dim=(0, 2, 3))


@register_criterion("l2")
def l2(reading: Reading) -> Tensor:
    """Euclidean norm of the weights that read the channel."""
    return reading.weight.detach().square().sum(dim=(0, 2, 3)).sqrt()


@register_criterion("random")
def random(reading: Reading) -> Tensor:
    """Uniform in [0, 1), from the seed of the plan: the control that a criterion must beat."""
    return torch.rand(reading.weight.shape[1], generator=reading.generator)


@register_criterion("fpgm")
def fpgm(reading: Reading) -> Tensor:
    """Sum of distances to the weights of the reader's other channels (arXiv:1811.00250)."""
    rows = reading.weight.detach().transpose(0, 1).flatten(1)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


@register_criterion("lamp")
def lamp(reading: Reading) -> Tensor:
    """Squared weights over the sum of all that are no smaller in the reader (arXiv:2010.07611)."""
    squares = reading.weight.detach().square().sum(dim=(0, 2, 3))
    order = squares.argsort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = squares[order] / squares[order].cumsum(0).clamp_min(1e-30)
    return scores


@register_criterion("activation", need=Activations)
def activation(reading: Reading) -> Tensor:
    """Mean activation of the channel as the reader sees it (arXiv:1611.06440, section 2.2)."""
    found: Tensor = reading.statistics.activation
    return found


@register_criterion("taylor", need=Gradients)
def taylor(reading: Reading) -> Tensor:
    """|activation x gradient|, summed over pixels, mean over images (arXiv:1611.06440, eq. 8)."""
    found: Tensor = reading.statistics.taylor
    return found


@register_criterion("fisher", need=Gradients)
def fisher(reading: Reading) -> Tensor:
    """Half the mean squared (activation x gradient): diagonal Fisher (arXiv:1801.05787)."""
    found: Tensor = reading.statistics.fisher
    return found


@register_criterion("reconstruction", need=Gram)
def reconstruction(reading: Reading) -> Tensor:
    """Rise of the loss when the channel goes and the rest is refitted (optimal brain surgeon).

    The reader's channels go one by one (`elimination_losses`); an output's squared error counts
    with half the diagonal Fisher information there, which makes readers comparable. No labels, but
    the `loss` says what the outputs mean.
    """
    statistics: Gram = reading.statistics
    weight = reading.weight.detach()
    scaled = weight.flatten(1) * (statistics.sensitivity[:, None] / 2).sqrt()
    return elimination_losses(statistics.gram, scaled.T, weight.shape[2] * weight.shape[3])


@register_criterion("mfm_win_rate", need=Wins)
def mfm_win_rate(reading: Reading) -> Tensor:
    """What the MFM loses with the sibling: its mean margin over its rival, 0 where that wins."""
    found: Tensor = reading.statistics.margins
    return found


def reads_images(criterion: str | None) -> bool:
    """Whether the criterion needs calibration images; False for None, and a name that is unknown."""
    return _need(criterion) is not None


def follows_loss(criterion: str | None) -> bool:
    """Whether the criterion depends on what the outputs mean; False as for `reads_images`."""
    need = _need(criterion)
    return need is not None and need.slopes is not None


def needs_labels(criterion: str) -> bool:
    """Whether the criterion looks at the gradient of the loss at the labels that are given."""
    need = _need(criterion)
    return need is not None and need.slopes == "inputs"


def _need(criterion: object) -> type[Any] | None:
    return (
        CRITERIA[criterion].need if isinstance(criterion, str) and criterion in CRITERIA else None
    )


def needs_images(criterion: str) -> PruningError:
    """The error for a criterion that reads images where none are given."""
    kind = "(images, labels) batches" if needs_labels(criterion) else "batches of images"
    return PruningError(
        f"criterion {criterion!r} needs calibration images: give calibration={kind}"
    )


def judge(reading: Reading, criterion: str) -> Scores:
    """The criterion's score of each channel that is read, checked."""
    losses: Scores = CRITERIA[criterion].function(reading).double().cpu().numpy()
    check_losses(losses, criterion, reading.name, reading.weight.shape[1])
    return losses


def check_losses(losses: Scores, criterion: str, name: str, channels: int) -> None:
    """Raise PruningError unless they are `channels` finite numbers."""
    if losses.shape != (channels,):
        raise PruningError(
            f"criterion {criterion!r} gave shape {losses.shape} for {name}, "
            f"which reads {channels} channels"
        )
    if not np.isfinite(losses).all():
        raise PruningError(
            f"criterion {criterion!r}: {int((~np.isfinite(losses)).sum())} of {channels} scores of "
            f"{name} are not finite, though its weights are: numbers that large overflow in the "
            "criterion's formula, or it is wrong; choose another criterion"
        )
