"""The process's defaults for new tensors, which a caller may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU, unless told otherwise, as PyTorch does by itself.

    What is computed then follows from the model and the data, not from `torch.set_default_dtype` or
    `torch.set_default_device`. Also a decorator.

    >>> with usual_defaults():
    ...     torch.zeros(1).dtype
    torch.float32
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield
