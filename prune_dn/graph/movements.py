"""Rules of operations that move elements: views, permutations, concatenations, splits, selections."""

from __future__ import annotations

import math

import numpy as np

from prune_dn.graph.flow import (
    Flow,
    along,
    blocks,
    concatenate,
    constant,
    full,
    reduced,
    reshape,
    take,
)
from prune_dn.graph.rules import Call, Weight, as_flow, aten, mix, sized, tie_parts, unknown
from prune_dn.graph.selecting import INDEX
from prune_dn.graph.types import NONE


@aten("im2col")
def im2col(call: Call) -> Flow:
    """The taps of each channel become channels."""
    x = call.flow(0)
    ids = call.build.channels(x, 1, "unfold reads it along another axis")
    return along(call.shape, 1, ids.repeat(math.prod(call.args[1])))


@aten(
    "pad",
    "constant_pad_nd",
    "reflection_pad2d",
    "replication_pad2d",
    "reflection_pad1d",
    "reflection_pad3d",
)
def pad(call: Call) -> Flow:
    """Padding of channels adds constants, in front and behind; other padding changes nothing."""
    x, pads = call.flow(0), list(call.args[1])
    ids = x.ids
    for number in range(len(pads) // 2):
        axis = len(x.shape) - 1 - number
        front, behind = int(pads[2 * number]), int(pads[2 * number + 1])
        if ids.shape[axis] > 1 and (front or behind):
            if min(front, behind) < 0 or (
                call.name != "aten.constant_pad_nd" and call.args[2:3] not in ((), ("constant",))
            ):
                return unknown(call)[0]
            width = [(0, 0)] * ids.ndim
            width[axis] = (front, behind)
            ids = np.pad(ids, width, constant_values=NONE)
    return reduced(call.shape, ids)


@aten("cat", "concat", "concatenate")
def cat(call: Call) -> Flow:
    """One after the other."""
    return concatenate(
        [as_flow(x, call.build) for x in call.args[0]], int(call.args[1]), call.shape
    )


@aten("stack")
def stack(call: Call) -> Flow:
    """A new axis."""
    axis = int(call.args[1]) % len(call.shape)
    parts = [as_flow(x, call.build) for x in call.args[0]]
    wide = [Flow((*p.shape[:axis], 1, *p.shape[axis:]), np.expand_dims(p.ids, axis)) for p in parts]
    return concatenate(wide, axis, call.shape)


@aten(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "ravel",
)
def view(call: Call) -> Flow:
    """The same elements in the same order.

    The net's own code splits an axis of channels: into a number of equal parts, such as the groups of a
    channel shuffle, so that what lies at one place of all parts is tied; or into parts of a size that it
    holds as a number, each of which is tied. Where all sizes are such numbers, nothing may go.
    """
    x = call.flow(0)
    held = call.build.sizes.reshape.get((x.shape, call.shape), frozenset())
    for old, new in blocks(x.shape, call.shape):
        old = [d for d in old if x.shape[d] > 1]
        new = [d for d in new if call.shape[d] > 1]
        if not any(x.ids.shape[d] > 1 for d in old):
            continue
        if held.issuperset(new):
            sizes = " x ".join(str(call.shape[d]) for d in new)
            reason = (
                f"the net's own code reshapes it to {sizes}, plain numbers; -1 or what is computed "
                "from x.shape by whole-number arithmetic would follow"
            )
            call.build.fix(x.ids, reason)
        elif len(new) > 1 and len(old) > 1:
            call.build.fix(x.ids, "a reshape mixes its axis with others")
        elif len(new) > 1 and new[0] not in held and held.issuperset(new[1:]):
            tie_parts(call, x, old[0], call.shape[new[0]], inside=True)
        elif len(new) > 1:
            tie_parts(call, x, old[0], call.shape[new[0]])
    return reshape(x, call.shape)


@aten("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "mT")
def permute(call: Call) -> Flow:
    """The axes in another order."""
    x = call.flow(0)
    ndim, kind = len(x.shape), call.name.split(".")[1].rstrip("_")
    order = list(range(ndim))
    if kind == "permute":
        order = [int(d) % ndim for d in call.args[1]]
    elif kind == "movedim":
        moved = [[int(d) % ndim for d in np.atleast_1d(call.args[i])] for i in (1, 2)]
        order = [d for d in order if d not in moved[0]]
        for source, target in sorted(zip(*moved, strict=True), key=lambda pair: pair[1]):
            order.insert(target, source)
    else:
        a, b = (ndim - 2, ndim - 1) if kind in ("t", "mT", "numpy_T") else map(int, call.args[1:3])
        order[a % ndim], order[b % ndim] = order[b % ndim], order[a % ndim]
    return Flow(call.shape, x.ids.transpose(order))


@aten("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Flow:
    """Axes of size 1 are repeated."""
    x = call.flow(0)
    return Flow(call.shape, x.ids.reshape((1,) * (len(call.shape) - x.ids.ndim) + x.ids.shape))


@aten("repeat", "tile")
def repeat(call: Call) -> Flow:
    """The whole tensor several times along each axis."""
    x, times = call.flow(0), [int(t) for t in call.args[1]]
    ids = x.ids.reshape((1,) * (len(call.shape) - x.ids.ndim) + x.ids.shape)
    times = [t if ids.shape[d] > 1 else 1 for d, t in enumerate(times)]
    return reduced(call.shape, np.tile(ids, times))


@aten("slice", "narrow", "select")
def pick(call: Call) -> Flow:
    """Some positions of one axis, by bounds that the net's own code holds: these channels stay."""
    x, axis = call.flow(0), int(call.args[1]) % len(call.flow(0).shape)
    kind = call.name.split(".")[1]
    size = int(x.shape[axis])
    start, stop, step = call.args[2], None, 1
    if kind == "select":
        start = int(start) % size
        stop = start + 1
    elif kind == "narrow":
        start = int(start) % size
        stop = start + int(call.args[3])
    else:
        stop, step = call.args[3], call.args[4]
    index = range(size)[slice(start, stop, step)]
    if x.ids.shape[axis] > 1 and len(index) < size:
        call.build.fix(x.ids, "the net's own code picks channels by position")
    part = take(x, axis, slice(start, stop, step), sized(x.shape, axis, len(index)))
    return reshape(part, call.shape)


@aten("chunk", "split", "split_with_sizes", "unbind", "tensor_split")
def split(call: Call) -> list[Flow]:
    """Consecutive parts of one axis.

    Equal parts stay equal: what lies at one place of all of them is tied. Others stay as they are, and
    so do parts of a size that the net's own code holds as a number.
    """
    x = call.flow(0)
    unbind = call.name.startswith("aten.unbind")
    axis = int(call.args[-1]) % len(x.shape)
    sizes = [1 if unbind else shape[axis] for shape in call.shapes]
    if x.ids.shape[axis] > 1 and len(sizes) > 1:
        if len(set(sizes)) > 1 or unbind:
            call.build.fix(x.ids, "the net's own code splits channels by position")
        elif (x.shape, call.shapes) in call.build.sizes.split:
            reason = (
                f"the net's own code splits it into parts of {sizes[0]}, a plain number; "
                f"x.shape[{axis}] // {len(sizes)} would follow"
            )
            call.build.fix(x.ids, reason)
        else:
            tie_parts(call, x, axis, len(sizes))
    parts, start = [], 0
    for shape, size in zip(call.shapes, sizes, strict=True):
        part = take(x, axis, slice(start, start + size), sized(x.shape, axis, size))
        parts.append(reshape(part, shape))
        start += size
    return parts


@aten("index_select")
def index_select(call: Call) -> Flow:
    """Positions of one axis, by a constant index that the net holds: these channels stay."""
    index, x, axis = call.args[2], call.flow(0), int(call.args[1])
    if not isinstance(index, Weight):
        mix(call, "index_select reads it by an index that is computed")
        return constant(call.shape)
    call.build.used.add(index.name)
    if index.name.rpartition(".")[2] == INDEX and axis == 1:
        stream = call.build.channels(x, 1, f"{index.layer} selects along another axis")
        call.build.selected[index.layer] = stream
        return along(call.shape, 1, stream[index.value.cpu().numpy()])
    if x.ids.shape[axis] > 1:
        call.build.fix(x.ids, "the net's own code picks channels by position")
    return take(x, axis, index.value.cpu().numpy(), call.shape)


@aten("flip")
def flip(call: Call) -> Flow:
    """Some axes backwards."""
    x = call.flow(0)
    return Flow(call.shape, np.flip(x.ids, tuple(int(d) for d in call.args[1])))


@aten("roll")
def roll(call: Call) -> Flow:
    """Some axes turned around."""
    x = call.flow(0)
    ids = x.ids
    for shift, axis in zip(call.args[1], call.args[2], strict=True):
        if ids.shape[axis] > 1:
            call.build.fix(ids, "the net's own code picks channels by position")
        ids = np.roll(ids, shift, axis)
    return Flow(call.shape, ids)


@aten("channel_shuffle")
def channel_shuffle(call: Call) -> Flow:
    """The groups of channels in turns."""
    x, groups = call.flow(0), int(call.args[1])
    tie_parts(call, x, 1, groups)
    n, c, *rest = x.shape
    parts = reshape(x, (n, groups, c // groups, *rest))
    turned = Flow((n, c // groups, groups, *rest), parts.ids.swapaxes(1, 2))
    return reshape(turned, call.shape)


@aten("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Flow:
    """Channels become positions, or positions channels."""
    x, factor = call.flow(0), int(call.args[1])
    n, c, h, w = x.shape
    if "unshuffle" in call.name:
        x = reshape(x, (n, c, h // factor, factor, w // factor, factor))
        order = (0, 1, 3, 5, 2, 4)
    else:
        rows = full(x, 1).reshape(c // factor**2, -1)
        call.build.tie(rows[:, :1], rows, "pixel_shuffle makes it one with what is no channel")
        x = reshape(x, (n, c // factor**2, factor, factor, h, w))
        order = (0, 1, 4, 2, 5, 3)
    moved = Flow(tuple(x.shape[d] for d in order), x.ids.transpose(order))
    return reshape(moved, call.shape)
