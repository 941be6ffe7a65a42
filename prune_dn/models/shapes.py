"""Fit a dense net to the tensors of a narrower one of the same class: the shapes say what was cut."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prune_dn.errors import ConversionError

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_FITTING = (_ConvNd, nn.Linear, nn.PReLU, nn.LayerNorm, nn.RMSNorm, _NormBase, nn.GroupNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class _Place(NamedTuple):
    """A parameter or buffer of a module: `held[key]`."""

    owner: str
    module: nn.Module
    held: dict[str, Any]
    key: str


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that has several names by the first of them.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> net[1].weight = net[0].weight
    >>> list(own_tensors(net))
    ['0.weight']
    """
    return {name: _at(places[0]) for name, places in _places(model).items()}


def aliases(model: nn.Module) -> dict[str, str]:
    """The further names of tensors in a state dict, each with the first one."""
    found = own_tensors(model)
    first = {id(tensor): name for name, tensor in found.items()}
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {n: first[id(t)] for n, t in every if n not in found and id(t) in first}


def fit_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` in the place of the model's own, and set the widths that modules remember.

    Each has the name, the rank and at most the sizes of the model's own. Convolutions (1-D to 3-D, grouped,
    depthwise, transposed), linear layers, norms and PReLU get the widths that their tensors have; so do
    parameters of other people's modules. Of a group norm whole groups went, where that can be. The tensors
    are not copied; `requires_grad` stays.

    Raises ConversionError, with the first tensor that does not fit and both shapes, before anything is
    changed.
    """
    places = _places(model, tensors)
    for problem in _misfits({name: _at(found[0]) for name, found in places.items()}, tensors):
        raise ConversionError(problem)
    narrower = {
        place.owner: place.module
        for name, found in places.items()
        for place in found
        if _at(place).shape != tensors[name].shape
    }
    for problem in filter(None, (_unknown(name, module) for name, module in narrower.items())):
        raise ConversionError(problem)
    for name, found in places.items():
        old, new = _at(found[0]), tensors[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for place in found:
            place.held[place.key] = new
    for name, module in narrower.items():
        set_widths_(module, name)


def set_widths_(layer: nn.Module, name: str = "") -> None:
    """Set the widths that a layer remembers to those of its tensors, and the groups of a depthwise conv.

    Raises ConversionError where its tensors have no common width.
    """
    weight: Tensor | None = layer._parameters.get("weight")
    outputs: int | None = None
    if isinstance(layer, _ConvNd) and weight is not None:
        outputs = _set_conv_(layer, weight)
        if outputs is None:
            raise ConversionError(
                f"{name}.weight of shape {_shape(weight)} has no {layer.groups} groups"
            )
    elif isinstance(layer, nn.Linear) and weight is not None:
        outputs = layer.out_features = weight.shape[0]
        layer.in_features = weight.shape[1]
    elif isinstance(layer, nn.PReLU) and weight is not None:
        layer.num_parameters = len(weight)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, _NormBase | nn.GroupNorm):
        outputs = len(_vectors(layer)[0])
        if isinstance(layer, _NormBase):
            layer.num_features = outputs
        else:
            size = layer.num_channels // layer.num_groups
            if outputs % size == 0:  # whole groups went
                layer.num_groups = outputs // size
            layer.num_channels = outputs
            if outputs % layer.num_groups:
                raise ConversionError(f"{name} has {outputs} channels in {layer.num_groups} groups")
    elif isinstance(getattr(layer, "channels", None), int):  # as in BlurPool
        kernels = [t for t in layer._buffers.values() if t is not None and _is_depthwise(t)]
        if kernels:
            vars(layer)["channels"] = len(kernels[0])
    if outputs is not None and any(len(t) != outputs for t in _vectors(layer)):
        sizes = ", ".join(_shape(t) for t in _vectors(layer))
        raise ConversionError(f"{name} has {outputs} outputs, and vectors of {sizes} numbers")


def _is_depthwise(kernel: Tensor) -> bool:
    return kernel.ndim > 2 and kernel.shape[1] == 1


def _set_conv_(layer: _ConvNd, weight: Tensor) -> int | None:
    """The outputs, which are set with inputs and groups; None where groups do not divide them."""
    transposed = isinstance(layer, _ConvTransposeNd)
    if 1 < layer.groups == layer.in_channels:
        copies = layer.out_channels // layer.in_channels
        layer.groups = weight.shape[0] // (1 if transposed else copies)
    first, second = weight.shape[0], weight.shape[1] * layer.groups
    layer.in_channels, layer.out_channels = (first, second) if transposed else (second, first)
    return None if first % layer.groups or not layer.groups else layer.out_channels


def _vectors(layer: nn.Module) -> list[Tensor]:
    """The bias of a layer, and all that a norm has for each channel."""
    held = {**layer._parameters, **layer._buffers}
    keys = ("bias",) if isinstance(layer, _ConvNd | nn.Linear) else _PER_CHANNEL
    return [t for key in keys if (t := held.get(key)) is not None]


def _unknown(name: str, module: nn.Module) -> str | None:
    """Why a module of PyTorch that remembers widths in its own way cannot be made narrower."""
    theirs = (c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
    base = next(c for c in theirs if c not in _CONTAINERS)
    if isinstance(module, _FITTING) or base is nn.Module:
        return None
    return f"{name} is a {base.__name__}, which cannot be made narrower here"


def _misfits(mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    """The differences of the tensors from the model's own beyond their widths, in the model's order."""
    for name, own in mine.items():
        if name not in given:
            yield f"{name}, of shape {_shape(own)} in the model, is not in the file"
    for name, tensor in given.items():
        if name not in mine:
            yield f"{name}, of shape {_shape(tensor)} in the file, is not in the model"
    for name, own in mine.items():
        tensor = given[name]
        wider = any(a > b for a, b in zip(tensor.shape, own.shape, strict=False))
        emptied = 0 in tensor.shape and 0 not in own.shape
        kernel = tensor.shape[2:] != own.shape[2:] and sum(size > 1 for size in own.shape) > 1
        if tensor.ndim != own.ndim or wider or emptied or kernel:
            yield f"{name} has shape {_shape(tensor)} in the file and {_shape(own)} in the model"
        elif tensor.is_floating_point() != own.is_floating_point():
            yield f"{name} has dtype {tensor.dtype} in the file and {own.dtype} in the model"


def _places(model: nn.Module, also: Container[str] = ()) -> dict[str, list[_Place]]:
    """The places of each parameter and persistent buffer, by its first name, and buffers in `also`."""
    first: dict[int, str] = {}
    found: dict[str, list[_Place]] = {}
    for owner, module in model.named_modules():
        lost = module._non_persistent_buffers_set
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                own = f"{owner}.{key}".lstrip(".")
                if tensor is not None and (key not in lost or own in also):
                    name = first.setdefault(id(tensor), own)
                    found.setdefault(name, []).append(_Place(owner, module, held, key))
    return found


def _at(place: _Place) -> Tensor:
    tensor = place.held[place.key]
    assert tensor is not None
    return tensor


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
