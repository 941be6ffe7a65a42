"""Turn a DenseNet of torchvision or timm, or a state dict, into ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.errors import ConversionError
from prune_dn.models.answers import path_of, peculiarities
from prune_dn.models.as_built import as_built, check_same_answers, copy_modes_, refuse_computed
from prune_dn.models.config import DenseNetConfig
from prune_dn.models.dense_net import DenseNet, ReadStream, Transition
from prune_dn.models.dense_net_keys import infer_config
from prune_dn.models.families import family_of
from prune_dn.models.state_dicts import fill, from_state_dict
from prune_dn.models.weights import clean_state_dict, shorten

__all__ = ["convert", "from_state_dict"]

_KNOWN = ("torchvision.models.densenet.DenseNet", "timm.models.densenet.DenseNet")
_CONV_FIELDS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_AVERAGE = ("avg", "fast", "fastavg")
# What a module that has no weights may be, by the last part of its name.
_PLAIN: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "pool0": (
        nn.MaxPool2d,
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False},
    ),
    "pool": (nn.AvgPool2d, {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False}),
    "head_drop": (nn.Dropout, {"p": 0.0}),
    "drop": (nn.Identity, {}),
    **{name: (nn.ReLU, {}) for name in ("act", "relu", "relu0", "relu1", "relu2")},
}


@usual_defaults()
def convert(module: nn.Module, *, share: bool = False) -> DenseNet:
    """Our DenseNet with the weights of `module`, a DenseNet of torchvision or timm, or ours.

    The weights are copied, or with `share` the same in memory, for a net that is only read. Train
    and eval modes, device, dtype, `requires_grad`, dropout, `memory_efficient`, and eps and momentum
    of the norms are kept; hooks are not. One of ours comes back as it is, or under the config that
    its layers now have (see `as_built`). `module` and its converted copy answer a random image in
    float64: the same answer is the condition (about 0.1 s for a densenet121).

    Raises ConversionError for wrapped models, variants with another stem, activation, norm or
    pooling, for everything that is no DenseNet, and where the answers differ: a module is missing,
    a hook or a forward of its own changes them.
    """
    if isinstance(module, DenseNet):
        return as_built(module, share=share)
    _check_class(module)
    refuse_computed(module)
    modules = dict(module.named_modules(remove_duplicate=False))
    _refuse(module, _plain_differences(modules))
    tensors = clean_state_dict(module.state_dict())
    model = fill(_with_options(module, infer_config(tensors)), tensors, share=share)
    _refuse(module, _conv_differences(modules, model))
    check_same_answers(module, model, [*_missing(modules, model), *peculiarities(module)])
    model.memory_efficient = any(
        getattr(m, "memory_efficient", False) or getattr(m, "grad_checkpointing", False)
        for m in modules.values()
    )
    copy_modes_(model, modules)
    return model


def as_ours(model: nn.Module, *, share: bool = False) -> Any:
    """A net of a family of ours as its layers are, and a plain DenseNet of torchvision or timm as ours.

    None for any other net, and for a variant of these. With `share` the weights are the same in memory.
    Raises ConversionError for a net of ours that was changed (see `as_built`).
    """
    if family_of(model) is not None:
        return as_built(model, share=share)
    if is_densenet(model):
        with suppress(ConversionError):
            return convert(model, share=share)
    return None


def is_densenet(module: object) -> bool:
    """Whether it is a DenseNet of ours, torchvision or timm, or a variant or subclass of one."""
    return isinstance(module, DenseNet) or bool(_known_classes(module))


def check_not_wrapped(module: object) -> None:
    """Raise ConversionError for DataParallel, compiled models and the like."""
    if isinstance(module, nn.Module) and (inner := _wrapped(module)):
        raise ConversionError(
            f"the model is wrapped in {type(module).__name__}; unwrap it: "
            f"pass model.{inner} and wrap the result again"
        )


def _wrapped(module: nn.Module) -> str | None:
    """The name of the module inside, where this one is a wrapper."""
    parts = [name for name, _ in module.named_children()]
    return parts[0] if parts in (["module"], ["_orig_mod"]) else None


def _known_classes(module: object) -> list[type]:
    return [c for c in type(module).__mro__ if path_of(c) in _KNOWN]


def _check_class(module: Any) -> None:
    check_not_wrapped(module)
    known = _known_classes(module)
    if not known:
        raise ConversionError(
            f"{_class_name(module)} is no DenseNet; pass a DenseNet of torchvision, timm or "
            "prune_dn (only `prune` takes other CNNs), or use from_state_dict for a state dict with "
            "torchvision's keys"
        )
    for name, part in module.named_modules():
        if inner := _wrapped(part):
            raise ConversionError(
                f"{name} is wrapped in {type(part).__name__}; unwrap it: "
                f"model.{name} = model.{name}.{inner}"
            )


def _with_options(module: nn.Module, config: DenseNetConfig) -> DenseNetConfig:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    layers = [m for n, m in module.named_modules() if n.rpartition(".")[2].startswith("denselayer")]
    eps = sorted({norm.eps for norm in norms} or {1e-5})
    drops = sorted({float(layer.drop_rate) for layer in layers} or {0.0})
    for what, values in (
        ("norms with different eps", eps),
        ("layers with different dropout", drops),
    ):
        if len(values) > 1:
            raise ConversionError(
                f"this {_class_name(module)} has {what} ({', '.join(map(str, values))}); "
                "give them one value before you convert it"
            )
    return dataclasses.replace(config, norm_eps=eps[0], drop_rate=drops[0])


def _plain_differences(modules: dict[str, nn.Module]) -> Iterator[str]:
    """What norms and modules without weights compute in another way than ours."""
    if "features.conv1" in modules:
        yield "its stem has several convs (features.conv0, features.conv1)"
    skipped: list[str] = ["global_pool"]
    for name, module in modules.items():
        kind, last = type(module).__name__, name.rpartition(".")[2]
        other = path_of(type(module)) if kind in ("Conv2d", "Linear", "ReLU") else kind
        if name == "global_pool" and getattr(module, "pool_type", kind) not in _AVERAGE:
            yield f"global_pool is {getattr(module, 'pool_type', kind)!r}, not 'avg'"
        elif any(name.startswith(f"{part}.") for part in skipped):
            continue
        elif last in _PLAIN:
            expected, options = _PLAIN[last]
            if type(module) is not expected:
                skipped.append(name)
                yield f"{name} is {other}, not {expected.__name__}"
                continue
            for option, value in options.items():
                found = getattr(module, option)
                if found != value and found != (value, value):
                    yield f"{name} has {option} {found}, not {value}"
        elif last.startswith("norm"):
            if type(module) is not nn.BatchNorm2d and kind != "BatchNormAct2d":
                skipped.append(name)
                yield f"{name} is {kind}, not BatchNorm2d"
        elif last.startswith("conv") or name == "classifier":
            needed = nn.Linear if name == "classifier" else nn.Conv2d
            if type(module) is not needed:
                skipped.append(name)
                yield f"{name} is {other}, not {needed.__name__}"
        elif name != "global_pool" and not list(module.children()):
            yield f"{name} ({kind}) is unknown"


def _conv_differences(modules: dict[str, nn.Module], model: DenseNet) -> Iterator[str]:
    for name, mine in model.named_modules():
        if isinstance(mine, nn.Conv2d):
            for field in _CONV_FIELDS:
                value, needed = getattr(modules[name], field), getattr(mine, field)
                if value != needed:
                    yield f"{name} has {field} {value}, not {needed}"


def _refuse(module: nn.Module, differences: Iterator[str]) -> None:
    found = list(differences)
    if found:
        raise ConversionError(
            f"this {_class_name(module)} is a variant that cannot be converted: {shorten(found, 3)}"
        )


def _missing(modules: dict[str, nn.Module], model: DenseNet) -> Iterator[str]:
    """Modules without weights that torchvision's and timm's nets have where ours calls a function."""
    for name, mine in model.named_modules():
        parent, _, last = name.rpartition(".")
        needed = [name]
        if isinstance(mine, Transition):
            needed.append(f"{name}.pool")
        if isinstance(mine, nn.BatchNorm2d) and name != "features.norm5":
            plain = type(modules[name]) is nn.BatchNorm2d  # timm's has its ReLU inside
            needed.append(f"{parent}.relu{last[4:]}" if plain else f"{name}.act")
        if not isinstance(mine, ReadStream | nn.ReLU):
            yield from (f"{n} is missing" for n in needed if n not in modules)


def _class_name(module: Any) -> str:
    return path_of(type(module))
