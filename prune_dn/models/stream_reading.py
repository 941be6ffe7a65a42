"""How a reader reads a stream and gives back its gradients: norm, ReLU and conv, a few images at a time.

Streams are (N, H, W, C) here: a reader takes a view, whatever it leaves out. Nothing as large as what
it reads is kept, or ever made as a whole: on a CPU the images are worked through in chunks that stay in
the cache from the norm to the conv. The norm acts as x * scale + shift; who calls knows its statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.models import fused

By = Literal["1x1", "3x3", "pool", "mean"]
Ranges = tuple[tuple[int, int], ...]
MOST_RANGES = 8  # of a stream: more are gathered, channel by channel
CHUNK_BYTES = 1 << 22  # of a reader's activated inputs, on a CPU


class Reader(NamedTuple):
    """Which stream positions are read (None = the first `width`), through which norm, by what.

    `ranges`, (start, stop), are the same where they are few: one is a view, and several are copied faster
    than single channels; None = the positions are gathered. With `rivals` the maximum of each channel that is read and its rival is what the norm sees.

    `by` is "1x1" or "3x3" (a conv with "same" padding), "pool" (a 1x1 conv, then 2x2 average pooling:
    done in the other order, which commutes) or "mean" (of all pixels, without a conv). `at` is where
    among all parameters its own begin: the norm's weight and bias, then the conv's weight.
    """

    norm: nn.BatchNorm2d
    training: bool
    width: int
    positions: Tensor | None
    ranges: Ranges | None
    rivals: Tensor | None
    by: By
    at: int


class Moments(NamedTuple):
    """Mean and biased variance of each channel of a stream over all `pixels`."""

    mean: Tensor
    var: Tensor
    pixels: int


class Affine(NamedTuple):
    """A norm as it acts: x * scale + shift, with (x - mean) * invstd what its weight sees."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, H, W, C), in at least float32."""
    if fused.runs(x):
        return fused.moments(x)
    precise = torch.promote_types(x.dtype, torch.float32)
    scratch = x.new_zeros(2, x.shape[3], dtype=precise)  # its dtype is that of the result
    return torch.batch_norm_update_stats(x.permute(0, 3, 1, 2), scratch[0], scratch[1], 0.0)


def norm_for(reader: Reader, gamma: Tensor, beta: Tensor, moments: Moments) -> Affine:
    """The reader's norm by the statistics of this batch in training mode, else by running ones."""
    norm = reader.norm
    if reader.training:
        mean, var = (taken(m, reader) for m in (moments.mean, moments.var))
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean.to(moments.mean), norm.running_var.to(moments.mean)
    invstd = (var + norm.eps).rsqrt()
    scale = gamma.to(invstd) * invstd
    return Affine(scale, beta.to(scale) - mean * scale, mean, invstd)


def track_(reader: Reader, moments: Moments) -> None:
    """Move the norm's running statistics, as `nn.BatchNorm2d` does."""
    norm = reader.norm
    if not reader.training:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1.0 / float(norm.num_batches_tracked)
    unbiased = moments.pixels / (moments.pixels - 1)
    norm.running_mean.mul_(1 - share).add_(taken(moments.mean, reader), alpha=share)
    norm.running_var.mul_(1 - share).add_(taken(moments.var, reader), alpha=share * unbiased)


def taken(values: Tensor, reader: Reader) -> Tensor:
    """What the reader takes of one value per stream channel."""
    if reader.positions is None:
        return values[: reader.width]
    return values.index_select(0, reader.positions)


def competed(stream: Tensor, reader: Reader) -> tuple[Tensor, Reader]:
    """What a reader reads after the competition, as a stream of its own, and who reads that."""
    if reader.rivals is None:
        return stream, reader
    assert reader.positions is not None
    both = (stream.index_select(3, index) for index in (reader.positions, reader.rivals))
    alone = reader._replace(positions=None, ranges=((0, reader.width),), rivals=None)
    return torch.maximum(*both), alone


def competed_backward_(stream: Tensor, reader: Reader, grad: Tensor, grad_stream: Tensor) -> None:
    """Give the gradient of what was competed for to the winners; where both are equal, half each."""
    assert reader.positions is not None and reader.rivals is not None
    leads, rivals = (stream.index_select(3, i) for i in (reader.positions, reader.rivals))
    share = (leads > rivals).to(grad.dtype).add_(leads == rivals, alpha=0.5)
    grad_stream.index_add_(3, reader.positions, grad * share)
    grad_stream.index_add_(3, reader.rivals, grad * (1 - share))


def read(stream: Tensor, reader: Reader, norm: Affine, weight: Tensor | None) -> Tensor:
    """What the reader makes of a stream: (N, H, W, C) -> (N, H', W', outputs); "mean": (N, read)."""
    found = [_use(_activated(x, norm)[0], reader.by, weight) for x, _ in _chunks(stream, reader)]
    return found[0] if len(found) == 1 else torch.cat(found)


