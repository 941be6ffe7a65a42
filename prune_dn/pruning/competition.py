"""Who wins a Max-Feature-Map, how often and by how much."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.models.dense_net import ReadStream
from prune_dn.models.mfm import MaxFeatureMap, siblings_of


def competition(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """`wins` and `margins` of each sibling in the input `x` of an MFM or a competing reader.

    (N, C, H, W) or (N, C) -> (siblings,) each, means over pixels, summed over images, in the order of
    the MFM's channels; of a reader the first of each pair, then the others. A sibling's margin is what it
    has above the least of its unit: what the sum of the survivors loses when it goes. It wins where
    it survives; of t equal ones at the end of the rank each wins 1 - 1/t. Who stands alone always
    wins, with a margin of 0.

    >>> x = torch.tensor([3.0, 1.0, 2.0, 5.0]).reshape(1, 4, 1, 1)
    >>> {key: value.tolist() for key, value in competition(MaxFeatureMap("2/1"), x).items()}
    {'wins': [1.0, 0.0, 0.0, 1.0], 'margins': [1.0, 0.0, 0.0, 4.0]}
    """
    units, second = _units(module, x[:, :, None, None] if x.ndim == 2 else x)
    least = units.amin(1, keepdim=True)
    tied = units == least
    wins = (1 - tied / tied.sum(1, keepdim=True)).mean((3, 4)).sum(0)
    margins = (units - least).mean((3, 4)).sum(0)
    if second is not None:
        # Pairs: the second of one that stands alone is the first.
        alone = second == torch.arange(len(second), device=second.device)
        wins[:, alone] = len(x)
        return {
            key: torch.cat([value[0], value[1][~alone]])
            for key, value in (("wins", wins), ("margins", margins))
        }
    return {"wins": wins.flatten(), "margins": margins.flatten()}


def _units(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(N, siblings, units, H, W), and where pairs may stand alone: which is second, counted from
    the firsts."""
    if isinstance(module, ReadStream) and module.rival_indices is not None:
        leads, rivals = module.input_indices, module.rival_indices
        assert leads is not None
        own = torch.arange(len(leads), device=leads.device)
        pair = torch.stack([x.index_select(1, leads), x.index_select(1, rivals)], 1)
        return pair, torch.where(leads == rivals, own, -1)
    if isinstance(module, MaxFeatureMap) and module.rivals is not None:
        firsts = x[:, : module.units]
        return torch.stack([firsts, x.index_select(1, module.rivals)], 1), module.rivals
    if isinstance(module, MaxFeatureMap):
        return x.unflatten(1, (siblings_of(module.kind), -1)), None
    raise PruningError(f"a {type(module).__name__} lets nothing compete: it has no MFM")
