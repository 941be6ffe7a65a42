"""Refit a pruned net of any kind from front to back, in one pass of the images through it.

The dense net runs first, in batches, and leaves for each layer its outputs at some positions and for
each norm the mean of its input. Then all images pass through the pruned net at once. Just before a
layer runs it is refitted: its inputs come from the pruned net as it is by then, its targets from the
dense net (ThiNet, arXiv:1707.06342; channel pruning, arXiv:1707.06168).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.pruning.calibration import PixelSampler
from prune_dn.pruning.least_squares import Moments, solve
from prune_dn.pruning.patches import (
    at_positions,
    is_fitted,
    kernel_matrix,
    patches_of,
    set_kernel_matrix_,
)


@dataclass
class _Seen:
    """What the dense net did in one layer: how often it ran, where it was looked at, its outputs."""

    calls: int = 0
    positions: list[Tensor | None] = field(default_factory=list)  # (N, Q) each; None = all
    targets: list[Tensor] = field(default_factory=list)  # (rows, outputs that stay) each


def refit_(
    small: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    shiftable: Collection[str],
    images: Sequence[Tensor],
    *,
    weights: bool = True,
    seed: int = 0,
) -> None:
    """Give the layers of `small` weights with which they make nearly what those of `dense` make.

    `kept` are the outputs of `dense` that are left, by layer, in their new order (absent = all).
    What a layer of `shiftable` makes on average goes through norms or its own bias, so that only
    differences from the mean have to be fitted. With `weights` False only means are moved: into norms'
    running means and biases. A layer that runs several times in one forward stays as it is.

    Both nets are in eval mode; `small` is changed in place. Memory: all images' live feature maps in
    `small`, and for each layer the dense outputs at about max(4096, twice its inputs * taps) positions.
    """
    like = next(dense.parameters())
    images = [x.to(like.device, like.dtype) for x in images]
    count = sum(map(len, images))
    sampler = PixelSampler(count, seed)
    seen: dict[str, _Seen] = {}
    means: dict[str, Tensor] = {}
    done: set[str] = set()
    is_first = True

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            entry = seen.setdefault(name, _Seen())
            entry.calls += is_first
            if entry.calls == 1:
                where = sampler(layer, output)
                rows = at_positions(layer, output, where)
                entry.positions.append(where)
                entry.targets.append(rows[:, kept[name]] if name in kept else rows)

        return hook

    def add_mean(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            share = _mean(args[0]) * (len(args[0]) / count)
            means[name] = means[name] + share if name in means else share

        return hook

    def fit(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen and seen[name].calls == 1:
                entry = seen.pop(name)
                _fit_layer_(layer, args[0], entry, count, name in shiftable, weights)

        return hook

    def move(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
            if name in means and name not in done:
                done.add(name)
                wanted = means[name][kept[name]] if name in kept else means[name]
                mean = norm.get_buffer("running_mean")
                mean.add_((_mean(args[0]) - wanted).to(mean.dtype))

        return hook

    layers = {k: m for k, m in dense.named_modules() if is_fitted(m)}
    norms = {
        k: m
        for k, m in dense.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    }
    with torch.no_grad(), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(look(name)).remove)
            stack.callback(small.get_submodule(name).register_forward_pre_hook(fit(name)).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(add_mean(name)).remove)
            stack.callback(small.get_submodule(name).register_forward_pre_hook(move(name)).remove)
        for part in images:
            dense(part)
            is_first = False
        small(torch.cat(images))


def _fit_layer_(
    layer: nn.Module, x: Tensor, entry: _Seen, count: int, shiftable: bool, weights: bool
) -> None:
    """Fit weight and bias to what the layer lacks of the dense net's outputs, group by group."""
    some = [where for where in entry.positions if where is not None]
    rows, targets = (
        patches_of(layer, x, torch.cat(some) if some else None).float(),
        torch.cat(entry.targets).float(),
    )
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if bias is not None:
        targets = targets - bias.float()
    matrix = kernel_matrix(layer).float()
    odd = torch.arange(count, device=x.device).repeat_interleave(len(rows) // count) % 2 == 1
    fitted, left = [], []
    for group, weight in enumerate(matrix):
        p = rows.unflatten(1, (len(matrix), -1))[:, group]
        lacks = targets.unflatten(1, (len(matrix), -1))[:, group] - p @ weight
        halves = [Moments(weight.T, weights), Moments(weight.T, weights)]
        for half, mine in zip(halves, (~odd, odd), strict=True):
            half.add(p[mine], lacks[mine])
        both = halves[0] + halves[1]
        change = torch.zeros_like(weight, dtype=torch.float64)
        if weights:
            change = solve(halves, both, centred=shiftable or bias is not None)
        fitted.append(weight + change)
        left.append(both.output - both.input @ change)
    set_kernel_matrix_(layer, torch.stack(fitted).to(layer.get_parameter("weight").dtype))
    if bias is not None:
        bias.add_(torch.cat(left).to(bias.dtype))


def _mean(x: Tensor) -> Tensor:
    """Of each channel, in float64."""
    return x.double().mean([d for d in range(x.ndim) if d != 1])
