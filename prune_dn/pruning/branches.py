"""Weights that a forward in eval mode never reaches: auxiliary heads, branches for training only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_dn.errors import PruningError
from prune_dn.models.answers import peculiarities
from prune_dn.models.weights import shorten


def has_branches(model: nn.Module, image: Tensor) -> bool:
    """Whether some weights are reached only with the branches for training on.

    Raises PruningError, naming the modules, where weights are reached in neither way: nobody could
    say whether they would still fit.
    """
    unused = _unreached(model, image, branches=False)
    if not unused:
        return False
    try:
        left, why = _unreached(model, image, branches=True), ""
    except Exception as error:  # whatever a foreign forward raises
        left = unused
        why = f" (with its branches for training on it raises {type(error).__name__}: {error})"
    if not left:
        return True
    odd = shorten(list(peculiarities(model)), 2)
    raise PruningError(
        f"what {shorten(left)} reads cannot be followed: no forward of a copy of this "
        f"{type(model).__name__} on an image of shape {tuple(image.shape)} reaches it{why}"
        f"{odd and f' ({odd})'}, so it might no longer fit the pruned net; take it out and switch its "
        "use off first (as aux_logits=False does), or give the input_size that it takes in training"
    )


def to_inference_(model: nn.Module, *, branches: bool) -> nn.Module:
    """Eval mode, but with `branches` modules that hold others take their branch for training.

    Norms, dropout and other layers stay in eval mode, so answers do not depend on the batch.
    """
    for module in model.modules():
        module.training = branches and next(module.children(), None) is not None
    return model


def tensors(output: object) -> list[Tensor]:
    """All floating-point tensors in what a model returned."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _unreached(model: nn.Module, image: Tensor, *, branches: bool) -> list[str]:
    """The modules with weights of their own that no answer depends on.

    What runs without gradients cannot tell, and counts as reached.
    """
    net = to_inference_(copy.deepcopy(model).cpu().float(), branches=branches)
    ran: set[nn.Module] = set()

    def note(module: nn.Module, _: Any, output: object) -> None:
        if not any(x.requires_grad for x in tensors(output)):
            ran.add(module)

    for module in net.modules():
        module.register_forward_hook(note)
    weights = [p.requires_grad_() for p in net.parameters() if p.is_floating_point()]
    with torch.enable_grad():
        answers = [x.sum() for x in tensors(net(image)) if x.requires_grad]
        slopes = torch.autograd.grad(answers, weights, allow_unused=True) if answers else ()
    used = {p for p, slope in zip(weights, slopes, strict=False) if slope is not None}
    owners = {
        name: module in ran or not used.isdisjoint(module.parameters(recurse=False))
        for name, module in net.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    found: list[str] = []  # whole modules rather than each of their layers
    for name, _ in net.named_modules():
        inside = [
            reached for owner, reached in owners.items() if f"{owner}.".startswith(f"{name}.")
        ]
        if (
            name
            and inside
            and not any(inside)
            and not name.startswith(tuple(f"{n}." for n in found))
        ):
            found.append(name)
    return found