def read_backward(
    stream: Tensor,
    reader: Reader,
    norm: Affine,
    weight: Tensor | None,
    grad: Tensor,
    grad_stream: Tensor,
) -> list[Tensor]:
    """Add scale * gradient to `grad_stream`; the gradients of the reader's own parameters.

    What the statistics of the batch owe is not in it: `Debts.settle` takes it off, for all readers at once.
    """
    total = norm.scale.new_zeros(2, len(norm.scale), dtype=torch.float64)
    grad_weight: Any = None
    for x, rows in _chunks(stream, reader):
        activated, x = _activated(x, norm)
        d, part = _use_backward(activated, reader.by, weight, grad[rows])
        if part is not None:
            grad_weight = part.to(norm.scale) if grad_weight is None else grad_weight.add_(part)
        into = _taken_from(grad_stream[rows], reader)
        if fused.runs(x, into):
            fused.backward_(d.contiguous(), x, norm.scale, norm.shift, into, total)
        else:
            d = torch.where(activated > 0, d, 0)
            total[0] += d.sum((0, 1, 2), dtype=norm.scale.dtype)
            total[1] += (d * x).sum((0, 1, 2), dtype=norm.scale.dtype)
            into.addcmul_(d, norm.scale.to(d.dtype))
        _put_back_(grad_stream[rows], reader, into)
    beta, by_x = total
    gamma = norm.invstd * (by_x - norm.mean * beta)
    found = [gamma.to(norm.scale), beta.to(norm.scale)]
    return found if grad_weight is None else [*found, grad_weight]


class Debts:
    """What the batch statistics of each stream channel owe to all of its readers."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.mean, self.var = (torch.zeros_like(moments.mean) for _ in range(2))

    def add(self, reader: Reader, norm: Affine, gamma: Tensor, beta: Tensor) -> None:
        """Take on what one reader's gradients ask for; frozen statistics owe nothing."""
        if not reader.training:
            return
        owed = norm.scale * beta, norm.scale * norm.invstd * gamma
        for sums, part in zip((self.mean, self.var), owed, strict=True):
            if reader.positions is None:
                sums[: reader.width] += part
            else:
                sums.index_add_(0, reader.positions, part)

    def settle(self, x: Tensor, grad: Tensor, channels: slice) -> Tensor:
        """The whole gradient of some channels x (N, H, W, c), all of whose readers were heard."""
        mean, pixels = self.moments.mean[channels], self.moments.pixels
        by_x = self.var[channels] / pixels
        constant = self.mean[channels] / pixels - mean * by_x
        if fused.runs(x, grad):
            return fused.settle(x, grad, constant, by_x)
        if x.dtype == mean.dtype:
            return torch.addcmul(grad - constant, x, by_x, value=-1)
        return (grad.to(mean) - constant).addcmul_(x.to(mean), by_x, value=-1).to(x.dtype)


def _chunks(stream: Tensor, reader: Reader) -> Iterator[tuple[Tensor, slice]]:
    """What the reader takes of a few images at a time, and which images."""
    size = len(stream)
    if stream.device.type == "cpu":
        image = stream[0, ..., 0].numel() * reader.norm.num_features * stream.element_size()
        size = max(CHUNK_BYTES // max(image, 1), 1)
    for start in range(0, len(stream), size):
        rows = slice(start, start + size)
        yield _taken_from(stream[rows], reader), rows


def _taken_from(stream: Tensor, reader: Reader) -> Tensor:
    """What the reader takes of a stream (N, H, W, C): a view where that is one range."""
    if reader.ranges is None:
        assert reader.positions is not None
        return stream.index_select(3, reader.positions)
    parts = [stream[..., start:stop] for start, stop in reader.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _put_back_(stream: Tensor, reader: Reader, values: Tensor) -> None:
    """Let what `_taken_from` gave, as it is now, be in the stream."""
    if reader.ranges is None:
        assert reader.positions is not None
        stream.index_copy_(3, reader.positions, values)
    elif len(reader.ranges) > 1:
        at = 0
        for start, stop in reader.ranges:
            stream[..., start:stop] = values[..., at : at + stop - start]
            at += stop - start


def _activated(x: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
    """relu(x * scale + shift), contiguous, and x (a copy where that was needed)."""
    if fused.runs(x):
        return fused.norm_relu(x, norm.scale, norm.shift), x
    if x.dtype == norm.scale.dtype:
        return torch.addcmul(norm.shift, x, norm.scale).relu_(), x
    x = x.contiguous()
    zero, one = torch.zeros_like(norm.scale), torch.ones_like(norm.scale)
    out = torch.native_batch_norm(
        x.permute(0, 3, 1, 2), norm.scale, norm.shift, zero, one, False, 0.0, 0.0
    )[0]
    return out.relu_().permute(0, 2, 3, 1), x


def _use(x: Tensor, by: By, weight: Tensor | None) -> Tensor:
    if by == "mean":
        return x.mean((1, 2))
    assert weight is not None
    if by == "3x3":
        return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    if by == "pool":
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return x @ weight.flatten(1).T


def _use_backward(
    x: Tensor, by: By, weight: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the weight."""
    if by == "mean":
        pixels = x.shape[1] * x.shape[2]
        return (grad / pixels)[:, None, None].expand_as(x).contiguous(), None
    assert weight is not None
    if by == "3x3":
        d, w, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2),
            x.permute(0, 3, 1, 2),
            weight,
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, True, False],
        )
        return d.permute(0, 2, 3, 1), w
    read, flat = x, weight.flatten(1)
    if by == "pool":
        read = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    w = grad.reshape(-1, len(flat)).T @ read.reshape(-1, flat.shape[1])
    d = grad @ flat
    if by == "pool":
        d = _unpooled(d, x)
    return d, w.view_as(weight)


def _unpooled(d: Tensor, x: Tensor) -> Tensor:
    """The gradient of 2x2 average pooling; an odd last row or column is in no pool."""
    n, h, w, c = d.shape
    spread = (d / 4)[:, :, None, :, None].expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c)
    return F.pad(spread, (0, 0, 0, x.shape[2] - 2 * w, 0, x.shape[1] - 2 * h))
