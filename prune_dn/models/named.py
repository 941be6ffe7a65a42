"""Nets of torchvision and timm by name: what a file may ask for, and no more.

A file names a constructor, `torchvision/resnet18` or `timm/resnet18`, and plain options from a short list.
Only names that the libraries' own registries list are built, always without pretrained weights.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from prune_dn.base import limits
from prune_dn.errors import ConversionError
from prune_dn.models.answers import path_of

Option = bool | int | float | str | None
# What may be given, and the types that it may have.
_OPTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "torchvision": {
        "num_classes": (int,),
        "aux_logits": (bool,),
        "aux_loss": (bool,),
        "transform_input": (bool,),
        "dropout": (float,),
        "memory_efficient": (bool,),
    },
    "timm": {
        "num_classes": (int,),
        "in_chans": (int,),
        "global_pool": (str,),
        "act_layer": (str,),
        "output_stride": (int,),
        "drop_rate": (float,),
        "drop_path_rate": (float,),
        "features_only": (bool,),
    },
}
LIBRARIES = tuple(_OPTIONS)
_MOST = {"num_classes": limits.CHANNELS, "in_chans": limits.CHANNELS, "output_stride": 32}
_SILENT = {"training", "inplace", "memory_efficient", "grad_checkpointing"}


@dataclass(frozen=True)
class Named:
    """A constructor in a registry, and its options. Raises ConversionError for what none lists.

    >>> Named("torchvision/resnet18", {"num_classes": 10}).build().fc
    Linear(in_features=512, out_features=10, bias=True)
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library, _, name = self.name.partition("/")
        if library not in _OPTIONS:
            raise ConversionError(
                f"{self.name!r:.100} is no known net; write torchvision/NAME or timm/NAME"
            )
        if name not in _registered(_library(library)):
            raise ConversionError(f"{library} lists no net {name!r:.100}")
        for key, value in self.options.items():
            allowed = _OPTIONS[library].get(key)
            if allowed is None:
                raise ConversionError(
                    f"{key!r:.100} is no option of {self.name} here; choose from {', '.join(_OPTIONS[library])}"
                )
            right = type(value) in allowed or (float in allowed and type(value) is int)
            if not right or (key in _MOST and not 0 <= value <= _MOST[key]):  # type: ignore[operator]
                raise ConversionError(f"{key} of {self.name} is {value!r:.100}")

    def build(self, *, filled: bool = False) -> nn.Module:
        """The net with random weights where `filled`; else, as they are to come from a file, with large
        ones on the meta device.

        Raises ConversionError where the library cannot build it so.
        """
        library, _, name = self.name.partition("/")
        unfilled = nullcontext() if filled else _Unfilled()
        with warnings.catch_warnings(), torch.random.fork_rng([]), unfilled:
            warnings.simplefilter("ignore")
            try:
                if library == "timm":
                    net = _library(library).create_model(name, pretrained=False, **self.options)
                else:
                    builder = _library(library).get_model_builder(name)
                    keys = ("weights", "weights_backbone")
                    none = {k: None for k in keys if k in inspect.signature(builder).parameters}
                    net = builder(**none, **self.options)
            except Exception as error:  # whatever a library raises
                raise ConversionError(
                    f"{self.name} cannot be built with {dict(self.options)}: "
                    f"{type(error).__name__}: {str(error)[:500]}"
                ) from error
            assert isinstance(net, nn.Module)
        _fill_constants_(net)
        return net


def usual_image_size(model: nn.Module) -> int:
    """Pixels a side of the images that a net of timm was made for; 224 of any other."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    return int(size[-1]) if isinstance(size, tuple | list) else 224


def candidates(model: nn.Module) -> Iterator[Named]:
    """Constructors that may have made a net, by its class; whether one did is for answers to show."""
    library = type(model).__module__.partition(".")[0]
    if library == "timm":
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        name = cfg.get("architecture") if isinstance(cfg, Mapping) else None
        if not isinstance(name, str) or name not in _registered(_library(library)):
            return
        options: dict[str, Option] = {}
        if isinstance(classes := getattr(model, "num_classes", None), int):
            options["num_classes"] = classes
        first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
        if first is not None and first.in_channels != 3:
            options["in_chans"] = first.in_channels
        yield Named(f"timm/{name}", options)
    elif library == "torchvision":
        models = _library(library)
        weights = [p for p in model.parameters() if p.ndim >= 2]
        options = {"num_classes": weights[-1].shape[0]} if weights else {}
        for name in _registered(models):
            if models.get_model_builder(name).__module__ == type(model).__module__:
                yield Named(f"torchvision/{name}", options)


def other_make(model: nn.Module, built: nn.Module) -> str | None:
    """The differences between the modules of two nets of the same tensors: classes and plain options.

    The widths must have been made the same before.
    """
    mine, theirs = dict(model.named_modules()), dict(built.named_modules())
    if mine.keys() != theirs.keys():
        return f"its modules differ: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    for name, module in mine.items():
        other = theirs[name]
        if type(module) is not type(other):
            return f"{name or 'it'} is a {path_of(type(module))}, not a {path_of(type(other))}"
        found, wanted = _plain(module), _plain(other)
        for key in found.keys() | wanted.keys():
            if found.get(key) != wanted.get(key):
                place = f"{name}.{key}".lstrip(".")
                return f"{place} is {found.get(key)!r:.100}, not {wanted.get(key)!r:.100}"
    return None


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key[0] != "_" and key not in _SILENT and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _library(name: str) -> ModuleType:
    if name == "torchvision":
        import torchvision.models

        return torchvision.models
    try:
        import timm
    except ImportError as error:
        raise ConversionError("timm is needed to build this net: pip install timm") from error
    return timm


def _registered(library: ModuleType) -> list[str]:
    """The names that a library lists; of torchvision not those of quantised nets."""
    names: list[str] = library.list_models()
    return [name for name in names if not name.startswith("quantized_")]


def _fill_constants_(net: nn.Module) -> None:
    """Give buffers that no state dict holds, such as the kernel of a blur, what their modules put there."""
    for module in net.modules():
        lost = {k: module._buffers.get(k) for k in module._non_persistent_buffers_set}
        empty = {k: b for k, b in lost.items() if b is not None and b.is_meta}
        reset: Any = getattr(module, "reset_parameters", None)
        if empty and callable(reset):
            module._buffers.update({k: torch.empty_like(b, device="cpu") for k, b in empty.items()})
            reset()


class _Unfilled(TorchFunctionMode):
    """Makes empty tensors, which layers fill with random weights, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
