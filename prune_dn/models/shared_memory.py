"""Training memory that grows linearly with depth: one buffer per dense block, shared statistics.

A naive DenseNet keeps for every reader a copy of the stream, and that copy normalised; what it keeps
grows with the square of depth (arXiv:1707.06990). Here one buffer holds the stream of a block. Each
producer writes its channels once, each reader takes a view. Kept for the backward pass are that
buffer, the bottlenecks' conv outputs (level 1; level 2 computes them again) and statistics.

The batch statistics of a stream channel are the same for all of its readers, so they are computed
once, when the channel is made: as many passes as there are layers, not as there are pairs of layers.
In the backward pass readers add to one gradient of the stream; what the mean and the variance of a
channel owe to all of them together is settled once, when its producer is reached.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.errors import TrainingError
from prune_dn.models.stream_reading import (
    Affine,
    By,
    Debts,
    Moments,
    Reader,
    competed,
    competed_backward_,
    moments_of,
    norm_for,
    read,
    read_backward,
    track_,
)


@dataclass(frozen=True)
class Layer:
    """A dense layer: its reader of the stream, its reader of the bottleneck, where its maps go."""

    first: Reader
    second: Reader | None
    made: slice
    mfm: nn.Module | None
    drop_rate: float


@dataclass(frozen=True)
class Block:
    """A dense block: the channels that come in, its layers, and the reader of the whole stream."""

    width: int
    layers: list[Layer]
    last: Reader
    level: int
    layout: torch.memory_format

    @property
    def whole(self) -> int:
        """How many channels the stream has."""
        return self.layers[-1].made.stop if self.layers else self.width

    @property
    def trains(self) -> bool:
        """Whether any reader of the stream needs the statistics of the batch."""
        return self.last.training or any(layer.first.training for layer in self.layers)


class _BlockFunction(torch.autograd.Function):
    """(N, C, H, W) and parameters -> what the last reader makes of the stream."""

    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, *weights: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if n * h * w == 1 and block.trains:
            raise ValueError(f"batch norm cannot train on one value per channel: {tuple(x.shape)}")
        stream = x.new_empty(n, h, w, block.whole)
        used = [weight if weight.ndim == 1 else weight.to(x.dtype) for weight in weights]
        precise = torch.promote_types(x.dtype, torch.float32)
        mean, var = x.new_zeros(2, block.whole, dtype=precise)
        moments = Moments(mean, var, n * h * w)
        norms: dict[int, Affine] = {}
        own: dict[int, Moments] = {}  # of readers that do not share their statistics
        kept: dict[tuple[int, str], Tensor] = {}

        def write(made: slice, maps: Tensor) -> None:
            stream[..., made] = maps
            if block.trains:
                moments.mean[made], moments.var[made] = moments_of(maps)

        def use(source: Tensor, reader: Reader, of: Moments) -> Tensor:
            if reader.rivals is not None:
                source, reader = competed(source, reader)
                of = own[reader.at] = Moments(*moments_of(source), of.pixels)
            gamma, beta = used[reader.at : reader.at + 2]
            norms[reader.at] = norm_for(reader, gamma, beta, of)
            track_(reader, of)
            return read(source, reader, norms[reader.at], _weight(reader, used))

        write(slice(0, block.width), x.permute(0, 2, 3, 1))
        for number, layer in enumerate(block.layers):
            maps = use(stream, layer.first, moments)
            if layer.second is not None:
                if block.level == 1:
                    kept[number, "bottleneck"] = maps
                of = own[layer.second.at] = Moments(*moments_of(maps), moments.pixels)
                maps = use(maps, layer.second, of)
            if layer.mfm is not None:
                kept[number, "rivals"] = maps
                maps = _compete(layer.mfm, maps)
            if layer.drop_rate:
                noise = _noise(maps, layer.drop_rate, block.layout)
                kept[number, "dropped"] = noise == 0
                maps = maps * noise
            write(layer.made, maps)
        result = use(stream, block.last, moments)
        ctx.save_for_backward(stream, *used, *kept.values())
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.block, ctx.moments, ctx.norms, ctx.own = block, moments, norms, own
        ctx.kept = list(kept)
        return _nchw(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise TrainingError(
                "memory_efficient training has no second derivatives (create_graph=True): set "
                "model.memory_efficient = False"
            )
        block, norms, count = ctx.block, ctx.norms, len(ctx.needs_input_grad) - 2
        stream, *tensors = ctx.saved_tensors
        used, kept = tensors[:count], dict(zip(ctx.kept, tensors[count:], strict=True))
        found: list[Tensor | None] = [None] * count
        grad_stream, debts = torch.zeros_like(stream), Debts(ctx.moments)

        def back(source: Tensor, reader: Reader, grad: Tensor, into: Tensor, owed: Debts) -> None:
            if reader.rivals is not None:
                maps, plain = competed(source, reader)
                competed_backward_(source, reader, alone(maps, plain, grad), into)
                return
            weight, norm = _weight(reader, used), norms[reader.at]
            gamma, beta, *rest = read_backward(source, reader, norm, weight, grad, into)
            owed.add(reader, norm, gamma, beta)
            for place, part in enumerate((gamma, beta, *rest), start=reader.at):
                found[place] = part.to(ctx.dtypes[place])

        def alone(source: Tensor, reader: Reader, grad: Tensor) -> Tensor:
            """The whole gradient of a stream that has one reader."""
            into, owed = torch.zeros_like(source), Debts(ctx.own[reader.at])
            back(source, reader, grad, into, owed)
            return owed.settle(source, into, slice(None))

        back(stream, block.last, _nhwc(grad), grad_stream, debts)
        for number, layer in reversed(list(enumerate(block.layers))):
            made = layer.made
            grad = debts.settle(stream[..., made], grad_stream[..., made], made)
            if layer.drop_rate:
                grad = grad.masked_fill(kept[number, "dropped"], 0).div_(1 - layer.drop_rate)
            if layer.mfm is not None:
                grad = _compete_backward(layer.mfm, kept[number, "rivals"], grad)
            if layer.second is not None:
                z = kept.get((number, "bottleneck"))
                if z is None:
                    source, first = competed(stream, layer.first)
                    z = read(source, first, norms[first.at], _weight(first, used))
                grad = alone(z, layer.second, grad)
            back(stream, layer.first, grad, grad_stream, debts)
        grad_x = None
        if ctx.needs_input_grad[1]:
            made = slice(0, block.width)
            grad_x = debts.settle(stream[..., made], grad_stream[..., made], made)
            grad_x = grad_x.permute(0, 3, 1, 2).contiguous(memory_format=block.layout)
        return None, grad_x, *found


def _weight(reader: Reader, used: Sequence[Tensor]) -> Tensor | None:
    """The weight of the reader's conv."""
    return None if reader.by == "mean" else used[reader.at + 2]


