"""Running a net to follow or compare it: its inputs, its outputs, its modes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tensor, a tuple of positional ones, or a dict by name."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model with `inputs` (see `arguments`)."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def held(model: nn.Module, name: str) -> nn.Module | Tensor:
    """A module, parameter or buffer by its name; the model itself by an empty one."""
    if not name:
        return model
    parent, _, key = name.rpartition(".")
    found: nn.Module | Tensor = getattr(model.get_submodule(parent), key)
    return found


def tensors(output: object) -> list[Tensor]:
    """All floating-point tensors in what a model returned."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def to_inference_(model: nn.Module, *, branches: bool) -> nn.Module:
    """Eval mode, but with `branches` modules that hold others take their branch for training.

    Norms, dropout and other layers stay in eval mode, so answers do not depend on the batch.
    """
    for module in model.modules():
        module.training = branches and next(module.children(), None) is not None
    return model
