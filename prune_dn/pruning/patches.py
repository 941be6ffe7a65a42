"""A convolution or linear layer as a matrix product of patches: what each output position reads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def is_fitted(layer: nn.Module) -> bool:
    """Whether a layer is a matrix product of patches in which several inputs meet."""
    if isinstance(layer, Convolution | Transposed):
        return layer.groups < max(layer.in_channels, 2)
    return isinstance(layer, nn.Linear)


def kernel_matrix(layer: nn.Module) -> Tensor:
    """The weight as (groups, inputs of a group * taps, outputs of a group), inputs major.

    `patches @ kernel_matrix` is the output without bias, group by group.
    """
    weight = layer.get_parameter("weight").detach()
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, Transposed):  # (inputs, outputs of a group, *taps)
        weight = weight.flip(tuple(range(2, weight.ndim)))
        return weight.unflatten(0, (groups, -1)).flatten(3).permute(0, 1, 3, 2).flatten(1, 2)
    return weight.unflatten(0, (groups, -1)).flatten(2).transpose(1, 2)


def set_kernel_matrix_(layer: nn.Module, matrix: Tensor) -> None:
    """The inverse of `kernel_matrix`: write the weight."""
    weight = layer.get_parameter("weight")
    taps = tuple(weight.shape[2:])
    with torch.no_grad():
        if isinstance(layer, Transposed):
            found = matrix.unflatten(1, (-1, math.prod(taps))).permute(0, 1, 3, 2)
            found = found.flatten(0, 1).unflatten(-1, taps).flip(tuple(range(2, weight.ndim)))
        else:
            found = matrix.transpose(1, 2).flatten(0, 1).reshape(weight.shape)
        weight.copy_(found)


def taps_of(layer: nn.Module) -> int:
    """Weights for each pair of input and output: 1 for a linear layer."""
    return math.prod(layer.get_parameter("weight").shape[2:])


def patch_width(layer: nn.Module) -> int:
    """How many numbers an output position of one group reads."""
    inputs = int(getattr(layer, "in_features", 0)) or int(getattr(layer, "in_channels", 0))
    return inputs // int(getattr(layer, "groups", 1)) * taps_of(layer)


def output_positions(layer: nn.Module, output: Tensor) -> int:
    """How many positions of one image a layer's output has."""
    return math.prod(output.shape[1:-1] if isinstance(layer, nn.Linear) else output.shape[2:])


def at_positions(layer: nn.Module, output: Tensor, positions: Tensor | None) -> Tensor:
    """The output's values at flat positions (N, Q), None = all: (N * positions, outputs)."""
    last = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    flat = last.reshape(len(output), -1, last.shape[-1])
    if positions is not None:
        flat = flat.gather(1, positions[..., None].expand(-1, -1, flat.shape[-1]))
    return flat.flatten(0, 1)


def patches_of(layer: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
    """What a layer reads at flat output positions (N, Q), None = all.

    (N, C, ...) -> (N * positions, C * taps), inputs major.
    """
    if isinstance(layer, nn.Linear):
        return at_positions(layer, x, positions)
    assert isinstance(layer, Convolution | Transposed)
    stride, dilation, kernel = (
        tuple(getattr(layer, k)) for k in ("stride", "dilation", "kernel_size")
    )
    if isinstance(layer, Transposed):
        x = _spread(x, stride)
        pads = [
            (d * (k - 1) - p, d * (k - 1) - p + extra)
            for d, k, p, extra in zip(
                dilation, kernel, layer.padding, layer.output_padding, strict=True
            )
        ]
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        stride = (1,) * len(stride)
    elif isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    else:
        x = F.pad(x, [p for pad in reversed(layer.padding) for p in (pad, pad)])
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    ]
    n = len(x)
    if positions is None:
        positions = torch.arange(math.prod(sizes), device=x.device).expand(n, -1)
    corners, rest = [], positions
    for size, step in zip(reversed(sizes), reversed(stride), strict=True):
        corners.append(rest % size * step)
        rest = rest // size
    corners.reverse()
    image = torch.arange(n, device=x.device)[:, None]
    last = x.movedim(1, -1)
    taps = []
    for offset in itertools.product(*map(range, kernel)):
        place = [c + o * d for c, o, d in zip(corners, offset, dilation, strict=True)]
        where = (image, *place)
        taps.append(last[where])
    return torch.stack(taps, -1).flatten(0, 1).flatten(1)


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zeros between the pixels: (N, C, H, W) -> (N, C, (H - 1) * stride + 1, ...)."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    pixels: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    wide[pixels] = x
    return wide
