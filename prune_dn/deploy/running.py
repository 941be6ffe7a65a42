"""A deployed file that is open: arrays in, arrays out, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prune_dn.errors import ExportError

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]  # None: any number


@dataclass(frozen=True)
class Running:
    """`run` takes one array for each of `inputs`, in their order; `shapes` are theirs, `label` names who runs it."""

    inputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    run: Callable[[Sequence[Array]], list[Array]]
    label: str


def arrays(inputs: Any) -> list[Array]:
    """The tensors in `inputs` as arrays, floating-point ones in float32."""
    found = [x.detach().cpu() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return [(x.float() if x.is_floating_point() else x).numpy() for x in found]


def answers(running: Running, inputs: Any, names: Sequence[str]) -> list[Tensor]:
    """What the file answers the tensors in `inputs`, called `names`; it may not need them all.

    Raises ExportError, with what the runtime says, where it does not run on them.
    """
    given = dict(zip(names, arrays(inputs), strict=True))
    try:
        found = running.run([given[name] for name in running.inputs])
    except Exception as error:  # each runtime has its own
        shapes = ", ".join(str(x.shape) for x in given.values())
        raise ExportError(f"it does not run on inputs of shape {shapes}: {error}") from error
    return [torch.from_numpy(np.array(x)) for x in found]
