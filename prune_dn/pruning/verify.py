"""Whether the pruned net equals the given one with masks where layers read what was cut."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prune_dn.errors import ConversionError, PruningError
from prune_dn.graph import call, tensors, to_inference_
from prune_dn.pruning.cuts import cut_net, cuts
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.subject import Subject
from prune_dn.pruning.units import Units

# What may be rounding, as a share of the largest answer: in float64 half of the digits, in float32
# what some hundred roundings make.
_ROUNDING = torch.finfo(torch.float64).eps ** 0.5
_ROUNDING_OF_FLOATS = 100 * torch.finfo(torch.float32).eps


def check_exact(subject: Subject, units: Units, keep: Mask) -> None:
    """Raise PruningError where cutting is not masking, with the cuts that break it alone."""
    modes = {False, subject.has_branches}

    def exact(some: Mask) -> bool:
        return all(is_exact(subject, units, some, branches=mode) for mode in modes)

    if exact(keep):
        return
    wrong = []
    for group in units.groups:
        alone = np.ones_like(keep)
        alone[group.units] = keep[group.units]
        if not alone.all() and not exact(units.close(alone)):
            wrong.append(group.name.partition(" (part")[0])
    wrong = list(dict.fromkeys(wrong))
    raise PruningError(
        "the pruned net would not equal the masked one: what the model does with the outputs "
        f"of {', '.join(wrong) or 'several layers together'} depends on their number or order "
        "(a fixed view, a width that the code remembers, an operation whose rule does not fit); "
        f"leave those layers as they are{f': protect={wrong}' if wrong else ''}"
    )


def is_exact(subject: Subject, units: Units, keep: Mask, *, branches: bool = False) -> bool:
    """Whether cutting equals masking what layers read, on the example; on the CPU, in float64.

    In float32, with a warning, where the net cannot run in float64.
    """
    try:
        return _is_exact(subject, units, keep, torch.float64, branches)
    except RuntimeError as error:
        exact = _is_exact(subject, units, keep, torch.float32, branches)
        warnings.warn(
            f"this {type(subject.model).__name__} cannot run in float64 ({error}); that the pruned net "
            "equals the masked one was checked in float32",
            stacklevel=2,
        )
        return exact


def _is_exact(
    subject: Subject, units: Units, keep: Mask, dtype: torch.dtype, branches: bool
) -> bool:
    dense = to_inference_(copy.deepcopy(subject.model).cpu().to(dtype), branches=branches)
    readers = {reader.layer: reader for reader in units.graph.readers}
    for name, cut in cuts(units, keep).items():
        if name in readers and cut.inputs is not None:
            layer = dense.get_submodule(name)
            gone = torch.ones(len(readers[name].channels), dtype=torch.bool)
            gone[cut.inputs] = False
            axes = 0 if isinstance(layer, nn.Linear) else layer.get_parameter("weight").ndim - 2
            gone = gone.view(-1, *[1] * axes)
            layer.register_forward_pre_hook(lambda _, x, gone=gone: x[0].masked_fill(gone, 0))
    example = tree_map(lambda x: x.to(dtype) if _is_real(x) else x, subject.inputs)
    try:
        small = cut_net(subject, units, keep).cpu().to(dtype)
    except ConversionError:  # widths that do not fit each other
        return False
    small = to_inference_(small, branches=branches)
    with torch.no_grad():
        with _Narrowing() as narrowing:
            wanted = tensors(call(dense, example))
        try:
            pairs = list(zip(wanted, tensors(call(small, example)), strict=True))
        except (RuntimeError, ValueError, IndexError):
            return False
    double = dtype == torch.float64 and not narrowing.found
    rounding = _ROUNDING if double else _ROUNDING_OF_FLOATS
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= rounding * a.abs().max())
        for a, b in pairs
    )


class _Narrowing(TorchDispatchMode):
    """Notes whether any operation gives a narrower floating-point type than float64, which it took."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x.dtype != torch.float64 for x in tensors(out)):
            self.found |= any(x.dtype == torch.float64 for x in tensors(args))
        return out


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
