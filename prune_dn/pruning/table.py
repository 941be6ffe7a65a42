"""What a net costs with fewer channels, and what each unit saves: all units in one flat array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.graph.groups import IN, OUT, Group
from prune_dn.profiling import module_rows, total
from prune_dn.pruning.coupled import channelwise, held, widths
from prune_dn.pruning.patches import taps_of

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]
Units = npt.NDArray[np.int64]
STAYS = -1  # in a layer's outputs or inputs: a channel of no group


@dataclass(frozen=True)
class Layer:
    """A layer that can shrink: the unit of each output and input, and what they cost.

    `taps` weights belong to each pair of an output and an input of its group (`inputs` None: to each
    output), `vectors` more numbers to each output. `uses` positions of an image apply the weights.
    `counted` outputs are those that the unit `channels` counts.
    """

    outputs: Units
    inputs: Units | None
    taps: int
    vectors: int
    groups: int
    uses: int
    counted: bool

    def widths(self, keep: Mask) -> tuple[int, float]:
        """How many outputs stay, and how many inputs each of them reads."""
        inputs = 1.0 if self.inputs is None else _left(self.inputs, keep) / self.groups
        return _left(self.outputs, keep), inputs

    def cost(self, unit: str, outputs: float, inputs: float) -> float:
        """Channels, params or MACs of these widths."""
        if unit == "channels":
            return outputs if self.counted else 0
        if unit == "params":
            return outputs * (inputs * self.taps + self.vectors)
        return outputs * inputs * self.taps * self.uses


class Table:
    """The units of `groups`, group after group, and the layers that they lie in."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], uses: Mapping[str, int]) -> None:
        """`uses`: how often each conv and linear layer applies its weight to one image."""
        self.groups = groups
        self.starts = np.cumsum([0, *(group.size for group in groups)])
        self.size = int(self.starts[-1])
        places: dict[str, dict[int, Units]] = {}
        for number, group in enumerate(groups):
            for member in group.members:
                if member.layer not in places:
                    both = zip((OUT, IN), widths(model, member.layer), strict=True)
                    places[member.layer] = {side: np.full(width, STAYS) for side, width in both}
                units = int(self.starts[number]) + member.units.numpy()
                places[member.layer][member.sides[0]][member.channels.numpy()] = units
        has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.layers = [
            _layer(model, name, sides, uses.get(name, 0), has_norms)
            for name, sides in places.items()
        ]
        self.whole = total(list(module_rows(model, uses)))

    def units(self, number: int) -> slice:
        """Where the units of a group lie."""
        return slice(int(self.starts[number]), int(self.starts[number + 1]))

    def everything(self) -> Mask:
        """The mask with which all units stay."""
        return np.ones(self.size, dtype=bool)

    def total(self, unit: str, keep: Mask) -> float:
        """Channels, params, or MACs for one image, of the net that `keep` leaves."""
        return float(getattr(self.whole, unit)) - sum(
            layer.cost(unit, *layer.widths(np.ones_like(keep)))
            - layer.cost(unit, *layer.widths(keep))
            for layer in self.layers
        )

    def savings(self, unit: str, keep: Mask) -> Numbers:
        """What each unit saves that goes alone from the net that `keep` leaves, (units,)."""
        saved = np.zeros(self.size)
        for layer in self.layers:
            outputs, inputs = layer.widths(keep)
            _add(saved, layer.outputs, layer.cost(unit, 1, inputs))
            if layer.inputs is not None:
                less = layer.cost(unit, outputs, inputs - 1 / layer.groups)
                _add(saved, layer.inputs, layer.cost(unit, outputs, inputs) - less)
        return saved


def _left(units: Units, keep: Mask) -> int:
    free = units[units != STAYS]
    return len(units) - len(free) + int(np.count_nonzero(keep[free]))


def _add(sums: Numbers, units: Units, each: float) -> None:
    sums += each * np.bincount(units[units != STAYS], minlength=len(sums))


def _layer(
    model: nn.Module, name: str, sides: Mapping[int, Units], uses: int, has_norms: bool
) -> Layer:
    layer, outputs = held(model, name), sides[OUT]
    if isinstance(layer, torch.Tensor):
        return Layer(outputs, None, 0, int(isinstance(layer, nn.Parameter)), 1, 0, False)
    own = [p for p in layer._parameters.values() if p is not None]
    if not hasattr(layer, "in_channels") and not hasattr(layer, "in_features"):
        vectors = sum(p.numel() == len(outputs) for p in own)
        counted = has_norms and isinstance(layer, _BatchNorm)
        return Layer(outputs, None, 0, vectors, 1, 0, counted)
    groups, inputs = int(getattr(layer, "groups", 1)), sides[IN]
    taps, counted = taps_of(layer), not has_norms and hasattr(layer, "groups")
    if channelwise(layer):
        return Layer(outputs, None, taps, len(own) - 1, 1, uses, counted)
    return Layer(outputs, inputs, taps, len(own) - 1, groups, uses, counted)
