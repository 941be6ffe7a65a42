"""Criteria: what a reader loses with each channel that it reads.

Every unit is judged where it is *read*, behind a norm. (The norm of a filter itself says nothing in
a pre-activation net: the norms behind it undo any scale.) An edge is one reading; a bottleneck
channel is one reading, by conv2; a stream channel is read by every later layer, and its importance
is the sum over its readers. Of what competes (MFM) a unit has the sum over what it makes, and its
siblings share that (see `siblings`); only a criterion that needs `wins` looks at the competition.

A criterion is a function `(reading) -> (channels,)`, finite, higher = keep, registered by name with
what it needs from calibration images (see `calibration.Statistics`). Scores are compared between
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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prune_dn.batches import Batches, read_batches
from prune_dn.errors import PruningError
from prune_dn.losses import LossFunction
from prune_dn.models import DenseNet
from prune_dn.pruning.calibration import NEEDS, Need, Statistics, collect
from prune_dn.pruning.elimination import elimination_losses
from prune_dn.pruning.parts import Group, Part
from prune_dn.pruning.siblings import contests, share_out
from prune_dn.pruning.units import Units

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A norm and the conv (or classifier) that reads its activated output.

    `weight` is (outputs, channels, kernel, kernel); `generator` is for random criteria;
    `statistics` hold what the criterion needs from calibration images. In nets that are no
    DenseNets `norm` is None: there a norm follows the conv that makes a channel.
    """

    name: str
    norm: nn.BatchNorm2d | None
    weight: Tensor
    generator: torch.Generator
    statistics: Statistics = field(default_factory=Statistics)


class Reader(NamedTuple):
    """A conv or the classifier, the norm before it, and the units that it reads."""

    part: Part
    norm: str
    conv: str
    group: Group


class Criterion(NamedTuple):
    """A function from a reading to (channels,), and what it needs from calibration images."""

    function: Callable[[Reading], Tensor]
    need: Need | None


CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str, *, need: Need | None = None
) -> Callable[[Callable[[Reading], Tensor]], Callable[[Reading], Tensor]]:
    """Make a criterion available by name, also to recipes. A name that is taken raises.

    `need`: `activations`, `gradients` (with labels), `gram`, or `wins`; None = the weights say it all.
    With `wins` a reading is an MFM or a competing reader: its channels are the siblings.
    """
    if need is not None and need not in NEEDS:
        raise PruningError(f"need {need!r} is unknown; choose one of {', '.join(NEEDS)}")

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


@register_criterion("activation", need="activations")
def activation(reading: Reading) -> Tensor:
    """Mean activation of the channel as the reader sees it (arXiv:1611.06440, section 2.2)."""
    assert reading.statistics.activation is not None
    return reading.statistics.activation


@register_criterion("taylor", need="gradients")
def taylor(reading: Reading) -> Tensor:
    """|activation x gradient|, summed over pixels, mean over images (arXiv:1611.06440, eq. 8)."""
    assert reading.statistics.taylor is not None
    return reading.statistics.taylor


@register_criterion("fisher", need="gradients")
def fisher(reading: Reading) -> Tensor:
    """Half the mean squared (activation x gradient): diagonal Fisher (arXiv:1801.05787)."""
    assert reading.statistics.fisher is not None
    return reading.statistics.fisher


@register_criterion("reconstruction", need="gram")
def reconstruction(reading: Reading) -> Tensor:
    """Rise of the loss when the channel goes and the rest is refitted (optimal brain surgeon).

    The reader's channels go one by one (`elimination_losses`); an output's squared error counts
    with half the diagonal Fisher information there, which makes readers comparable. No labels, but
    the `loss` says what the outputs mean.
    """
    statistics = reading.statistics
    assert statistics.gram is not None and statistics.sensitivity is not None
    weight = reading.weight.detach()
    scaled = weight.flatten(1) * (statistics.sensitivity[:, None] / 2).sqrt()
    return elimination_losses(statistics.gram, scaled.T, weight.shape[2] * weight.shape[3])


@register_criterion("mfm_win_rate", need="wins")
def mfm_win_rate(reading: Reading) -> Tensor:
    """What the MFM loses with the sibling: its mean margin over its rival, 0 where that wins."""
    assert reading.statistics.margins is not None
    return reading.statistics.margins


def reads_images(criterion: str | None) -> bool:
    """Whether the criterion needs calibration images; False for None, and a name that is unknown."""
    return _need(criterion) is not None


def follows_loss(criterion: str | None) -> bool:
    """Whether the criterion depends on what the outputs mean; False as for `reads_images`."""
    return _need(criterion) in ("gradients", "gram")


def _need(criterion: object) -> Need | None:
    return (
        CRITERIA[criterion].need if isinstance(criterion, str) and criterion in CRITERIA else None
    )


def readers(units: Units) -> Iterator[Reader]:
    """All readers, in the order in which they run."""
    for stream in units.streams:
        for part in stream.readers:
            assert part.edges is not None
            yield Reader(part, part.edges.name, part.first_conv, part.edges)
            if part.bottleneck is not None:
                yield Reader(part, f"{part.name}.norm2", f"{part.name}.conv2", part.bottleneck)


