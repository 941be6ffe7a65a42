"""Which of two nets is closer to a third, on images that neither was fitted to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.data.batches import rows_of, run_on
from prune_dn.errors import PruningError
from prune_dn.graph import tensors
from prune_dn.models.examples import batch_size, for_net
from prune_dn.models.losses import LossFunction, find_loss
from prune_dn.pruning.patches import is_fitted
from prune_dn.pruning.slices import bytes_to_answer, fresh, in_slices

EVERY, ENOUGH = 10, 128  # a tenth costs the refit 1 to 3 % more error at 128 images, 1 % at 512


def split_images(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The batches of inputs that are fitted on, and that are judged on.

    The latter is one image of EVERY; all of them where there are fewer than ENOUGH.
    """
    sizes = [batch_size(x) for x in batches]
    if sum(sizes) < ENOUGH:
        return batches, batches
    held = [n % EVERY == EVERY - 1 for n in torch.arange(sum(sizes)).split(sizes)]
    fitted, judged = (
        [
            rows_of(x, mine)
            for x, out in zip(batches, held, strict=True)
            if (mine := out == is_held).any()
        ]
        for is_held in (False, True)
    )
    return fitted, judged


class Judge:
    """How far from the dense net's a net's outputs are, per image; `rounding`: what is nothing."""

    def __init__(
        self, dense: nn.Module, batches: Sequence[Any], loss: str | LossFunction | None
    ) -> None:
        every = [for_net(x, dense) for x in batches]
        needs = bytes_to_answer(dense, every[0])
        self.count = sum(map(batch_size, every))
        self.parts = [part for x in every for part in in_slices(x, needs)]
        self.targets = self._outputs(dense)
        if not all(t.isfinite().all() for target in self.targets for t in target):
            raise PruningError(
                "the dense net gives NaN or infinity on the calibration images: nothing can be "
                "refitted to that; look at its weights, and at how the images are normalised"
            )
        self.loss = find_loss("mse" if loss is None else loss, self.targets[0][0], None)
        self.rounding = self._mean(self._rounded(_rounding(dense)))

    def __call__(self, net: nn.Module) -> float:
        return self._mean(self._outputs(net))

    def _outputs(self, net: nn.Module) -> list[list[Tensor]]:
        return [tensors(run_on(net, fresh(part))) for part in self.parts]

    def _mean(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        pairs = zip(itertools.chain(*outputs), itertools.chain(*self.targets), strict=True)
        total = sum(float(self.loss.distance(found, target)) for found, target in pairs)
        return total / self.count

    def _rounded(self, share: float) -> list[list[Tensor]]:
        """The targets, each with an error of its own, of `share` of what outputs are like."""
        generator = torch.Generator().manual_seed(0)
        every = torch.cat([t.flatten().double() for target in self.targets for t in target])
        size = share * every.square().mean().sqrt()

        def noisy(t: Tensor) -> Tensor:
            return t + size * torch.randn(t.shape, generator=generator).to(size)

        return [[noisy(t) for t in target] for target in self.targets]


def _rounding(net: nn.Module) -> float:
    """By which share of their size rounding may move the outputs, errors being independent.

    The root of: one unit roundoff of the net's dtype for each layer's result that is stored, and
    one of float32 or better for each term of the sums that make it.
    """
    weights = [m.get_parameter("weight") for m in net.modules() if is_fitted(m)]
    dtype, terms = weights[0].dtype, sum(weight[0].numel() for weight in weights)
    stored, summed = (
        torch.finfo(d).eps / 2 for d in (dtype, torch.promote_types(dtype, torch.float32))
    )
    return math.hypot(stored * len(weights) ** 0.5, summed * terms**0.5)