def _compete(mfm: nn.Module, maps: Tensor) -> Tensor:
    return _nhwc(mfm(_nchw(maps)))


def _compete_backward(mfm: nn.Module, maps: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        return torch.autograd.grad(_compete(mfm, maps), maps, grad)[0]


def _noise(maps: Tensor, rate: float, layout: torch.memory_format) -> Tensor:
    """What dropout multiplies with: its random numbers depend on the layout of the plain net's maps."""
    like = _nchw(maps).contiguous(memory_format=layout)
    return _nhwc(F.dropout(torch.ones_like(like), rate))


def _layout(images: Tensor, weight: Tensor) -> torch.memory_format:
    """That of what a conv with this weight makes of the images."""
    if images.is_contiguous() and weight.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def pooled_features(net: Any, x: Tensor, level: int) -> Tensor:
    """What the classifier of a DenseNet reads, (N, C), for images (N, in_channels, H, W).

    The same numbers as by the net's own modules, running statistics included. Norms and convs of
    blocks and transitions are not called as modules, so no hook on them would run.
    """
    block: Any = None
    layout = _layout(x, net.features.conv0.weight)
    for name, module in net.features.named_children():
        if name.startswith("denseblock"):
            block = module
        elif name.startswith("transition"):
            by: By = "pool" if module.mfm is None else "1x1"
            x = _run(block, module.read, module.norm, module.conv, by, level, layout, x)
            if module.mfm is not None:
                x = F.avg_pool2d(module.mfm(x), 2, 2)
        elif name == "norm5":
            x = _run(block, net.read, module, None, "mean", level, layout, x)
        else:
            x = module(x)
    return x


def _run(
    block: Any,
    read: Any,
    norm: Any,
    conv: Any,
    by: By,
    level: int,
    layout: torch.memory_format,
    x: Tensor,
) -> Tensor:
    """A block and what reads it, whose norm and conv are given."""
    weights: list[Tensor] = []

    def reader(norm: Any, conv: Any, by: By, read: Any = None) -> Reader:
        at = len(weights)
        weights.extend((norm.weight, norm.bias))
        if conv is not None:
            weights.append(conv.weight)
        positions = None if read is None else read.input_indices
        rivals = None if read is None else read.rival_indices
        width = norm.num_features
        ranges = ((0, width),) if positions is None else read.ranges
        return Reader(norm, norm.training, width, positions, ranges, rivals, by, at)

    layers, stop = [], x.shape[1]
    for layer in block.children():
        start = stop
        if layer.conv2 is None:
            first, second = reader(layer.norm1, layer.conv1, "3x3", layer.read), None
            filters = layer.conv1.out_channels
        else:
            first = reader(layer.norm1, layer.conv1, "1x1", layer.read)
            second = reader(layer.norm2, layer.conv2, "3x3")
            filters = layer.conv2.out_channels
        stop += filters if layer.mfm is None else layer.mfm.survivors(filters)
        rate = layer.drop_rate if layer.training else 0.0
        layers.append(Layer(first, second, slice(start, stop), layer.mfm, rate))
    last = reader(norm, conv, by, read)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        out: Tensor = _BlockFunction.apply(
            Block(x.shape[1], layers, last, level, layout), x, *weights
        )
    return out


_SAID: set[str] = set()


def usable(net: nn.Module) -> bool:
    """Whether `pooled_features` can do what the net's own modules would; says once why not."""
    reason = why_not(net)
    if reason is not None and reason not in _SAID:
        _SAID.add(reason)
        warnings.warn(f"memory_efficient training is off here: {reason}", stacklevel=3)
    return reason is None


def why_not(net: nn.Module) -> str | None:
    """Why memory-efficient training cannot be used, or None."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return "torch.compile and export see the plain net only"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need the plain net"
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        return "hooks on all modules would not run"
    features = net.get_submodule("features")
    for part in features.children():
        if isinstance(part, nn.BatchNorm2d) or next(part.children(), None) is not None:
            for module in _inside(part):
                if (reason := _wrong(module)) is not None:
                    name = next(
                        n for n, m in features.named_modules(prefix="features") if m is module
                    )
                    return reason.format(name)
    return None


def _inside(part: nn.Module) -> Iterator[nn.Module]:
    yield part
    for child in part.children():
        yield from _inside(child)


def _wrong(module: nn.Module) -> str | None:
    """What is wrong with a block, a transition, a norm or what they hold."""
    kind = type(module)
    if kind not in (nn.BatchNorm2d, nn.Conv2d) and not kind.__module__.startswith(_OURS):
        return f"{{}} is a {kind.__name__}, not what a DenseNet is built of"
    if kind is nn.BatchNorm2d and None in (module.weight, module.running_mean):
        return "{} has no weights or no running statistics"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "hooks on {} would not run"
    return None


_OURS = "prune_dn.models."
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
