"""Which outputs and inputs of each layer stay, and the tensors that this leaves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prune_dn.pruning.parts import STAYS, Mask, Positions
from prune_dn.pruning.units import Units


class Cut(NamedTuple):
    """The outputs and the inputs of a layer that stay, in their new order; None = all, as they are."""

    outputs: Tensor | None
    inputs: Tensor | None


def cuts(units: Units, keep: Mask) -> dict[str, Cut]:
    """What stays of each layer that a closed `keep` changes."""
    found: dict[str, tuple[Positions | None, Positions | None]] = {}
    for producer in units.graph.producers:
        outputs = units.outputs(producer.layer, producer.channels, keep)
        found[producer.layer] = _changed(outputs, len(producer.channels)), None
    for reader in units.graph.readers:
        inputs = _changed(units.inputs(reader, keep), len(reader.channels))
        found[reader.layer] = found[reader.layer][0], inputs
    behind = {r.select: found[r.layer][1] for r in units.graph.readers if r.stream is not None}
    for follower in units.graph.followers:
        at = units.unit(follower.channels)
        kept = _changed(np.flatnonzero((at == STAYS) | keep[at]), len(at))
        found[follower.layer] = behind.get(follower.layer, kept), None
    return {
        name: Cut(*(None if kept is None else torch.from_numpy(kept) for kept in both))
        for name, both in found.items()
        if any(kept is not None for kept in both)
    }


def fill_(new: nn.Module, old: nn.Module, cut: Cut) -> None:
    """Give a plain convolution, linear layer or norm what stays of another one's tensors."""
    for key, parameter in old._parameters.items():
        if parameter is not None:
            mine = cut if key == "weight" else Cut(cut.outputs, None)
            kept = select(parameter.detach(), mine)
            new._parameters[key] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    for key, buffer in old._buffers.items():
        if buffer is not None:
            new._buffers[key] = select(buffer, Cut(cut.outputs if buffer.ndim else None, None))


def select(tensor: Tensor, cut: Cut) -> Tensor:
    """A copy of the named rows and columns, in the memory format of `tensor`."""
    out = tensor
    for dim, index in enumerate(cut):
        if index is not None and dim < tensor.ndim:
            out = out.index_select(dim, index.to(tensor.device))
    if tensor.ndim == 4 and not tensor.is_contiguous():
        return out.clone(memory_format=torch.channels_last)
    return out.clone() if out is tensor else out


def _changed(kept: Positions, width: int) -> Positions | None:
    return None if np.array_equal(kept, np.arange(width)) else kept
