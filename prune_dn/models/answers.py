"""Whether two nets give the same answers, whatever their weights; and what makes a net differ."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize

_TABLE = 65_521  # random numbers; a prime, so that no two filters of a layer are the same
_LIBRARIES = ("torch", "torchvision", "timm", "prune_dn")
# Hooks that compute a weight from others before each forward, and how to have its value for good.
_BAKED = {
    "BasePruningMethod": "torch.nn.utils.prune.remove({module}, {weight!r})",
    "WeightNorm": "torch.nn.utils.remove_weight_norm({module}, {weight!r})",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm({module}, {weight!r})",
}
_OF_EVERY_CLASS = ("__init__", "__new__", "__doc__", "__init_subclass__", "__class_getitem__")
_HOOKS = {"_forward_pre_hooks": "a forward pre-hook", "_forward_hooks": "a forward hook"}


def computed_weights(net: nn.Module) -> Iterator[str]:
    """Each weight that is computed from others before a forward, and the call that bakes it in.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> for line in computed_weights(nn.Sequential(layer)):
    ...     print(line)  # doctest: +NORMALIZE_WHITESPACE
    0.weight is computed by a parametrization; bake it in first:
    torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule('0'), 'weight')
    """
    for name, module in net.named_modules():
        where = f"model.get_submodule({name!r})" if name else "model"
        found: dict[str, tuple[str, str]] = {}
        if parametrize.is_parametrized(module):
            call = "torch.nn.utils.parametrize.remove_parametrizations({module}, {weight!r})"
            parametrized: Any = module.parametrizations
            found = dict.fromkeys(parametrized, ("a parametrization", call))
        for hook in module._forward_pre_hooks.values():
            for base in type(hook).__mro__:
                if base.__module__.startswith("torch.nn.utils.") and base.__name__ in _BAKED:
                    weight = str(getattr(hook, "_tensor_name", getattr(hook, "name", "weight")))
                    found[weight] = (base.__module__, _BAKED[base.__name__])
        for weight, (by, call) in found.items():
            yield (
                f"{name}.{weight} is computed by {by}; bake it in first: "
                f"{call.format(module=where, weight=weight)}".lstrip(".")
            )


def peculiarities(net: nn.Module) -> Iterator[str]:
    """Causes by which a net computes otherwise than its classes say: hooks, forwards of its own."""
    for name, module in net.named_modules():
        where, kind = name or "the model", type(module)
        for key, value in vars(module).items():
            if callable(getattr(kind, key, None)) and not isinstance(value, nn.Module):
                yield f"{where} has a {key} of its own, not that of {path_of(kind)}"
        for hooks, what in _HOOKS.items():
            for hook in getattr(module, hooks).values():
                yield f"{where} has {what} ({_name(hook)})"
        if not _of_a_library(kind):
            base = next(c for c in kind.__mro__ if _of_a_library(c))
            changed = sorted({key for c in kind.__mro__ if not _of_a_library(c) for key in vars(c)})
            methods = [key for key in changed if callable(getattr(base, key, None))]
            methods = [key for key in methods if key not in _OF_EVERY_CLASS]
            if methods:
                whose = f"{where} is a {path_of(kind)}: " if name else ""
                yield f"{whose}{path_of(kind)} changes the {', '.join(methods)} of {path_of(base)}"
    for hooks, what in _HOOKS.items():
        for hook in getattr(global_hooks, f"_global{hooks}").values():
            yield f"all modules have {what} ({_name(hook)})"


def difference(given: nn.Module, ours: nn.Module, shape: tuple[int, ...]) -> str | None:
    """How the answers of two nets with the same tensors differ beyond rounding, or None.

    Both run in eval mode, on one random image of `shape` and with random weights of their tensors'
    shapes, in which nothing can hide: no dead ReLU, no layer of zeros. They run in float64 on the
    CPU; where `given` cannot, in its own dtype on its own device, with a warning. Neither net is
    touched: not its tensors, its flags, its gradients or the state of random numbers.
    """
    first = next((p for p in given.parameters() if p.is_floating_point()), torch.empty(0))
    settings = [(torch.float64, torch.device("cpu"))]
    if not first.is_meta and (first.dtype, first.device) != settings[0]:
        settings.append((first.dtype, first.device))
    failed = ""
    for dtype, device in settings:
        tensors = _stand_ins(given, dtype, device)
        image = _random(torch.Size(shape), 1).to(device, dtype)
        try:
            answer = _answer(given, tensors, image)
        except Exception as error:  # whatever a foreign forward raises
            failed = failed or f"{type(error).__name__}: {error}"
            continue
        if failed:
            warnings.warn(
                f"this {path_of(type(given))} cannot run in float64 ({failed}); its answers were "
                f"compared in {dtype}, where small differences are lost in rounding",
                stacklevel=4,
            )
        own = {name: tensors.get(name, tensor) for name, tensor in _named_tensors(ours)}
        return _compare(answer, _answer(ours, own, image))
    return f"it does not run on an image of shape {shape} ({failed})"


def _compare(answer: object, wanted: Tensor) -> str | None:
    if not isinstance(answer, Tensor):
        return f"it answers with a {path_of(type(answer))}, not with logits"
    if answer.shape != wanted.shape:
        return f"it answers with shape {tuple(answer.shape)}, not {tuple(wanted.shape)}"
    off = ((answer.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    if off <= torch.finfo(wanted.dtype).eps ** 0.5:  # half of the digits
        return None
    return f"its answers are others (relative difference {off:.2g})"


def _answer(net: nn.Module, tensors: Mapping[str, Tensor], image: Tensor) -> Any:
    """The net's answer with these tensors in place of its own."""
    devices = [image.device] if image.device.type == "cuda" else []
    compiled = any(module._compiled_call_impl is not None for module in net.modules())
    with (
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        eval_mode(net),
        torch.no_grad(),
        torch.random.fork_rng(devices),
        torch.autocast(image.device.type, enabled=False),
    ):
        torch.manual_seed(0)
        return functional_call(net, dict(tensors), (image.clone(),))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has its own training flag again."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _stand_ins(net: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random tensors like the net's; integers are copied. A tensor with two names stays one."""
    made: dict[int, Tensor] = {}
    found = {}
    for name, tensor in _named_tensors(net):
        if id(tensor) not in made:
            whole = tensor.is_meta or tensor.is_floating_point()
            value = _stand_in(name, tensor.shape, len(made)) if whole else tensor.detach().clone()
            made[id(tensor)] = value.to(
                device, dtype if tensor.is_floating_point() else tensor.dtype
            )
        found[name] = made[id(tensor)]
    return found


def _stand_in(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Random numbers that keep the scale of what passes through."""
    values, last = _random(shape, seed), name.rpartition(".")[2]
    if last == "running_var":
        return values.square() + 0.5
    if len(shape) > 1:
        return values * (2 * shape[0] / max(shape.numel(), 1)) ** 0.5
    return 1 + values / 4 if last == "weight" else values / 4


def _random(shape: torch.Size, seed: int) -> Tensor:
    """Normal numbers of this shape, others for each seed."""
    start = seed * 7919 % _TABLE
    return _table().repeat(1 + -(-shape.numel() // _TABLE))[start:][: shape.numel()].view(shape)


@functools.cache
def _table() -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(_TABLE, generator=generator, dtype=torch.float64, device="cpu")


def _named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def _of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in (*_LIBRARIES, "builtins")


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
