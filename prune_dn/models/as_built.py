"""A net of ours as its layers are: the config that they have, or why no config says it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.errors import ConversionError
from prune_dn.models.answers import computed_weights, difference, path_of, peculiarities
from prune_dn.models.families import (
    Modules,
    NetConfig,
    compared_on,
    default_image_size,
    empty_net,
    known_family,
    shares_memory,
)
from prune_dn.models.state_dicts import fill, misfits
from prune_dn.models.weights import clean_state_dict, is_counter, shorten

AnyNet = TypeVar("AnyNet", bound=nn.Module)
# Attributes of modules that say nothing of their own: tensors tell the widths, and the rest either
# does not change answers or is kept with the module.
_SILENT = {
    *("in_channels", "out_channels", "in_features", "out_features", "num_features"),
    *("training", "inplace", "momentum", "config", "memory_efficient"),
}
WAY_OUT = (
    "change that back, or give prune the net inside another module, nn.Sequential(model), which is "
    "cut as any other CNN"
)


def as_built(model: AnyNet, *, share: bool = False) -> AnyNet:
    """The net under the config that its layers have: itself where that is its own config.

    Else a plain net with copies of its tensors, or with `share` the same in memory. Classes and
    input channels are read from the weights, eps and dropout from the modules. Flags, `requires_grad`
    and momentum of norms are kept, hooks are not.

    Raises ConversionError for what no config says (another stride, a layer of another kind, computed
    weights), and where hooks or a forward of its own change what the net answers.

    >>> from prune_dn.models import densenet40
    >>> net = densenet40()
    >>> net.classifier = nn.Linear(456, 14)
    >>> net.config.num_classes, as_built(net).config.num_classes
    (10, 14)
    """
    refuse_computed(model)
    given: Any = model.config
    config = _config(given, dict(model.named_modules(remove_duplicate=False)))
    found: list[tuple[str, bool]] = list(_differences(model, _reference(config)))
    if problems := [text for text, certain in found if certain]:
        raise ConversionError(
            f"this {type(model).__name__} was changed so that no config describes it: "
            f"{shorten(problems, 3)}; {WAY_OUT}"
        )
    odd = [*(text for text, _ in found), *peculiarities(model)]
    if not odd and config == given:
        return model
    plain: Any = fill(config, clean_state_dict(model.state_dict()), share=share)
    if (device := next(model.parameters()).device).type != "meta":
        plain.to(device)  # the indices of readers, which no state dict holds
    if odd:
        check_same_answers(model, plain, odd)
    copy_modes_(plain, dict(model.named_modules(remove_duplicate=False)))
    if shares_memory(plain):
        plain.memory_efficient = getattr(model, "memory_efficient", False)
    return plain


def check_same_answers(given: nn.Module, ours: Any, causes: list[str]) -> None:
    """Raise ConversionError, naming the possible causes, where the two answer differently.

    Where there may be causes, images of the usual size are tried as well.
    """
    usual = default_image_size(ours.config)
    shapes = [compared_on(ours.config), (1, ours.config.in_channels, usual, usual)]
    tried = (difference(given, ours, shape) for shape in (shapes if causes else shapes[:1]))
    if (differs := next((text for text in tried if text is not None), None)) is not None:
        found = shorten(list(dict.fromkeys(causes)), 3)
        why = found or "not found; no hook, missing module or forward of its own is there"
        raise ConversionError(
            f"this {path_of(type(given))} does not compute what a plain "
            f"{type(ours).__name__} with its weights does: {differs}. The cause: {why}; {WAY_OUT}"
        )


def refuse_computed(model: nn.Module) -> None:
    """Raise ConversionError where weights are computed from others (masks, weight norm)."""
    if found := list(computed_weights(model)):
        raise ConversionError(
            f"this {type(model).__name__} has weights that are not its own: {shorten(found, 1)}"
        )


def copy_modes_(model: nn.Module, modules: Modules) -> None:
    """Give `model` the flags, the momentum and the `requires_grad` of the modules of these names."""
    for name, mine in model.named_modules():
        theirs = modules.get(name)
        if theirs is None:  # a part that only we have follows its parent
            theirs = modules[name.rpartition(".")[0]]
        mine.training = theirs.training
        if isinstance(mine, nn.BatchNorm2d) and isinstance(theirs, _BatchNorm):
            mine.momentum = theirs.momentum
        for key, parameter in mine._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(theirs.get_parameter(key).requires_grad)


def _config(config: Any, modules: Modules) -> Any:
    """The config, corrected by what tensors and modules say where they say it with one voice."""
    changes = known_family(config).told(config, modules)
    if all(getattr(config, field) == value for field, value in changes.items()):
        return config
    return dataclasses.replace(config, **changes)


@functools.lru_cache(maxsize=8)
def _reference(config: NetConfig) -> nn.Module:
    """What a net of this config is made of; only read, never handed out."""
    return empty_net(config)


def _differences(model: nn.Module, reference: nn.Module) -> Iterator[tuple[str, bool]]:
    """How modules, options and tensors differ, and whether that certainly is another net."""
    theirs, mine = (dict(net.named_modules(remove_duplicate=False)) for net in (model, reference))
    replaced = tuple(f"{n}." for n, m in mine.items() if not _replaces(theirs.get(n), m))
    for name, wanted in mine.items():
        if name.startswith(replaced):
            continue
        found = theirs.get(name)
        if found is None or not _replaces(found, wanted):
            instead = "missing" if found is None else path_of(type(found))
            yield f"{name} is {instead}, not a {type(wanted).__name__}", True
            continue
        if isinstance(wanted, _BatchNorm) and not isinstance(found, type(wanted)):
            yield f"{name} is a {type(found).__name__}", False
        for key, value in vars(wanted).items():
            other = getattr(found, key, None)
            if key[0] != "_" and key not in _SILENT and other != value:
                yield f"{name} has {key} {other!r}, not {value!r}", True
    for name in theirs.keys() - mine.keys():
        if not name.startswith(replaced):
            yield f"{name} ({type(theirs[name]).__name__}) is unknown", True
    if list(theirs) != list(mine):
        yield "its modules stand in another order", False
    tensors, expected = (
        dict(net.named_parameters(remove_duplicate=False))
        | dict(net.named_buffers(remove_duplicate=False))
        for net in (model, reference)
    )
    for counter in [name for name in tensors if is_counter(name)]:
        del tensors[counter]
        yield f"{counter} counts operations", False
    for text in misfits(expected, tensors):
        if not text.startswith(replaced):
            yield text, True
    for name, index in expected.items():
        same = tensors.get(name, index)
        if not index.is_meta and not same.is_meta and not torch.equal(same.cpu(), index.cpu()):
            yield f"{name} holds other indices than the config", True


def _replaces(found: nn.Module | None, wanted: nn.Module) -> bool:
    """Whether the class may do what is wanted; its answers must then show whether it does."""
    if isinstance(wanted, _BatchNorm):
        return isinstance(found, _BatchNorm)
    return isinstance(found, type(wanted))
