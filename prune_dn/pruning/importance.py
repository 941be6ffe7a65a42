"""Criteria: what a reader loses with each channel that it reads.

Every unit is judged where it is *read*, behind a norm. (The norm of a filter itself says nothing in
a pre-activation net: the norms behind it undo any scale.) An edge is one reading; a bottleneck
channel is one reading, by conv2; a stream channel is read by every later layer, and its importance
is the sum over its readers.

A criterion is a function `(reading) -> (channels,)`, finite, higher = keep, registered by name:

>>> import torch
>>> @register_criterion("example")
... def example(reading):
...     return reading.weight.detach().abs().amax(dim=(0, 2, 3))
>>> sorted(CRITERIA)
['bn_scale', 'example', 'l1', 'l2', 'random']
>>> del CRITERIA["example"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.models import DenseNet
from prune_dn.pruning.units import Units

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A norm and the conv (or classifier) that reads its activated output.

    `weight` is (outputs, channels, kernel, kernel); `generator` is for random criteria.
    """

    name: str
    norm: nn.BatchNorm2d
    weight: Tensor
    generator: torch.Generator


Criterion = Callable[[Reading], Tensor]
CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Make a criterion available by name, also to recipes. A name that is taken raises."""

    def register(criterion: Criterion) -> Criterion:
        if name in CRITERIA:
            raise PruningError(f"criterion {name!r} is registered already; choose another name")
        CRITERIA[name] = criterion
        return criterion

    return register


@register_criterion("bn_scale")
def bn_scale(reading: Reading) -> Tensor:
    """|gamma| of the reader's norm: Network Slimming (arXiv:1708.06519)."""
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


def importance(model: DenseNet, units: Units, criterion: str, *, seed: int = 0) -> Scores:
    """The importance of every unit, (units.size,), in the order of `units`.

    Raises PruningError for an unknown criterion and for scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise PruningError(
            f"criterion {criterion!r} is unknown; choose one of {', '.join(sorted(CRITERIA))}"
        )
    generator = torch.Generator().manual_seed(seed)
    scores = np.zeros(units.size)

    def score(norm_name: str, reader_name: str) -> Scores:
        norm, reader = model.get_submodule(norm_name), model.get_submodule(reader_name)
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(reader, nn.Conv2d | nn.Linear)
        weight = reader.weight.reshape(
            *reader.weight.shape[:2], *(reader.weight.shape[2:] or (1, 1))
        )
        losses = CRITERIA[criterion](Reading(norm_name, norm, weight.float(), generator))
        found = losses.double().cpu().numpy()
        if found.shape != (weight.shape[1],):
            raise PruningError(
                f"criterion {criterion!r} gave shape {found.shape} for {norm_name}, "
                f"which reads {weight.shape[1]} channels"
            )
        if not np.isfinite(found).all():
            raise PruningError(
                f"criterion {criterion!r}: {int((~np.isfinite(found)).sum())} scores of {norm_name} "
                "are not finite; the weights hold NaN or infinity, so load a sound checkpoint"
            )
        return found

    for stream in units.streams:
        lost = np.zeros(stream.width)
        for part in stream.readers:
            assert part.edges is not None
            conv = {"classifier": "classifier"}.get(part.name, f"{part.name}.conv1")
            if part is stream.reader and part.stream is not None:
                conv = f"{part.name}.conv"
            found = score(part.edges.name, conv)
            scores[part.edges.units] = found
            lost[part.positions] += found
            if part.bottleneck is not None:
                scores[part.bottleneck.units] = score(f"{part.name}.norm2", f"{part.name}.conv2")
        for part in stream.producers:
            assert part.stream is not None
            scores[part.stream.units] = lost[part.made()].sum(axis=0)
    return scores