def importance(
    model: DenseNet,
    units: Units,
    criterion: str,
    *,
    calibration: Batches | None = None,
    seed: int = 0,
) -> Scores:
    """The importance of every unit, (units.size,), in the order of `units`.

    Raises PruningError for an unknown criterion, one that needs calibration images and has none,
    and for scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise PruningError(
            f"criterion {criterion!r} is unknown; choose one of {', '.join(sorted(CRITERIA))}"
        )
    generator = torch.Generator().manual_seed(seed)
    if CRITERIA[criterion].need == "wins":
        scores = _of_competition(model, units, criterion, calibration, generator, seed)
    else:
        scores = _of_readers(model, units, criterion, calibration, generator, seed)
        share_out(model, units, scores, criterion, generator, is_made=False)
    for stream in units.streams:
        lost = np.zeros(stream.width)
        for part in stream.readers:
            readings, positions = part.readings
            lost[positions] += scores[readings.units]
        for part in stream.producers:
            assert part.stream is not None
            scores[part.stream.units] = lost[part.made()].sum(axis=0)
    if CRITERIA[criterion].need != "wins":
        share_out(model, units, scores, criterion, generator, is_made=True)
    return scores


def _of_readers(
    model: DenseNet,
    units: Units,
    criterion: str,
    calibration: Batches | None,
    generator: torch.Generator,
    seed: int,
) -> Scores:
    """What each reader loses with each channel: of edges and bottleneck channels."""
    everyone = list(readers(units))
    found = observe(model, [r.conv for r in everyone], criterion, calibration, seed)
    scores = np.zeros(units.size)
    for reader in everyone:
        norm, weight = model.get_submodule(reader.norm), _kernels(model.get_submodule(reader.conv))
        assert isinstance(norm, nn.BatchNorm2d)
        statistics = found.pop(reader.conv, Statistics())
        reading = Reading(reader.norm, norm, weight, generator, statistics)
        scores[reader.group.units] = judge(reading, criterion)
    return scores


def _of_competition(
    model: DenseNet,
    units: Units,
    criterion: str,
    calibration: Batches | None,
    generator: torch.Generator,
    seed: int,
) -> Scores:
    """What each sibling is worth; a unit or edge has their sum, and all else 0.

    Readers share the worth of a unit of new maps equally, so that it is again the sum over them.
    """
    everyone = list(contests(units))
    found = observe(model, [contest.name for contest in everyone], criterion, calibration, seed)
    scores, made = np.zeros(units.size), np.zeros(units.size)
    for contest in everyone:
        weight = _kernels(model.get_submodule(contest.conv))
        weight = weight.transpose(0, 1) if contest.is_made else weight[:, contest.owner]
        reading = Reading(contest.name, None, weight, generator, found.pop(contest.name))
        losses = judge(reading, criterion)
        if contest.group is not None:
            scores[contest.group.units] = losses
        whole = np.bincount(contest.owner, losses, contest.whole.size)
        (made if contest.is_made else scores)[contest.whole.units] = whole
    for stream in units.streams:
        makers = stream.makers()
        plain = [part for part in stream.readers if part.sides is None]
        sources = [makers[part.positions] for part in plain]
        count = np.bincount(np.concatenate([*sources, makers[:0]]), minlength=units.size)
        for part, source in zip(plain, sources, strict=True):
            assert part.edges is not None
            scores[part.edges.units] = made[source] / count[source]
    return scores


def _kernels(conv: nn.Module) -> Tensor:
    """Weights (outputs, inputs, kernel, kernel), also of a linear layer."""
    assert isinstance(conv, nn.Conv2d | nn.Linear)
    return conv.weight.reshape(*conv.weight.shape[:2], *(conv.weight.shape[2:] or (1, 1))).float()


def observe(
    model: nn.Module,
    layers: list[str],
    criterion: str,
    calibration: Batches | None,
    seed: int,
    owners: Mapping[str, Tensor] | None = None,
) -> dict[str, Statistics]:
    """What the criterion needs to know of the inputs of each layer; empty = nothing.

    `owners` are those of `collect`.
    """
    need = CRITERIA[criterion].need
    if need is None:
        return {}
    if calibration is None:
        raise needs_images(criterion)
    return dict(collect(model, layers, calibration, need, owners=owners, seed=seed))


def calibration_for(
    calibration: Iterable[object] | None, criterion: str, loss: str | LossFunction | None
) -> Batches | None:
    """The batches that the criterion reads; None when it reads none."""
    need = CRITERIA[criterion].need
    if need is None and calibration is not None:
        raise PruningError(
            f"calibration has no effect: criterion {criterion!r} reads only the weights; leave it "
            "out, or choose a criterion that reads images (`prune-dn criteria`)"
        )
    if loss is not None and not follows_loss(criterion):
        raise PruningError(
            f"loss has no effect: criterion {criterion!r} does not depend on what the outputs mean; "
            "leave it out"
        )
    if need is None:
        return None
    if calibration is None:
        raise needs_images(criterion)
    labelled = need == "gradients" or (need == "gram" and callable(loss))
    return read_batches(calibration, needs_labels=labelled, loss=loss)


def needs_images(criterion: str) -> PruningError:
    """The error for a criterion that reads images where none are given."""
    labels = CRITERIA[criterion].need == "gradients"
    kind = "(images, labels) batches" if labels else "batches of images"
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
