"""From importance to a choice of units that meets a budget exactly, by search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prune_dn.errors import PruningError
from prune_dn.profiling import (
    Cost,
    ImageSize,
    Widths,
    block_pixels,
    cost_rows,
    stem_pixels,
    total,
)
from prune_dn.pruning.importance import Scores
from prune_dn.pruning.units import Group, Mask, Part, Units

Unit = Literal["channels", "params", "macs"]
Scope = Literal["global", "local"]
BUDGET_UNITS: tuple[Unit, ...] = ("channels", "params", "macs")
SCOPES: tuple[Scope, ...] = ("global", "local")


@dataclass(frozen=True)
class Budget:
    """How much must go, of what, counted how."""

    target: float
    unit: Unit
    scope: Scope
    min_channels: int
    round_to: int
    image_size: ImageSize | None


def cost(units: Units, keep: Mask, image_size: ImageSize | None) -> Cost:
    """What the net costs that a closed `keep` leaves."""
    return total(list(cost_rows(units.config, units.widths(keep), image_size)))


def choose(units: Units, scores: Scores, may_go: Mask, budget: Budget) -> Mask:
    """The closed `keep` that cuts the least important units until `budget.target` is reached.

    Units are ranked by importance per cost saved (scope `global`) or by their rank within their
    module (`local`); the shortest prefix of the ranking that leaves at most `target` of
    `budget.unit` is found by bisection, so that the result is within the cost of one unit (of
    `round_to` units) of it. Raises PruningError when even the whole ranking is not enough.
    """
    may_go = may_go & ~floor(units, scores, may_go, budget.min_channels)
    value = _price(units, scores, budget) if budget.scope == "global" else _quantiles(units, scores)
    candidates = np.flatnonzero(may_go)
    ranking = candidates[np.argsort(value[candidates], kind="stable")]
    by_group = _by_group(units, ranking)
    place = np.empty(units.size, dtype=np.intp)
    place[ranking] = np.arange(len(ranking))

    def cut(prefix: int) -> Mask:
        keep = np.ones(units.size, dtype=bool)
        for group in units.groups:
            ordered = by_group[group.start]
            count = int(np.searchsorted(place[ordered], prefix))
            kept = group.size - count
            rounded = -(-kept // budget.round_to) * budget.round_to
            keep[ordered[: max(group.size - rounded, 0)]] = False
        return units.close(keep)

    def remains(prefix: int) -> float:
        return float(getattr(cost(units, cut(prefix), budget.image_size), budget.unit))

    least = remains(len(ranking))
    if least > budget.target:
        raise _unreachable(units, budget, least)
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if remains(middle) <= budget.target else (middle + 1, high)
    return cut(low)


def floor(units: Units, scores: Scores, may_go: Mask, min_channels: int) -> Mask:
    """Units that must stay so that no width falls below `min_channels`.

    First the best of each producer and bottleneck; then, for each reader, its best edges to
    channels that stay anyway, or else its best edges with their channels.
    """
    stay = np.zeros(units.size, dtype=bool)
    for group in units.groups:
        if group.kind != "edge":
            stay[_best(group, scores, stay | ~may_go, min_channels)] = True
    for stream in units.streams:
        carrier = np.zeros(stream.width, dtype=np.intp)
        for part in stream.producers:
            assert part.stream is not None
            carrier[part.made()] = np.arange(
                part.stream.start, part.stream.start + part.stream.size
            )
        for part in stream.readers:
            assert part.edges is not None
            # An edge outranks another whose channel may go, or that may itself go.
            stays = (stay | ~may_go)[carrier[part.positions]]
            order = np.lexsort((scores[part.edges.units], stays))[::-1][:min_channels]
            stay[part.edges.start + order] = True
            stay[carrier[part.positions[order]]] = True
    return stay


def _best(group: Group, scores: Scores, stays: Mask, count: int) -> np.ndarray:
    """The `count` units of a group to keep: those that stay anyway, then the most important."""
    order = np.lexsort((scores[group.units], stays[group.units]))[::-1]
    return group.start + order[:count]


def _by_group(units: Units, ranking: np.ndarray) -> dict[int, np.ndarray]:
    """The ranking split by group, in order, by the group's start."""
    starts = np.array([group.start for group in units.groups])
    order = ranking[np.argsort(np.searchsorted(starts, ranking, side="right"), kind="stable")]
    ends = np.searchsorted(starts, order, side="right")
    bounds = np.searchsorted(ends, np.arange(1, len(starts)), side="right")
    return dict(zip(starts.tolist(), np.split(order, bounds), strict=True))


