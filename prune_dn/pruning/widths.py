"""How many channels each group gives up, so that a budget is met: by share or by price."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from prune_dn.pruning.table import Mask, Numbers, Table

Counts = npt.NDArray[np.int64]

PRICINGS = 6  # how often everything is priced anew


class Widths:
    """The orders in which the units of each group go, the least important first.

    In a group of several blocks one step takes a unit of each: the least important left there.
    """

    def __init__(
        self,
        table: Table,
        scores: Sequence[Tensor],
        may_go: Sequence[Tensor],
        min_channels: int,
        round_to: int,
    ) -> None:
        """`scores` and `may_go` are (size,) for each group of the table."""
        self.table, self.round_to = table, round_to
        self.orders: list[npt.NDArray[np.intp]] = []
        self.losses: list[Numbers] = []  # of each step that can be taken, summed over blocks
        self.least = [max(-(-min_channels // group.blocks), 1) for group in table.groups]
        for group, score, goes in zip(table.groups, scores, may_go, strict=True):
            value = np.where(goes.numpy(), score.numpy(), np.inf).reshape(group.blocks, -1)
            order = np.argsort(value, axis=1, kind="stable")
            steps = int(goes.sum()) // group.blocks
            self.orders.append(order)
            self.losses.append(np.take_along_axis(value, order, 1)[:, :steps].sum(0))

    def keep(self, steps: Counts) -> Mask:
        """What stays, (units,), when each group takes so many steps; widths are kept as asked."""
        keep = np.ones(self.table.size, dtype=bool)
        for number, group in enumerate(self.table.groups):
            order = self.orders[number]
            step = self.round_to // math.gcd(self.round_to, group.blocks)
            left = max(order.shape[1] - int(steps[number]), self.least[number])
            gone = order[:, : max(order.shape[1] - -(-left // step) * step, 0)]
            np.put_along_axis(keep[self.table.units(number)].reshape(order.shape), gone, False, 1)
        return keep

    def by_share(self, scores: Sequence[Tensor], scope: str) -> Counts:
        """The group of each step: by share of its group's mean score (`global`) or by rank."""
        ranking = []
        for number, (losses, score) in enumerate(zip(self.losses, scores, strict=True)):
            width = self.orders[number].shape[1]
            mean = float(score[score.isfinite()].mean().clamp_min(1e-30))
            for k, loss in enumerate(losses / self.table.groups[number].blocks):
                place = (k + 0.5) / width
                ranking.append((loss / mean if scope == "global" else place, place, number))
        return np.array([number for _, _, number in sorted(ranking)], dtype=np.int64)

    def meet_by_share(self, unit: str, target: float, scores: Sequence[Tensor], scope: str) -> Mask:
        """The shortest prefix of `by_share` that leaves at most `target` of `unit`."""
        none = np.zeros(len(self.table.groups), dtype=np.int64)
        return self.keep(self._prefix(unit, target, none, self.by_share(scores, scope)))

    def meet_by_price(self, unit: str, target: float) -> Mask:
        """Steps by loss per cost saved, until at most `target` of `unit` is left.

        Scores of all groups must be in one currency. The cheapest steps whose savings add up to half of
        what is too much are taken, everything is priced anew, and so on; bisection ends it.
        """
        steps = np.zeros(len(self.table.groups), dtype=np.int64)
        for _ in range(PRICINGS):
            keep = self.keep(steps)
            owners, saved = self._priced(unit, keep, steps)
            excess = self.table.total(unit, keep) - target
            half = int(np.searchsorted(np.cumsum(saved), excess / 2))
            more = steps + np.bincount(owners[:half], minlength=len(steps))
            if self.table.total(unit, self.keep(more)) <= target:
                break
            steps = more
        owners, _ = self._priced(unit, self.keep(steps), steps)
        return self.keep(self._prefix(unit, target, steps, owners))

    def all_steps(self) -> Mask:
        """The least that can stay."""
        return self.keep(np.array([len(losses) for losses in self.losses], dtype=np.int64))

    def _priced(self, unit: str, keep: Mask, steps: Counts) -> tuple[Counts, Numbers]:
        """The groups of the steps that are left, the cheapest first, and what each saves."""
        each = self.table.savings(unit, keep)
        prices, owners, saved = [], [], []
        for number, losses in enumerate(self.losses):
            left = losses[steps[number] :]
            units = self.table.units(number)
            saving = (
                float(np.where(keep[units], each[units], 0).max())
                * self.table.groups[number].blocks
            )
            if len(left) and saving > 0:
                prices.append(left / saving)
                owners.append(np.full(len(left), number))
                saved.append(np.full(len(left), saving))
        if not prices:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        order = np.argsort(np.concatenate(prices), kind="stable")
        return np.concatenate(owners)[order], np.concatenate(saved)[order]

    def _prefix(self, unit: str, target: float, steps: Counts, owners: Counts) -> Counts:
        """`steps` and the fewest of `owners` with which the target is met, by bisection."""

        def taken(count: int) -> Counts:
            return steps + np.bincount(owners[:count], minlength=len(steps))

        def meets(count: int) -> bool:
            return self.table.total(unit, self.keep(taken(count))) <= target

        return taken(bisect_left(range(len(owners)), True, key=meets))
