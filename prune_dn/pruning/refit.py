"""Refit a pruned net of any kind from front to back, in one pass of the images through it.

The dense net runs first, in batches, and leaves for each layer its outputs at some positions and for
each norm the mean of its input. Then all images pass through the pruned net at once. Just before a
layer runs it is refitted: its inputs come from the pruned net as it is by then, its targets from the
dense net (ThiNet, arXiv:1707.06342; channel pruning, arXiv:1707.06168). Where its output is an operand
of a sum, it is refitted once more when the sum is made, so that the sum is what the dense net's is: what the
other operand lacks is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.data.batches import joined, rows_of
from prune_dn.graph.inference import call
from prune_dn.graph.selecting import selected
from prune_dn.models.examples import batch_size, for_net
from prune_dn.pruning.calibration import PixelSampler
from prune_dn.pruning.least_squares import Moments, solve
from prune_dn.pruning.patches import (
    at_positions,
    is_fitted,
    kernel_matrix,
    patches_of,
    set_kernel_matrix_,
)
from prune_dn.pruning.slices import bytes_of, bytes_to_answer, fresh, in_slices, slices
from prune_dn.pruning.sums import AtSums, Summand, find_summands, unseen


@dataclass
class _Seen:
    """What the dense net did in one layer: how often it ran, where it was looked at, its outputs."""

    calls: int = 0
    positions: list[Tensor | None] = field(default_factory=list)  # (N, Q) each; None = all
    targets: list[Tensor] = field(default_factory=list)  # (rows, outputs that stay) each
    sums: list[Tensor] = field(default_factory=list)  # of the sum that takes the output, the same
    read: tuple[Tensor, int] | None = None  # what the pruned layer read, and its version


def refit_(
    small: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    shiftable: Collection[str],
    batches: Sequence[Any],
    *,
    rivals: Mapping[str, Tensor] | None = None,
    weights: bool = True,
    seed: int = 0,
) -> None:
    """Give the layers of `small` weights with which they make nearly what those of `dense` make.

    `kept` are the outputs of `dense` that are left, by layer, in their new order (absent = all).
    What a layer of `shiftable` makes on average goes through norms or its own bias, so that only
    differences from the mean have to be fitted. With `weights` False only means are moved: into norms'
    running means and biases. `rivals` are, for layers under MFM, the output of `dense` with which each of `kept`
    competed where that went, or itself: it is refitted to the larger of both. A layer that runs several times in one forward stays as it is. An operand of a
    sum (see `find_summands`) is fitted to what the sum lacks, so that it also makes up for the other operand.

    Both nets are in eval mode; `small` is changed in place. `batches` are inputs of the dense net. Memory: all
    images' live feature maps in `small`, and for each layer the dense outputs at about max(4096, twice its inputs * taps) positions.
    """
    batches = [for_net(x, dense) for x in batches]
    count, needs = sum(map(batch_size, batches)), bytes_to_answer(dense, batches[0])
    samplers: dict[str, PixelSampler] = {}  # one each: how images are batched makes no difference
    seen: dict[str, _Seen] = {}
    means: dict[str, Tensor] = {}
    done: set[str] = set()
    fitted: set[str] = set()
    sums: dict[int, Summand] = {}
    is_first = True

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            entry = seen.setdefault(name, _Seen())
            entry.calls += is_first
            if entry.calls == 1:
                drawn = seed + len(samplers)
                where = samplers.setdefault(name, PixelSampler(count, drawn))(layer, output)
                rows = at_positions(layer, output, where)
                entry.positions.append(where)
                left = rows[:, kept[name]] if name in kept else rows
                if rivals is not None and name in rivals:
                    left = torch.maximum(left, rows[:, rivals[name]])
                entry.targets.append(left)

        return hook

    def add_mean(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
            share = _mean(norm, args[0]) * (len(args[0]) / count)
            means[name] = means[name] + share if name in means else share

        return hook

    def fit(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen and seen[name].calls == 1 and name not in fitted:
                fitted.add(name)
                entry = seen[name] if name in summed else seen.pop(name)
                _fit_layer_(layer, args[0], entry, count, name in shiftable, weights)
                entry.read, entry.targets = (args[0], args[0]._version), []

        return hook

    def move(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
            if name in means and name not in done:
                done.add(name)
                wanted = means[name][kept[name]] if name in kept else means[name]
                mean = norm.get_buffer("running_mean")
                mean.add_((_mean(norm, args[0]) - wanted).to(mean.dtype))

        return hook

    def look_at_sum(number: int, operands: tuple[Tensor, Tensor]) -> None:
        if number in sums and seen[sums[number].layer].calls == 1:
            name = sums[number].layer
            rows = _of_sum(dense.get_submodule(name), operands, seen[name].positions[-1])
            seen[name].sums.append(rows[:, kept[name]] if name in kept else rows)

    def fit_sum(number: int, operands: tuple[Tensor, Tensor]) -> None:
        if number in sums and (entry := seen.pop(sums[number].layer, None)) is not None:
            _fit_sum_(small, sums[number], operands, entry, count)

    left = dict(small.named_modules())  # a block that went whole is not among them
    both = [(name, module) for name, module in dense.named_modules() if name in left]
    layers = {name: m for name, m in both if is_fitted(m)}
    norms = {name: m for name, m in both if isinstance(m, _BatchNorm) and m.track_running_stats}
    if weights:
        sums = find_summands(dense, layers, fresh(rows_of(batches[0], slice(0, 1))))
    summed = {summand.layer for summand in sums.values()}
    with torch.no_grad(), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(unseen(look(name))).remove)
            stack.callback(left[name].register_forward_pre_hook(unseen(fit(name))).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(unseen(add_mean(name))).remove)
            stack.callback(left[name].register_forward_pre_hook(unseen(move(name))).remove)
        for part in (part for x in batches for part in in_slices(x, needs)):
            with AtSums(look_at_sum):
                call(dense, fresh(part))
            is_first = False
        with AtSums(fit_sum):
            call(small, joined(batches))


def _fit_layer_(
    layer: nn.Module, x: Tensor, entry: _Seen, count: int, shiftable: bool, weights: bool
) -> None:
    """Fit weight and bias to what the layer lacks of the dense net's outputs, group by group."""
    rows = _rows(layer, x, entry)
    targets = _wide(torch.cat(entry.targets))
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if bias is not None:
        targets = targets - _wide(bias)
    matrix = _wide(kernel_matrix(layer))
    lacks = targets - torch.cat(
        [p @ w for p, w in zip(_by_group(rows, len(matrix)), matrix, strict=True)], 1
    )
    change, left = _solved(matrix, rows, lacks, count, shiftable or bias is not None, weights)
    set_kernel_matrix_(layer, (matrix + change).to(layer.get_parameter("weight").dtype))
    if bias is not None:
        bias.add_(left.to(bias.dtype))


