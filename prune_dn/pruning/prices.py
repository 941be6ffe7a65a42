"""The price at which each unit is better gone: estimated harm per cost saved, with what hangs on it.

At a price of p per unit of cost, something stays as long as its going harms more than p times what
it costs. So each unit has one price above which it goes:

- an edge, a bottleneck channel or a sibling: harm / cost; the edges of a connection, where these go
  together, have one price, the sum of their harm / the sum of their cost;
- the first edges that a reader gives up also pay for its gather, so that no edge goes below the
  price at which all that would go by then save more than the gather costs;
- a stream channel: where what its readers would lose no longer pays for its filter. A reader for
  which the edge alone is too dear has given it up by then: sum of max(0, h - p c) = p f;
- a whole layer: where what its channels are worth beyond their own cost no longer pays for its
  upkeep: what it reads, and what it costs however narrow it is. Its channels go by then.

Each sum is convex in p and piecewise linear, so that Newton's steps end at its root. Costs are those
of the net as it stands; after a cut everything is priced anew, for an edge saves less once its
layer's bottleneck is narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prune_dn.graph.types import NONE
from prune_dn.pruning.parts import STAYS, Mask
from prune_dn.pruning.units import Units

Scores = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Active = Callable[[Scores], tuple[Scores, Scores]]


@dataclass(frozen=True)
class Costs:
    """What going saves: each edge, bottleneck channel or filter by itself; each part's fixed costs.

    `reading` is what an edge adds to the upkeep of its block, `upkeep` what a block costs apart from
    its edges and filters, `gather` what the first edge that goes adds. (units,) twice, (blocks,),
    (selections,).
    """

    unit: Scores
    reading: Scores
    upkeep: Scores
    gather: Scores


class Market:
    """The units of a net, who reads and who belongs to whom, and their prices."""

    def __init__(self, units: Units, scores: Scores, may_go: Mask, whole: bool = False) -> None:
        """`scores` of channels are the sums of what all their readers lose; `whole`: connections go whole."""
        self.harm, self.may_go = scores, may_go
        self.units, self.whole = units, whole
        self.lone = may_go & (units.connection == NONE) if whole else may_go  # what goes by itself
        self.channels = np.flatnonzero(units.is_channel)
        # What reads one channel each (an edge, or its sides where they compete), and which of the
        # channels that is; an edge of what cannot go has its own price only.
        number = np.cumsum(units.is_channel) - 1
        self.reads = np.zeros(units.size, dtype=bool)
        self.source = np.zeros(units.size, dtype=np.intp)
        goes = units.source != STAYS
        self.reads[units.reads[goes]] = True
        self.source[units.reads[goes]] = number[units.source[goes]]
        everyone = np.flatnonzero(self.reads)
        by_edges = self._sum(self.source[everyone], scores[everyone], len(self.channels))
        # What readers lose that select nothing.
        rest = scores[self.channels] - by_edges
        rest = np.where(by_edges == 0, rest, np.maximum(rest, 0))
        self.lost = np.where(units.is_read[self.channels], rest, 0.0)
        self.selection = np.full(units.size, -1)  # of each edge
        for n, selection in enumerate(units.selections):
            self.selection[selection.edges.units] = n

    def prices(self, keep: Mask, costs: Costs) -> Scores:
        """The price of each unit by itself, (units,)."""
        price = np.full(len(keep), np.inf)
        alone = keep & self.may_go & ~self.units.is_channel & (costs.unit > 0)
        price[alone] = self.harm[alone] / costs.unit[alone]
        if self.whole:
            tied = np.flatnonzero(alone & (self.units.connection != NONE))
            harm, cost = (self.of_connections(tied, x) for x in (self.harm, costs.unit))
            price[tied] = harm / cost
        edges = np.flatnonzero(keep & (self.selection >= 0))
        if costs.gather.any():
            gathers = self._gathers(edges, costs)
            price[edges] = np.maximum(price[edges], gathers[self.selection[edges]])
        reads = np.flatnonzero(keep & self.reads)
        found = _newton(np.zeros(len(self.channels)), self._worth(reads, costs))
        worth_something = self.saved(keep, costs)[self.channels] > 0
        stays = keep[self.channels] & worth_something
        price[self.channels] = np.where(stays, found, np.inf)
        return price

    def of_connections(self, edges: Indices, values: Scores) -> Scores:
        """For each of these edges the sum of `values`, (units,), over those of its connection."""
        number = self.units.connection[edges]
        return self._sum(number, values[edges], int(number.max(initial=0)) + 1)[number]

    def saved(self, keep: Mask, costs: Costs) -> Scores:
        """What cutting each unit alone saves now; a filter takes its edges with it."""
        reads = np.flatnonzero(keep & self.reads)
        saved = costs.unit.copy()
        saved[self.channels] += self._sum(self.source[reads], costs.unit[reads], len(self.channels))
        return saved

    def block_prices(self, keep: Mask, costs: Costs) -> Scores:
        """The price of each block as a whole, (blocks,); infinite for what cannot go whole."""
        units, count = self.units, len(self.units.blocks) + 1  # the last: of no block
        edges = np.flatnonzero(keep & (self.selection >= 0))
        alive, maker = keep[self.channels], units.output_of[self.channels] % count
        reads = np.flatnonzero(keep & self.reads)
        lone = self.lone[edges]
        harm, cost, reader = self.harm[edges], costs.reading[edges], units.block_of[edges] % count
        worth_at = self._worth(reads, costs)
        fixed = np.append(costs.upkeep, 0.0)

        def active(price: Scores) -> tuple[Scores, Scores]:
            worth, filters = worth_at(price[maker])
            pays = alive & (worth > price[maker] * filters)
            gone = lone & (harm < price[reader] * cost)
            total = self._sum(maker[pays], worth[pays], count)
            total -= self._sum(reader[gone], harm[gone], count)
            upkeep = fixed + self._sum(reader[~gone], cost[~gone], count)
            return total, upkeep + self._sum(maker[pays], filters[pays], count)

        price = _newton(np.zeros(count), active)
        bound = np.bincount(maker, alive & ~self.may_go[self.channels], count) > 0
        price[bound] = np.inf
        return price[:-1]

    def _gathers(self, edges: Indices, costs: Costs) -> Scores:
        """The price below which giving up edges does not pay for the reader's gather."""
        count = len(costs.gather)
        edges = edges[self.may_go[edges] & (costs.unit[edges] > 0)]
        harm, cost, reader = self.harm[edges], costs.unit[edges], self.selection[edges]
        highest = np.zeros(count)
        np.maximum.at(highest, reader, harm / cost)

        def active(price: Scores) -> tuple[Scores, Scores]:
            gone = harm <= price[reader] * cost
            spared = self._sum(reader[gone], cost[gone], count) - costs.gather
            return self._sum(reader[gone], harm[gone], count), spared

        price = _newton(highest, active)
        never = self._sum(reader, cost, count) <= costs.gather
        return np.where(costs.gather > 0, np.where(never, np.inf, price), 0.0)

    def _worth(self, reads: Indices, costs: Costs) -> Active:
        """Per channel at its price: harm and cost of what still reads it, its own included."""
        size, own = len(self.channels), costs.unit[self.channels]
        harm, cost, source = self.harm[reads], costs.unit[reads], self.source[reads]
        lone = self.lone[reads]
        whole = self.lost + self._sum(source, harm, size), own + self._sum(source, cost, size)

        def worth(price: Scores) -> tuple[Scores, Scores]:
            gone = lone & (harm <= price[source] * cost)
            if not gone.any():
                return whole
            read = ~gone
            found = self.lost + self._sum(source[read], harm[read], size)
            return found, own + self._sum(source[read], cost[read], size)

        return worth if lone.any() else lambda price: whole

    @staticmethod
    def _sum(where: Indices, values: Scores, size: int) -> Scores:
        return np.bincount(where, values, size).astype(np.float64, copy=False)


def _newton(price: Scores, active: Active) -> Scores:
    """Roots of harm(p) - p cost(p), each convex and piecewise linear, from one side."""
    for _ in range(100):
        harm, cost = active(price)
        found = np.divide(harm, cost, out=price.copy(), where=cost > 0)
        if np.allclose(found, price, rtol=1e-9, atol=0):
            break
        price = found
    return price