def _quantiles(units: Units, scores: Scores) -> Scores:
    """Each unit's rank within its group, in (0, 1): the same share goes everywhere."""
    value = np.empty(units.size)
    for group in units.groups:
        order = np.argsort(scores[group.units], kind="stable")
        value[group.start + order] = (np.arange(group.size) + 0.5) / max(group.size, 1)
    return value


def _price(units: Units, scores: Scores, budget: Budget) -> Scores:
    """Importance per cost that the first cut of the unit saves."""
    saved = unit_costs(units, budget.unit, budget.image_size)
    return scores / saved


def unit_costs(units: Units, unit: Unit, image_size: ImageSize | None) -> Scores:
    """What cutting each unit alone saves, in `unit`, with all other units in place."""
    config = units.config
    pixels = block_pixels(config, image_size)
    imagenet = config.stem == "imagenet"
    saved = np.zeros(units.size)
    widths = units.widths(np.ones(units.size, dtype=bool))

    def price(inputs: int, outputs: int, kernel: int, area: int, norms: int) -> int:
        weights = inputs * outputs * kernel * kernel
        return {"channels": norms, "params": weights + 2 * norms, "macs": weights * area}[unit]

    for b, stream in enumerate(units.streams):
        lost = np.zeros(stream.width)
        for part in stream.readers:
            assert part.edges is not None
            edge, narrow = _reading_costs(part, widths[part.name], pixels[b], price)
            saved[part.edges.units] = edge
            lost[part.positions] += edge
            if part.bottleneck is not None:
                saved[part.bottleneck.units] = narrow
        for part in stream.producers:
            group = part.stream
            assert group is not None
            read, bottleneck, _ = widths[part.name]
            if part.is_dense_layer:
                filters = price(bottleneck or read, group.siblings, 3, pixels[b], 0)
            elif b == 0:
                kernel = 7 if imagenet else 3
                filters = price(read, 1, kernel, stem_pixels(config, image_size), int(imagenet))
            else:
                filters = price(read, group.siblings, 1, pixels[b - 1], 0)
            saved[group.units] = filters + lost[part.made()].sum(axis=0)
    return saved


def _reading_costs(
    part: Part, widths: Widths, area: int, price: Callable[[int, int, int, int, int], int]
) -> tuple[int, int]:
    """What one edge, and one bottleneck channel, of a reader saves."""
    read, bottleneck, filters = widths
    if not part.is_dense_layer:
        return price(1, filters, 1, 1 if part.stream is None else area, 1), 0
    if bottleneck is None:
        return price(1, filters, 3, area, 1), 0
    narrow = price(read, 1, 1, area, 1) + price(1, filters, 3, area, 0)
    return price(1, bottleneck, 1, area, 1), narrow


def _unreachable(units: Units, budget: Budget, least: float) -> PruningError:
    whole = getattr(cost(units, np.ones(units.size, dtype=bool), budget.image_size), budget.unit)
    return PruningError(
        f"cannot bring {budget.unit} from {whole:,} down to {budget.target:,.0f}: the least that "
        f"min_channels={budget.min_channels}, round_to={budget.round_to}, the protected units and "
        f"the chosen kinds of unit allow is {least:,.0f} ({1 - least / whole:.1%} fewer); ask for "
        "less, or allow more"
    )
