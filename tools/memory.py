"""What a training step keeps for its backward pass: bytes of the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd saves in `forward`, each once, without the parameters.

    Tensors that a recomputation or an autograd function of its own keeps count like any other.
    """
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    found = sum(storage.nbytes() for storage in kept.values())
    del out
    return found
