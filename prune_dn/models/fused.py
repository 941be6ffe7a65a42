"""The compiled kernels of fused.c, where they were built: one pass instead of several.

With PRUNE_DN_KERNELS=0 in the environment they are not used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_ARGUMENTS = {
    "norm_relu": [c_void_p, c_int64, *[c_void_p] * 3, c_int64, c_int64, c_int],
    "backward": [
        *[c_void_p] * 2,
        c_int64,
        *[c_void_p] * 3,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        c_int,
    ],
    "moments": [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int],
    "settle": [c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int64, c_int64, c_int],
}


@functools.cache
def library() -> Any:
    """The kernels, or None where there was no C compiler when prune_dn was installed, or by request."""
    if os.environ.get("PRUNE_DN_KERNELS") == "0":
        return None
    found = importlib.util.find_spec("prune_dn.models._fused")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
    except OSError:  # built for another machine, or PyTorch brings no libgomp
        return None
    for name, arguments in _ARGUMENTS.items():
        for dtype in _NAMES.values():
            getattr(loaded, f"{name}_{dtype}").argtypes = arguments
    return loaded


def runs(*streams: Tensor) -> bool:
    """Whether the kernels can be used: tensors (N, H, W, C) on the CPU, pixels evenly spaced."""
    return (
        library() is not None
        and streams[0].dtype in _NAMES
        and all(x.device.type == "cpu" and _is_even(x) for x in streams)
    )


def norm_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(x * scale + shift), contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _call("norm_relu", x, x, x.stride(2), scale, shift, out)
    return out


def backward_(
    d: Tensor, x: Tensor, scale: Tensor, shift: Tensor, into: Tensor, sums: Tensor
) -> None:
    """Add scale * d to `into`, and d and d * x to `sums` (2, C) float64, where the ReLU let x pass."""
    _check(_call("backward", d, d, x, x.stride(2), scale, shift, into, into.stride(2), sums))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float32, in one pass."""
    pivot, pixels = x[0, 0, 0].float(), x.shape[:3].numel()
    sums = torch.zeros(2, x.shape[3], dtype=torch.float64)
    _check(_call("moments", x, x, x.stride(2), pivot, sums))
    mean, square = sums / pixels
    return (mean + pivot).float(), (square - mean.square()).clamp_min_(0).float()


def settle(x: Tensor, grad: Tensor, constant: Tensor, by_x: Tensor) -> Tensor:
    """grad - constant - x * by_x, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _call("settle", x, grad, grad.stride(2), x, x.stride(2), constant, by_x, out)
    return out


def _call(name: str, like: Tensor, *arguments: Tensor | int) -> Any:
    rows, cols = like.shape[:3].numel(), like.shape[3]
    threads = max(1, min(torch.get_num_threads(), rows * cols // 16384))
    kernel = getattr(library(), f"{name}_{_NAMES[like.dtype]}")
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return kernel(*given, rows, cols, threads)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the sums over a layer's channels")


def _is_even(x: Tensor) -> bool:
    n, h, w, _ = x.shape
    down, across, along, one = x.stride()
    return one == 1 and (h == 1 or across == w * along) and (n == 1 or down == h * w * along)