def _fit_sum_(
    net: nn.Module,
    summand: Summand,
    operands: tuple[Tensor, Tensor],
    entry: _Seen,
    count: int,
) -> None:
    """Fit the layer of an operand to what the sum lacks, and give the operand its new values."""
    layer = net.get_submodule(summand.layer)
    norm = None if summand.norm is None else net.get_submodule(summand.norm)
    if entry.read is None or len(entry.sums) != len(entry.positions):
        return
    x, version = entry.read
    if x._version != version:  # something wrote over what the layer read
        return
    positions = [where for where in entry.positions if where is not None]
    total = _of_sum(layer, operands, torch.cat(positions) if positions else None)
    lacks = _wide(torch.cat(entry.sums)) - _wide(total)
    matrix = _wide(kernel_matrix(layer))
    scale = torch.ones_like(lacks[0])
    if norm is not None:
        assert isinstance(norm, _BatchNorm) and norm.running_var is not None
        scale = _wide(norm.running_var).add(norm.eps).rsqrt()
        scale = scale * _wide(norm.weight) if norm.affine else scale
    bias = layer.bias if norm is None else norm.bias
    rows = _rows(layer, x, entry)
    change, left = _solved(matrix, rows, lacks, count, bias is not None, True)
    used = scale.abs() > 1e-3 * scale.abs().max()
    per_output = torch.where(used, 1 / scale, 0.0).unflatten(0, (len(matrix), 1, -1))
    set_kernel_matrix_(
        layer, (matrix + change * per_output).to(layer.get_parameter("weight").dtype)
    )
    if isinstance(bias, Tensor):
        bias.add_(left.to(bias.dtype))
    operand = operands[summand.position]
    for part in slices(len(x), 4 * bytes_of(operand)):
        again = layer.forward(x[part])
        operand[part] = again if norm is None else norm.forward(again)


def _of_sum(layer: nn.Module, operands: tuple[Tensor, Tensor], positions: Tensor | None) -> Tensor:
    """What a sum is at positions of the output of `layer`."""
    first, second = (at_positions(layer, x, positions) for x in operands)
    return first + second


def _rows(layer: nn.Module, x: Tensor, entry: _Seen) -> Tensor:
    some = [where for where in entry.positions if where is not None]
    positions = torch.cat(some) if some else None
    parts = [
        _wide(patches_of(layer, x[part], None if positions is None else positions[part]))
        for part in slices(len(x), 2 * bytes_of(x))
    ]
    return torch.cat(parts)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_group(rows: Tensor, groups: int) -> tuple[Tensor, ...]:
    return rows.unflatten(1, (groups, -1)).unbind(1)


def _solved(
    matrix: Tensor, rows: Tensor, lacks: Tensor, count: int, centred: bool, weights: bool
) -> tuple[Tensor, Tensor]:
    """The change of the kernel matrix that makes up for what is lacking, and what is left on average.

    `rows` of `count` images are what is read and `lacks` the outputs to be made. Images in turn are the
    halves of which one is fitted and one judges the ridge.
    """
    odd = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count) % 2 == 1
    changes, left = [], []
    parts = (_by_group(rows, len(matrix)), _by_group(lacks, len(matrix)), matrix)
    for p, y, weight in zip(*parts, strict=True):
        halves = [Moments(weight.T, weights), Moments(weight.T, weights)]
        for half, mine in zip(halves, (~odd, odd), strict=True):
            half.add(p[mine], y[mine])
        both = halves[0] + halves[1]
        change = torch.zeros_like(weight, dtype=torch.float64)
        if weights:
            change = solve(halves, both, centred=centred)
        changes.append(change)
        left.append(both.output - both.input @ change)
    return torch.stack(changes), torch.cat(left)


def _mean(norm: nn.Module, x: Tensor) -> Tensor:
    """Of each channel that a norm normalises, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in slices(len(x), 3 * bytes_of(x)):
        found = selected(norm, x[part]).double()
        total = total + found.sum([d for d in range(x.ndim) if d != 1])
    return total / (x[:, 0].numel())
