"""The effect of each operation of `torch.export`'s graphs on channel ids: one rule per operation.

A rule is a function from a `Call` to a `Flow`, or to a list of them where the operation returns several
tensors. It is registered by the operation's name in ATen; an operation without a rule fixes all
channels that it touches, and says so.

>>> from prune_dn.graph.flow import Flow
>>> @rule("my_namespace.my_activation")
... def my_activation(call):
...     return call.flow(0)
>>> del RULES["my_namespace.my_activation"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prune_dn.errors import PruningError
from prune_dn.graph.builder import Builder
from prune_dn.graph.flow import (
    Flow,
    along,
    constant,
    full,
    reduced,
)
from prune_dn.graph.types import NONE, Ids


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer as an operand, by its name in the state dict."""

    name: str
    shape: tuple[int, ...]
    value: Any  # the tensor itself
    is_parameter: bool

    @property
    def layer(self) -> str:
        """The module that holds it; a bare parameter of the net itself has none."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Call:
    """One call of an operation: flows or weights where it takes tensors, else plain values.

    `args` are in the order of the operation's schema, defaults filled in. `shapes` are those of the
    tensors that it returns. `computed_from` is what the second was computed from: the largest parameter, or
    else buffer.
    """

    name: str
    args: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    build: Builder
    select: str | None = None  # the norm in front, if only this call reads its output
    computed_from: Weight | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only tensor that it returns."""
        return self.shapes[0]

    def flow(self, position: int) -> Flow:
        """A tensor argument; the entries of a bare parameter get ids of their own."""
        return as_flow(self.args[position], self.build)

    def flows(self) -> list[Flow]:
        """All tensors among the arguments, in lists too."""
        parts = [p for arg in self.args for p in (arg if isinstance(arg, list | tuple) else [arg])]
        return [as_flow(part, self.build) for part in parts if isinstance(part, Flow | Weight)]


Rule = Callable[[Call], Flow | list[Flow]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by name, such as `aten.relu`. A name that is taken raises."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise PruningError(f"operation {name!r} has a rule already")
            RULES[name] = function
        return function

    return register


def aten(*names: str) -> Callable[[Rule], Rule]:
    """`rule` for operations of ATen, and for their in-place forms."""
    return rule(*(f"aten.{name}{end}" for name in names for end in ("", "_")))


def as_flow(value: Flow | Weight, build: Builder) -> Flow:
    """A weight as a flow: a vector, whatever its singleton axes, follows channels; a matrix cannot."""
    if isinstance(value, Flow):
        return value
    build.used.add(value.name)
    axes = [d for d, size in enumerate(value.shape) if size > 1]
    if len(axes) != 1 or not value.value.is_floating_point():
        return constant(value.shape)
    ids = build.new(value.shape[axes[0]])
    build.follow(value.name, ids)
    return along(value.shape, axes[0], ids)


def unknown(call: Call) -> list[Flow]:
    """The rule of an operation that has none: everything that it touches stays."""
    mix(call, f"{call.name.removeprefix('aten.')}, an operation without a rule, reads it")
    return [constant(shape) for shape in call.shapes]


def mix(call: Call, reason: str) -> None:
    """Fix all channels of all arguments."""
    for flow in call.flows():
        call.build.fix(flow.ids, reason)


def combine(call: Call, flows: Sequence[Flow], shape: Sequence[int]) -> Flow:
    """Elementwise operation on tensors that broadcast: ids at one position are tied."""
    what = call.name.removeprefix("aten.").rstrip("_").split(".")[0]
    ndim = len(shape)
    aligned = [
        Flow(
            (1,) * (ndim - len(f.shape)) + f.shape,
            f.ids.reshape((1,) * (ndim - f.ids.ndim) + f.ids.shape),
        )
        for f in flows
    ]
    spread = [
        any(a.shape[d] == 1 and b.ids.shape[d] > 1 for b in aligned for d in range(ndim))
        for a in aligned
    ]
    result: Ids | None = None
    for f, is_spread in zip(aligned, spread, strict=True):
        if is_spread:
            call.build.fix(f.ids, f"{what} spreads it over several channels")
            continue
        if result is not None:
            reason = (
                f"{what} combines it with something that is no channel (an input or a constant)"
            )
            call.build.tie(result, f.ids, reason)
            wider, ids = np.broadcast_arrays(result, f.ids)
            result = np.where(wider == NONE, ids, wider)
        else:
            result = f.ids
    return constant(shape) if result is None else reduced(shape, result)


def sized(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def tie_parts(call: Call, x: Flow, axis: int, parts: int, *, inside: bool = False) -> None:
    """Tie what lies at one place of equal parts of an axis, so that they stay equally wide.

    With `inside` tie what lies in one part, so that parts go whole.
    """
    ids = np.moveaxis(full(x, axis), axis, 0)
    rows = ids.reshape(parts, -1)
    first = rows[:, :1] if inside else rows[:1]
    call.build.tie(first, rows, "it lies beside what is no channel in a tensor that is split")


def tie_stacked(call: Call, x: Flow, axes: Sequence[int], reason: str) -> bool:
    """Whether `axes` may be mixed: ids do not differ along them, or along others too and are tied.

    Along an axis of stacked tensors, such as the groups of a view, each mix is as a sum of tensors. Where
    channels lie along no other axis they are mixed themselves: all stay, for `reason`.
    """
    varying = [d for d, size in enumerate(x.ids.shape) if size > 1]
    if not set(varying) & set(axes):
        return True
    if set(varying) <= set(axes):
        call.build.fix(x.ids, reason)
        return False
    first = x.ids[tuple(slice(0, 1) if d in axes else slice(None) for d in range(x.ids.ndim))]
    call.build.tie(first, x.ids, reason)
    return True
