"""Nets in half precision are trained in float32: an update is smaller than their rounding."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from prune_dn.base.sound import find_unsound

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(*models: nn.Module | None) -> Iterator[None]:
    """Weights and buffers in half precision are float32 inside, and afterwards what they were.

    A model stays in float32, with a warning, where float16 cannot hold one of its numbers.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None:
                stack.enter_context(_in_float32(model))
        yield


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    kept = {name: x.dtype for name, x in _tensors(model) if x.dtype in HALF}
    if kept:
        model._apply(lambda x: x.float() if x.dtype in HALF else x)
    try:
        yield
    finally:
        rounded = [(name, x, x.data.to(kept[name])) for name, x in _tensors(model) if name in kept]
        overflow = find_unsound((name, new) for name, x, new in rounded if bool(x.isfinite().all()))
        if overflow is None:
            for _, old, new in rounded:
                old.data = new
        else:
            warnings.warn(
                f"the model stays in float32: in {rounded[0][2].dtype} {overflow}", stacklevel=3
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
