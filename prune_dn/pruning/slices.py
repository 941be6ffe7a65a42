"""Batches in slices, so that the feature maps of one fit into a stated memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_dn.data.batches import rows_of, run_on
from prune_dn.models.examples import batch_size

MEMORY = 2**30  # bytes of feature maps that are held at a time, for what is not needed as a whole


def slices(rows: int, bytes_of_a_row: int) -> Iterator[slice]:
    """Slices of `rows` rows that take at most MEMORY each, or are of one row.

    >>> list(slices(5, MEMORY // 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, min(rows, MEMORY // max(bytes_of_a_row, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def in_slices(inputs: Any, bytes_of_a_row: int) -> list[Any]:
    """The inputs of a batch in parts that take at most MEMORY each."""
    some = list(slices(batch_size(inputs), bytes_of_a_row))
    return [inputs] if len(some) == 1 else [rows_of(inputs, index) for index in some]


def fresh(inputs: Any) -> Any:
    """Copies of the tensors, for a forward that may write over what it gets."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def bytes_of(x: Tensor) -> int:
    """The bytes of a row of a tensor."""
    return x.numel() * x.element_size() // max(len(x), 1)


def bytes_to_answer(net: nn.Module, inputs: Any) -> int:
    """About how much memory the maps of one example take in a forward without gradients.

    Four of the largest: what a layer reads and makes, the other operand of a sum, and a copy.
    """
    largest = 0

    def look(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        for x in tree_leaves((args, output)):
            if isinstance(x, Tensor) and x.ndim:
                largest = max(largest, bytes_of(x))

    with ExitStack() as stack, torch.no_grad():
        for module in net.modules():
            stack.callback(module.register_forward_hook(look).remove)
        run_on(net, fresh(rows_of(inputs, slice(0, 1))))
    return 4 * largest


def bytes_to_follow(
    net: nn.Module, inputs: Any, watched: Mapping[str, nn.Module], backward: bool
) -> int:
    """How much memory an example (a batch of one) takes while the inputs and outputs of some layers are held.

    With `backward` also what autograd keeps, and the gradient of each of these outputs.
    """
    held: dict[int, int] = {}
    slopes = 0
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    kept: list[Tensor] = []  # so that no memory is given to another map

    def look(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal slopes
        slopes += bytes_of(output) if backward else 0
        kept.extend((count(args[0]), count(output)))

    def pack(x: Tensor) -> Tensor:
        kept.append(count(x.detach()))
        return kept[-1]

    with ExitStack() as stack:
        for module in watched.values():
            stack.callback(module.register_forward_hook(look).remove)
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
        run_on(net, inputs)
    return sum(held.values()) + slopes
