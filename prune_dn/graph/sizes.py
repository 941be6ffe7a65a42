"""Which sizes a net's own code holds as numbers, and which it computes from the shapes of tensors.

`x.split(8, 1)` and `x.split(x.shape[1] // 2, 1)` are the same in a traced graph. Only the second
still fits once channels are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]
_SHAPE: Any = vars(torch._C.TensorBase)["shape"].__get__  # what reading `tensor.shape` calls
_SPLITS = {"split", "split_with_sizes"}
_RESHAPES = {"view", "reshape", "unflatten"}


class _Size(int):
    """A number that was computed from the shape of a tensor."""


class _Shape(tuple[_Size, ...]):
    """As `torch.Size`, which cannot hold them."""

    def numel(self) -> int:
        return math.prod(self)


def _computed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: _Size, *others: Any) -> Any:
        found = plain(self, *others)
        if isinstance(found, tuple):  # of divmod
            return tuple(map(_Size, found))
        return _Size(found) if type(found) is int else found

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "divmod", "pow", "lshift", "rshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Size, _form, _computed(_form))
for _form in ("__neg__", "__pos__", "__abs__"):
    setattr(_Size, _form, _computed(_form))


@dataclass
class Sizes(TorchFunctionMode):
    """Notes, while a net runs inside, the splits and reshapes whose sizes its code holds as numbers.

    `split` has (shape of the tensor, shapes of its parts); `reshape` has for (shape before, shape after)
    the axes whose size is such a number. A size that is computed by other means than whole-number
    arithmetic on shapes counts as a number of the code.
    """

    split: set[tuple[Shape, tuple[Shape, ...]]] = field(default_factory=set)
    reshape: dict[tuple[Shape, Shape], frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("size", "numel") or func == _SHAPE:
            return _Size(out) if isinstance(out, int) else _Shape(map(_Size, out))
        if name not in _SPLITS | _RESHAPES or not args or not isinstance(args[0], Tensor):
            return out
        before, places = tuple(args[0].shape), {**(kwargs or {})}
        axis = places.pop("dim", 0)
        given = [*args[1:], *places.values()]
        if name in _SPLITS:
            if any(type(size) is int for size in _flat(given[:1])):
                self.split.add((before, tuple(tuple(part.shape) for part in out)))
            return out
        if name == "unflatten" and "dim" not in (kwargs or {}):
            axis, *given = given
        held = {n for n, size in enumerate(_flat(given)) if type(size) is int and size != -1}
        after = tuple(out.shape)
        known = self.reshape.get((before, after), frozenset())
        self.reshape[before, after] = known | {n + axis % len(before) for n in held}
        return out


def _flat(sizes: Iterable[Any]) -> Iterator[Any]:
    for size in sizes:
        if isinstance(size, tuple | list):
            yield from _flat(size)
        else:
            yield size
