"""MFM, Max-Feature-Map: a fixed competition between feature maps (Light CNN, arXiv:1511.02683)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prune_dn.errors import ConfigError

# kind -> (siblings that compete, survivors). A unit is the tuple (c, c+n[, c+2n]).
MFM_KINDS: dict[str, tuple[int, int]] = {"2/1": (2, 1), "3/2": (3, 2)}


def max_feature_map(x: Tensor, kind: str = "2/1") -> Tensor:
    """Let each `n`-th channel compete with its siblings.

    `2/1`: (N, 2n, ...) -> (N, n, ...), out[c] = max(x[c], x[c+n]).
    `3/2`: (N, 3n, ...) -> (N, 2n, ...), out[c] = maximum and out[c+n] = median of
    x[c], x[c+n], x[c+2n].

    Raises ConfigError for an unknown kind or a channel count that is no multiple of the siblings.

    >>> x = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    >>> max_feature_map(x).tolist()
    [[3.0, 5.0]]
    """
    siblings = siblings_of(kind)
    if x.shape[1] % siblings:
        raise ConfigError(
            f"mfm {kind} needs a multiple of {siblings} channels, not {x.shape[1]}; "
            "cut whole units (c, c+n) only, or let MaxFeatureMap know which siblings went"
        )
    first, second, *rest = x.chunk(siblings, dim=1)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    if not rest:
        return high
    third = rest[0]
    median = torch.maximum(low, torch.minimum(high, third))
    return torch.cat([torch.maximum(high, third), median], dim=1)


def siblings_of(kind: str) -> int:
    """How many channels compete in a unit. Raises ConfigError for an unknown kind."""
    if kind not in MFM_KINDS:
        raise ConfigError(f"mfm kind {kind!r} is unknown; choose one of {', '.join(MFM_KINDS)}")
    return MFM_KINDS[kind][0]


class MaxFeatureMap(nn.Module):
    """`max_feature_map` as a layer, also where some siblings were cut.

    `units` and `alone` are for 2/1 with losers cut: of `units` units those in `alone` (rising) have
    one filter left, whose map passes unchanged: a maximum over one. The input then has
    2 * units - len(alone) channels: the first of each unit, then the seconds of those that have one.

    >>> some = MaxFeatureMap("2/1", units=3, alone=(1,))
    >>> some(torch.tensor([[1.0, -5.0, 3.0, 2.0, 0.0]])).tolist()
    [[2.0, -5.0, 3.0]]
    """

    rivals: Tensor | None

    def __init__(self, kind: str = "2/1", *, units: int = 0, alone: tuple[int, ...] = ()) -> None:
        super().__init__()
        if siblings_of(kind) != 2 and alone:
            raise ConfigError(f"mfm {kind}: siblings cannot be cut alone, only whole units")
        self.kind, self.units, self.alone = kind, units, alone
        rivals = None
        if alone:
            # Where the second of each unit lies; who stands alone competes with itself.
            # The index is no weight: nothing loads it later, so it is real even in a model on "meta".
            device = "cpu" if torch.get_default_device().type == "meta" else None
            rivals = torch.arange(units, device=device)
            paired = torch.ones(units, dtype=torch.bool, device=device)
            paired[list(alone)] = False
            rivals[paired] = units + torch.arange(units - len(alone), device=device)
        self.register_buffer("rivals", rivals, persistent=False)

    def survivors(self, channels: int) -> int:
        """How many channels leave where `channels` compete."""
        siblings, survivors = MFM_KINDS[self.kind]
        return self.units if self.alone else channels // siblings * survivors

    def forward(self, x: Tensor) -> Tensor:
        if self.rivals is None:
            return max_feature_map(x, self.kind)
        return torch.maximum(x[:, : self.units], x.index_select(1, self.rivals))

    def extra_repr(self) -> str:
        return repr(self.kind) + (
            f", {len(self.alone)} of {self.units} alone" if self.alone else ""
        )


Indices = npt.NDArray[np.int64]


def operands_of(filters: Indices, kind: str, alone: tuple[int, ...]) -> Indices:
    """The operands of each unit, (siblings, units), of the `filters` of a layer under MFM.

    A unit that stands alone competes with itself.

    >>> operands_of(np.arange(5), "2/1", (1,)).tolist()
    [[0, 1, 2], [3, 1, 4]]
    """
    siblings = siblings_of(kind)
    if not alone:
        return filters.reshape(siblings, -1)
    units = (len(filters) + len(alone)) // siblings
    second = filters[:units].copy()
    second[np.delete(np.arange(units), alone)] = filters[units:]
    return np.stack([filters[:units], second])


def owners(units: int, paired: Indices) -> Indices:
    """The unit of each operand: the first of each unit, then the second of those that are `paired`."""
    return np.concatenate([np.arange(units), paired])


def maps_left(
    maps: int, kind: str | None, alone: tuple[int, ...], kept: Indices
) -> tuple[Indices, str | None, tuple[int, ...]]:
    """The result of filters that stay, of `maps`: the maps, the MFM, and its units that stand alone.

    `kept` are filters in their new order: of each unit the first that stays, then the seconds. There is
    no MFM when all units stand alone.

    >>> maps_left(3, "2/1", (1,), np.array([0, 4, 1]))
    (array([0, 2, 1]), None, ())
    """
    if kind is None:
        return kept, None, ()
    siblings, survivors = MFM_KINDS[kind]
    units = maps // survivors
    if siblings == 3:
        left = kept[: len(kept) // siblings]
        return (np.arange(survivors)[:, None] * units + left).ravel(), kind, ()
    owner = owners(units, np.delete(np.arange(units), alone))[kept]
    left = owner[: len(np.unique(owner))]
    single = np.flatnonzero(np.bincount(owner, minlength=units)[left] == 1)
    return (left, None, ()) if len(single) == len(left) else (left, kind, tuple(single.tolist()))
