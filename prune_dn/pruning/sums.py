"""Where a sum takes the output of a convolution or linear layer, with or without a norm behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from prune_dn.graph.inference import call

IN_PLACE = (Tensor.add_, Tensor.__iadd__)
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *IN_PLACE)


@dataclass(frozen=True)
class Summand:
    """Operand `position` of a sum: the output of `layer`, behind `norm` where there is one."""

    layer: str
    norm: str | None
    position: int


class AtSums(TorchFunctionMode):
    """Calls `act(number, operands)` before each addition of two tensors of one shape, numbered from 0."""

    def __init__(self, act: Callable[[int, tuple[Tensor, Tensor]], None]) -> None:
        super().__init__()
        self.act, self.number = act, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDITIONS and len(args) == 2 and not kwargs and _alike(*args):
            self.act(self.number, args)
            self.number += 1
        return func(*args, **(kwargs or {}))


def unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, with what it adds hidden from modes like `AtSums`."""

    @functools.wraps(hook)
    def run(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            hook(*args)

    return run


class _Uses(TorchFunctionMode):
    """Counts for some tensors the functions that made another tensor of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}  # kept, so that no id is given to another
        self.uses: dict[int, int] = {}
        self.sums: set[int] = set()

    def watch(self, x: Tensor) -> None:
        self.tensors[id(x)], self.uses[id(x)] = x, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            for x in (*args, *(kwargs or {}).values()):
                if id(x) in self.uses and id(x) not in self.sums:
                    self.uses[id(x)] += 1
            if func in IN_PLACE and out is args[0]:
                self.sums.add(id(out))  # from here on it is another value
        return out


@torch.no_grad()
def find_summands(net: nn.Module, layers: Collection[str], inputs: Any) -> dict[int, Summand]:
    """By the number of each sum the operand that one of `layers` makes, alone for this sum.

    Where both operands are such, the one whose layer has more weights for each output. `net` is in eval mode.

    >>> from torchvision.models import resnet18
    >>> layers = ["layer1.0.conv1", "layer1.0.conv2"]
    >>> find_summands(resnet18().eval(), layers, torch.zeros(1, 3, 32, 32))
    {0: Summand(layer='layer1.0.conv2', norm='layer1.0.bn2', position=0)}
    """
    uses = _Uses()
    made: dict[int, tuple[str, str | None, tuple[Tensor, ...]]] = {}
    sums: dict[int, list[tuple[Summand, tuple[Tensor, ...]]]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(layer, _BatchNorm):
                source, norm, chain = made.get(id(args[0]), (None, None, ()))
                if source is None or norm is not None:
                    return
                made[id(output)] = source, name, (*chain, output)
            else:
                made[id(output)] = name, None, (output,)
            uses.watch(output)

        return hook

    def act(number: int, operands: tuple[Tensor, Tensor]) -> None:
        for position, operand in enumerate(operands):
            if id(operand) in made:  # an addition in place makes another value of it
                layer, norm, chain = made.pop(id(operand))
                sums.setdefault(number, []).append((Summand(layer, norm, position), chain))

    with ExitStack() as stack:
        for name, module in net.named_modules():
            if name in layers or (isinstance(module, _BatchNorm) and module.track_running_stats):
                stack.callback(module.register_forward_hook(remember(name)).remove)
        stack.enter_context(uses)
        stack.enter_context(AtSums(act))
        call(net, inputs)
    found = {}
    for number, candidates in sums.items():
        alone = [s for s, chain in candidates if all(uses.uses[id(x)] == 1 for x in chain)]
        if alone:
            found[number] = max(
                alone, key=lambda s: net.get_submodule(s.layer).get_parameter("weight")[0].numel()
            )
    return found


def _alike(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x is not y
