"""Statistics: what calibration images tell of a reader, one dataclass for each need of a criterion.

The fields of such a class are means over the images, (channels,) unless it says otherwise. `add_(sums, seen)` adds to
`sums`, by field and from 0, what is seen of some images; `slopes` says where the gradient of the loss is wanted.

>>> @dataclass
... class Peaks:
...     peak: Tensor
...     slopes = None
...
...     @staticmethod
...     def add_(sums, seen):
...         sums["peak"] += seen.maps.amax(2).sum(0)
>>> check_statistic(Peaks)
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.pruning.competition import competition
from prune_dn.pruning.patches import patches_of

Slopes = Literal["inputs", "outputs"] | None
Sums = defaultdict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a layer was seen to do with some images.

    `x` is what it reads, (N, C, ...), of a linear layer (N, ..., C). `slope` is the gradient of the summed
    loss where the statistic wants it: by the labels at `x`, by labels that are drawn from the net's own prediction
    at the outputs. `owner` is the unit of each channel, (C,): behind a flattened map a unit has
    one a pixel. `positions` are flat output positions that are drawn, (N, Q); None = all.
    """

    layer: nn.Module
    x: Tensor
    slope: Tensor | None = None
    owner: Tensor | None = None
    positions: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the layer reads, channels second."""
        return channels_second(self.x, self.layer)

    @property
    def maps(self) -> Tensor:
        """What the layer reads of each unit: (N, units, positions).

        Raises PruningError where it reads more channels of one unit than of another.
        """
        x = self.inputs
        x = x.flatten(2) if x.ndim > 2 else x[..., None]
        if self.owner is None:
            return x
        copies = self.owner.bincount()
        if copies.min() != copies.max():
            raise PruningError(
                f"a {type(self.layer).__name__} reads some units {int(copies.min())} times and others "
                f"{int(copies.max())} times, so `maps` has no shape; take sums, with `per_unit`"
            )
        order = self.owner.argsort(stable=True).to(x.device)
        return x[:, order].unflatten(1, (len(copies), -1)).flatten(2)

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums over positions, then over the channels of one unit: (N, C, ...) -> (N, units)."""
        values = values.sum([*range(2, values.ndim)]) if values.ndim > 2 else values
        owner = self.owners.to(values.device)
        sizes = len(values), int(owner.max()) + 1
        return values.new_zeros(sizes).index_add_(1, owner, values)

    @property
    def owners(self) -> Tensor:
        """The unit of each channel."""
        return torch.arange(self.inputs.shape[1]) if self.owner is None else self.owner


@dataclass
class Activations:
    """The mean of |a|, a being what is read."""

    activation: Tensor
    slopes: ClassVar[Slopes] = None

    @staticmethod
    def add_(sums: Sums, seen: Seen) -> None:
        """See the module."""
        x = seen.inputs
        entries = seen.owners.bincount().clamp_min(1).to(x.device) * x[0, 0].numel()
        sums["activation"] += (seen.per_unit(x.abs()).sum(0) / entries).double()


@dataclass
class Gradients:
    """With s the product of what is read and the loss's gradient there, summed over an image's pixels: the mean of
    |s|, `taylor`, and half the mean of s squared, `fisher`."""

    taylor: Tensor
    fisher: Tensor
    slopes: ClassVar[Slopes] = "inputs"

    @staticmethod
    def add_(sums: Sums, seen: Seen) -> None:
        """See the module."""
        assert seen.slope is not None
        slopes = seen.per_unit(seen.inputs * channels_second(seen.slope, seen.layer))
        sums["taylor"] += slopes.abs().sum(0).double()
        sums["fisher"] += (slopes.square().sum(0) / 2).double()


@dataclass
class Gram:
    """How what is read goes together, and how much the loss minds an error of an output.

    `gram` is the mean over sampled pixels of p p^T for the patch p that one output pixel reads,
    (C * kernel², C * kernel²), channel-major, of a grouped convolution one for each group;
    `sensitivity` is the mean over images of the summed squared gradient of -log p(y) at each output, y
    drawn from the model's own prediction (the diagonal of its Fisher information), (outputs,); of a
    loss that is a callable, its gradient at the labels that are given.
    """

    gram: Tensor
    sensitivity: Tensor
    slopes: ClassVar[Slopes] = "outputs"

    @staticmethod
    def add_(sums: Sums, seen: Seen) -> None:
        """See the module. The matrix is large, so in float32 and in place."""
        assert seen.slope is not None
        slope = channels_second(seen.slope, seen.layer)
        sums["sensitivity"] += slope.square().sum([0, *range(2, slope.ndim)]).double()
        groups = int(getattr(seen.layer, "groups", 1))
        rows = patches_of(seen.layer, seen.x, seen.positions).float()
        share = len(seen.x) / len(rows)
        parts = rows.unflatten(1, (groups, -1)).transpose(0, 1)
        width = parts.shape[2]
        if "gram" not in sums:
            sums["gram"] = rows.new_zeros((groups, width, width) if groups > 1 else (width, width))
        if groups > 1:
            sums["gram"].baddbmm_(parts.transpose(1, 2), parts, alpha=share)
        else:
            sums["gram"].addmm_(rows.T, rows, alpha=share)


@dataclass
class Wins:
    """Of an MFM or a competing reader, (siblings,): the share of pixels where the sibling survives (equals share
    what they win), and by how much it exceeds the least of its unit, on average: what the sum of the survivors
    loses when it goes."""

    wins: Tensor
    margins: Tensor
    slopes: ClassVar[Slopes] = None

    @staticmethod
    def add_(sums: Sums, seen: Seen) -> None:
        """See the module."""
        for key, value in competition(seen.layer, seen.x).items():
            sums[key] += value.double()


def check_statistic(need: Any) -> None:
    """Raise PruningError for what is no class of statistics."""
    whole = isinstance(need, type) and dataclasses.is_dataclass(need)
    if not whole or not hasattr(need, "add_") or not hasattr(need, "slopes"):
        raise PruningError(
            f"need {need!r} is no statistic: give a dataclass with `slopes` and `add_(sums, seen)`, such as "
            "Activations, Gradients, Gram or Wins of prune_dn.pruning.statistics"
        )
    if need.slopes not in (None, "inputs", "outputs"):
        raise PruningError(
            f"slopes of {need.__name__} is {need.slopes!r}; it is None, 'inputs' or 'outputs'"
        )


def channels_second(x: Tensor, layer: nn.Module) -> Tensor:
    """(N, C, ...): a linear layer has its channels last."""
    return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x
