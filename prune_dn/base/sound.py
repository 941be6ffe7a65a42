"""Sound weights: numbers that are finite, and variances that are not negative."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from prune_dn.errors import PruningError

_STATISTICS = ("running_mean", "running_var")


def find_unsound(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """What is wrong with the first unsound tensor, by its name; None = nothing.

    Each number is finite, and each `running_var` at least 0. Integers are not looked at.

    >>> import torch
    >>> find_unsound([("norm.running_var", torch.tensor([1.0, -0.5]))])
    'norm.running_var holds 1 negative value among 2'
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            return f"{name} is on the meta device, so it has no values"
        values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
        wrong, what = ~values.isfinite(), "NaN or infinite"
        if name.rpartition(".")[2] == "running_var" and not wrong.any():
            wrong, what = values < 0, "negative"
        if count := int(wrong.sum()):
            return f"{name} holds {count} {what} value{'s'[: count > 1]} among {wrong.numel()}"
    return None


def check_sound(model: object) -> None:
    """Raise PruningError, with the tensor's name, unless a module's weights and running statistics
    are sound.

    A buffer of another kind may hold infinities, as a mask does.
    """
    if not isinstance(model, nn.Module):
        return
    weights = [(k, p) for k, p in model.named_parameters() if not nn.parameter.is_lazy(p)]
    buffers = [(k, b) for k, b in model.named_buffers() if k.rpartition(".")[2] in _STATISTICS]
    if (problem := find_unsound([*weights, *buffers])) is not None:
        raise PruningError(
            f"{problem}: every score and answer would follow it; load weights that are sound, or "
            "train again with a lower learning rate"
        )


def check_filled(model: nn.Module) -> None:
    """Raise PruningError where a parameter or buffer has no values: the last look at a new net."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise PruningError(
                f"{name} is on the meta device, so it has no values: nothing was cut"
            )
