"""From importance to a choice of units that meets a budget exactly, by search."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from prune_dn.errors import BudgetError
from prune_dn.graph.types import NONE
from prune_dn.pruning.parts import STAYS, Group, Mask
from prune_dn.pruning.prices import Costs, Indices, Market, Scores
from prune_dn.pruning.rates import Costing, Rates
from prune_dn.pruning.units import Units

ROUNDS, AVALANCHES = 6, 20


@dataclass(frozen=True)
class Budget:
    """How much may stay, of what (`unit` is its name), counted how.

    `ranks`, (units,): the smallest goes first, an infinite one never; None = by price. A module that
    is wider than `block` channels is cut to multiples of that too. With `connections` the edges of each
    connection go together, in whatever number. `rest` is what the net has beside its
    units, and `stays` says which layers must stay, and why: both for the error.
    """

    target: float
    unit: str
    rates: Rates
    ranks: Scores | None
    min_channels: int
    round_to: int
    whole_layers: bool = False
    connections: bool = False
    block: int = 1
    rest: float = 0.0
    stays: str = ""


def choose(units: Units, scores: Scores, may_go: Mask, budget: Budget) -> Mask:
    """The closed `keep` that cuts the least important units until `budget.target` is reached.

    Units are ranked by `budget.ranks`, or by importance per cost saved (`prices`; with
    `whole_layers` these go too where they do not pay for their upkeep). In the second case the
    cheapest units whose savings add up to half of what is still too much go, everything is priced
    anew, and so on; at the end the shortest prefix of the ranking that leaves at most `target` is
    found by bisection, so that the result is within the cost of one unit (of a multiple; of one
    layer) of it. Where prices rank, a unit that would bring down far more stays, unless nobody needs
    it. Raises BudgetError when even the whole ranking is not enough.
    """
    may_go = losers(units, scores, may_go)
    fixed, spare = floor(units, scores, may_go, budget.min_channels)
    may_go = may_go & ~fixed
    if not budget.whole_layers:
        may_go &= ~spare
    if budget.connections:  # one edge that stays keeps its connection
        may_go &= ~np.isin(units.connection, units.connection[~may_go & (units.connection != NONE)])
    whole = np.ones(units.size, dtype=bool)
    ranking = _Ranking(units, scores, may_go, spare, budget)
    least = ranking.cut(whole, ranking.order(whole, ranking.costs(whole)))
    if not ranking.meets(least):
        others = "the protected units and the chosen kinds of unit"
        if budget.ranks is not None and not np.isfinite(budget.ranks).all():
            others = "the largest measured ratios, " + others
        amounts = (ranking.remains(whole), budget.target, ranking.remains(least))
        raise _unreachable(budget, amounts, others)
    keep = whole
    for _ in range(ROUNDS if budget.ranks is None else 0):
        costs = ranking.costs(keep)
        order = ranking.order(keep, costs)
        saved = np.cumsum(ranking.market.saved(keep, costs)[order])
        excess = ranking.remains(keep) - budget.target
        less = ranking.cut(keep, order[: int(np.searchsorted(saved, excess / 2))])
        if ranking.meets(less):
            break
        keep = less
    costs = ranking.costs(keep)
    order = ranking.order(keep, costs)
    gone = order[: ranking.enough(keep, order)]
    if len(gone) and spare[gone[-1]]:
        gone = ranking.spared(keep, gone)
    elif budget.ranks is None:
        gone = ranking.without_avalanche(keep, order, gone, costs)
    return ranking.cut(keep, gone)


class _Ranking:
    """In which order the units of a net go, and what is left when some have gone."""

    def __init__(
        self, units: Units, scores: Scores, may_go: Mask, spare: Mask, budget: Budget
    ) -> None:
        self.units, self.scores, self.may_go, self.budget = units, scores, may_go, budget
        self.spare = spare
        whole = budget.connections
        self.market, self.costing = Market(units, scores, may_go, whole), Costing(units)
        wide = np.array([group.size > budget.block for group in units.groups])
        self.multiples = np.where(wide, math.lcm(budget.round_to, budget.block), budget.round_to)
        if whole:
            self.multiples[[units.connection[group.start] != NONE for group in units.groups]] = 1
        self.starts = np.array([group.start for group in units.groups])

    def remains(self, keep: Mask) -> float:
        """What is left of the budget's unit."""
        return self.costing.total(keep, self.budget.rates)

    def meets(self, keep: Mask) -> bool:
        """Whether that is little enough."""
        return self.remains(keep) <= self.budget.target

    def enough(self, keep: Mask, order: Indices) -> int:
        """How many units of `order` must go to meet the target, by bisection."""

        def meets(count: int) -> bool:
            return self.meets(self.cut(keep, order[:count]))

        return bisect_left(range(len(order)), True, lo=1, key=meets)

    def spared(self, keep: Mask, gone: Indices) -> Indices:
        """Less than `gone`, whose last one is a whole layer and may save more than what is missing.

        The layer goes; of the others no more than are needed beside it, the first to go first.
        """
        block = self.units.block_of[gone]
        layer, others = gone[block == block[-1]], gone[block != block[-1]]

        def meets(count: int) -> bool:
            return self.meets(self.cut(keep, np.concatenate([others[:count], layer])))

        count = bisect_left(range(len(others)), True, key=meets)
        return np.concatenate([others[:count], layer])

    def without_avalanche(self, keep: Mask, order: Indices, gone: Indices, costs: Costs) -> Indices:
        """`gone`, the shortest prefix of `order` that meets the target, or one that overshoots less.

        The last edge that read a layer takes the layer with it, and all that nobody reads then. Where
        that saves more than any unit by itself, the unit that would start it stays, and the next ones
        in the order go instead; if that never comes closer, `gone` is the answer.
        """
        saved = self.multiples.max(initial=1) * self.market.saved(keep, costs)
        if self.budget.connections:
            edges = np.flatnonzero(keep & (self.units.connection != NONE))
            saved[edges] = self.market.of_connections(edges, saved)
        closest, left = gone, self.remains(self.cut(keep, gone))
        for _ in range(AVALANCHES):
            if not len(gone) or self.scores[gone[-1]] <= 0:  # what nobody needs is no loss
                break
            if self.budget.target - left <= saved[gone].max():
                break
            order = np.delete(order, len(gone) - 1)
            if not self.meets(self.cut(keep, order)):
                break
            gone = order[: self.enough(keep, order)]
            remains = self.remains(self.cut(keep, gone))
            if remains > left:
                closest, left = gone, remains
        return closest

    def costs(self, keep: Mask) -> Costs:
        """What each unit costs in the net that `keep` leaves."""
        return self.costing.each(keep, self.budget.rates)

    def order(self, keep: Mask, costs: Costs) -> Indices:
        """The units that may go, the first to go first."""
        candidates = np.flatnonzero(keep & self.may_go)
        if self.budget.ranks is not None:  # equal ones: the same share of each group
            value, own = self.budget.ranks, quantiles(self.units, self.scores)
        else:
            value = own = self.market.prices(keep, costs)
        if self.budget.whole_layers:
            layers = np.append(self.market.block_prices(keep, costs), np.inf)
            layer = layers[self.units.output_of]
            value = np.where(self.spare, layer, np.minimum(own, layer))
        candidates = candidates[np.isfinite(value[candidates])]
        return candidates[np.lexsort((own[candidates], value[candidates]))]

    def cut(self, keep: Mask, gone: Indices) -> Mask:
        """What stays of `keep`; a cut width is one of its group's multiples: the first to go go."""
        less = keep.copy()
        if self.budget.connections:
            found = self.units.connection[gone]
            less &= ~np.isin(self.units.connection, found[found != NONE])
        if self.multiples.max(initial=1) == 1:
            less[gone] = False
            return self.units.close(less)
        owner = np.searchsorted(self.starts, gone, side="right") - 1
        by_group = gone[np.argsort(owner, kind="stable")]
        counts = np.bincount(owner, minlength=len(self.starts))
        begins = np.cumsum(counts) - counts
        for number in np.flatnonzero(counts):
            multiple = self.multiples[number]
            alive = int(keep[self.units.groups[number].units].sum())
            kept = -(-(alive - counts[number]) // multiple) * multiple
            less[by_group[begins[number] : begins[number] + max(alive - kept, 0)]] = False
        return self.units.close(less)


def losers(units: Units, scores: Scores, may_go: Mask) -> Mask:
    """`may_go` with one sibling of each pair at most: the least important of those that may.

    Who wins, or stands alone, goes only with the unit that it is left of.
    """
    lose = may_go.copy()
    for pairs in units.pairs:
        group, own = pairs.group, np.arange(len(pairs.second))
        value = np.where(may_go[group.units], scores[group.units], np.inf)
        least = np.where(value[own] < value[pairs.second], own, pairs.second)
        lose[group.units] = False
        lose[group.start + least[(own != pairs.second) & np.isfinite(value[least])]] = True
    return lose


def floor(units: Units, scores: Scores, may_go: Mask, min_channels: int) -> tuple[Mask, Mask]:
    """Units that must stay so that no width falls below `min_channels`: always, or with their block.

    The best of each group of channels; then, for each reader that selects, its best edges to channels
    that stay anyway, or else its best edges with their channels. The outputs of a block that stay only
    for its own width are in the second mask: they may go when the whole block goes.
    """
    fixed, spare = (np.zeros(units.size, dtype=bool) for _ in range(2))
    bound = ~may_go
    for group in units.groups:
        if group.kind in ("stream", "bottleneck"):
            mine = spare if units.output_of[group.start] >= 0 else fixed
            mine[_best(group, scores, bound, min_channels)] = True
    for selection in units.selections:
        edges, sources = selection.edges, selection.sources

        def stays(source: Indices) -> Indices:
            held = (source == STAYS) | fixed[source] | bound[source]
            return np.where(held, 2, spare[source])

        # An edge outranks another whose channel may go sooner, or that may itself go.
        if selection.sides is not None:
            # Of a pair the side counts that may not go, and whose channel stays longer.
            sides, own = selection.sides, np.arange(edges.size)
            rank = np.empty(sides.group.size)
            by = (scores[sides.group.units], stays(sources))
            held = np.where(fixed | bound, 2, spare)[sides.group.units]
            rank[np.lexsort((*by, held))] = np.arange(len(rank))
            sources = sources[np.where(rank[own] > rank[sides.second], own, sides.second)]
        order = np.lexsort((scores[edges.units], stays(sources)))
        best = order[::-1][:min_channels]
        fixed[edges.start + best] = True
        needed = sources[best]
        fixed[needed[needed != STAYS]] = True
    for group in units.groups:
        if group.kind in ("stream", "bottleneck") and units.output_of[group.start] < 0:
            _keep_read(units, group, scores, bound, fixed, min_channels)
    return fixed, spare & ~fixed


def _keep_read(
    units: Units, group: Group, scores: Scores, bound: Mask, fixed: Mask, count: int
) -> None:
    """Fix edges to `count` units of a group, so that channels which stay for its width are read."""
    stays = fixed | bound
    read = units.is_read.copy()
    held = stays[units.reads] & (units.source != STAYS)
    read[units.source[held]] = True
    missing = min(count, group.size) - np.count_nonzero((stays & read)[group.units])
    unread = group.start + np.flatnonzero((fixed & ~read)[group.units])
    for unit in unread[np.argsort(-scores[unread], kind="stable")][: max(missing, 0)]:
        edges = units.reads[units.source == unit]
        fixed[edges[np.argmax(scores[edges])]] = True


def _best(group: Group, scores: Scores, stays: Mask, count: int) -> Indices:
    """The `count` units of a group to keep: those that stay anyway, then the most important."""
    order = np.lexsort((scores[group.units], stays[group.units]))[::-1]
    best: Indices = group.start + order[:count]
    return best


def quantiles(units: Units, scores: Scores) -> Scores:
    """Each unit's rank within its group, in (0, 1): the same share goes everywhere."""
    value = np.empty(units.size)
    for group in units.groups:
        order = np.argsort(scores[group.units], kind="stable")
        value[group.start + order] = (np.arange(group.size) + 0.5) / max(group.size, 1)
    return value


def shares(units: Units, scores: Scores, may_go: Mask) -> Scores:
    """Each unit's share of the mean score of those of its group that may go."""
    value = np.zeros(units.size)
    for group in units.groups:
        mine = scores[group.units]
        mean = mine[may_go[group.units]].mean() if may_go[group.units].any() else 1.0
        value[group.units] = mine / max(mean, np.finfo(np.float64).tiny)
    return value


def _unreachable(budget: Budget, amounts: tuple[float, float, float], others: str) -> BudgetError:
    """The error for a target below the least; `amounts` are those of the whole net, target, least."""
    whole, target, least = (amount + budget.rest for amount in amounts)
    digits = 0 if float(whole).is_integer() else 3
    stays = f" ({budget.stays})" if budget.stays else ""
    return BudgetError(
        f"cannot bring {budget.unit} from {whole:,.{digits}f} down to {target:,.{digits}f}: the least that "
        f"min_channels={budget.min_channels}, round_to={budget.round_to}, {others} allow is "
        f"{least:,.{digits}f} ({1 - least / whole:.1%} fewer){stays}; ask for less, or allow more"
    )
