"""MFM, Max-Feature-Map: a fixed competition between feature maps (Light CNN, arXiv:1511.02683)."""

from __future__ import annotations

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
    if kind not in MFM_KINDS:
        raise ConfigError(f"mfm kind {kind!r} is unknown; choose one of {', '.join(MFM_KINDS)}")
    siblings = MFM_KINDS[kind][0]
    if x.shape[1] % siblings:
        raise ConfigError(
            f"mfm {kind} needs a multiple of {siblings} channels, not {x.shape[1]}; "
            "cut whole units (c, c+n) only"
        )
    first, second, *rest = x.chunk(siblings, dim=1)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    if not rest:
        return high
    third = rest[0]
    median = torch.maximum(low, torch.minimum(high, third))
    return torch.cat([torch.maximum(high, third), median], dim=1)


class MaxFeatureMap(nn.Module):
    """`max_feature_map` as a layer."""

    def __init__(self, kind: str = "2/1") -> None:
        super().__init__()
        if kind not in MFM_KINDS:
            raise ConfigError(f"mfm kind {kind!r} is unknown; choose one of {', '.join(MFM_KINDS)}")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return max_feature_map(x, self.kind)

    def extra_repr(self) -> str:
        return repr(self.kind)
