"""Coupled channels of any CNN: found in its graph, cut, checked."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prune_dn.errors import PruningError
from prune_dn.graph import Graph, call, tensors, to_inference_
from prune_dn.graph.groups import IN, OUT, Group, free_groups
from prune_dn.models import LightCNN
from prune_dn.models.answers import peculiarities
from prune_dn.models.shapes import set_widths_
from prune_dn.models.weights import shorten
from prune_dn.pruning.patches import Convolution, Transposed

Conv = Convolution | Transposed
Norm = _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm
Layer = Conv | nn.Linear | Norm | nn.PReLU
Keep = dict[str, Tensor]  # the root of a group to the mask of its channels that stay

# What may be rounding, as a share of the largest answer: in float64 half of the digits, in float32
# what some hundred roundings make.
_ROUNDING = torch.finfo(torch.float64).eps ** 0.5
_ROUNDING_OF_FLOATS = 100 * torch.finfo(torch.float32).eps
_WIDTHS = {
    "out_channels": OUT,
    "in_channels": IN,
    "out_features": OUT,
    "in_features": IN,
    "num_features": OUT,
    "num_channels": OUT,
    "num_parameters": OUT,
}


def find_groups(model: nn.Module, graph: Graph) -> list[Group]:
    """The channels that can go, by what must go together.

    Raises PruningError where nothing can, with reasons, and for weights that the graph does not reach.
    """
    kind = type(model).__name__
    if graph.unreached:
        why = "" if graph.why_unreached is None else f" (in training mode {graph.why_unreached})"
        odd = shorten(list(peculiarities(model)), 2)
        raise PruningError(
            f"what {shorten(list(graph.unreached))} reads cannot be followed: no forward of a copy of "
            f"this {kind} on the example reaches it{why}{odd and f' ({odd})'}, so it might no longer "
            "fit the pruned net; where the net never uses it, put nn.Identity() in its place first, else "
            "switch its use off (as aux_logits=False does) or give an example that it takes in training"
        )
    if groups := free_groups(graph):
        return groups
    reasons = {p.layer: graph.why_fixed(p.layer) for p in graph.producers}
    found = [f"{layer} stays: {why}" for layer, why in reasons.items() if why is not None]
    raise PruningError(
        f"no channels of this {kind} can be cut: {shorten(found, 3) or 'no layer with weights is reached'}"
    )


def cut(model: nn.Module, groups: list[Group], keep: Keep) -> nn.Module:
    """A copy of `model` with only the channels that stay; nothing is shared, no gradients."""
    net = copy.deepcopy(model)
    net.zero_grad(set_to_none=True)
    masks = _masks(model, groups, keep)
    for name, (outs, ins) in masks.items():
        layer: Any = held(net, name)
        if isinstance(layer, Tensor):  # a bare parameter or buffer, cut along its axis of channels
            parent, _, key = name.rpartition(".")
            new = _select(layer.detach(), _axis(layer), outs)
            if isinstance(layer, nn.Parameter):
                new = nn.Parameter(new, requires_grad=layer.requires_grad)
            owner = net.get_submodule(parent)
            setattr(owner, key, new)
            owner._non_persistent_buffers_set.discard(key)  # its width cannot be built anew
            set_widths_(owner)
            continue
        depthwise = isinstance(layer, Conv) and channelwise(layer)
        for key, old in layer._parameters.items():
            if old is not None:
                new = _kept(layer, key, old.detach(), outs, ins)
                setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad))
        for key, old in layer._buffers.items():
            if old is not None and old.ndim and len(old) == len(outs):
                setattr(layer, key, _kept(layer, key, old, outs, ins))
        for key, side in _WIDTHS.items():
            if hasattr(layer, key):
                setattr(layer, key, int((outs, ins)[side].sum()))
        if depthwise:
            layer.groups = layer.in_channels
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_groups * layer.num_channels // len(outs)
    if isinstance(net, LightCNN):
        net.refit_({name: outs for name, (outs, _) in masks.items()})
    return net


def is_exact(
    model: nn.Module, groups: list[Group], keep: Keep, inputs: Any, *, branches: bool = False
) -> bool:
    """Whether cutting equals masking what convs and linear layers read; on the CPU, in float64.

    In float32, with a warning, where the net cannot run in float64. In a Light CNN, filters that go
    are minus infinity in their maximum as well.
    """
    try:
        return _is_exact(model, groups, keep, inputs, torch.float64, branches)
    except RuntimeError as error:
        exact = _is_exact(model, groups, keep, inputs, torch.float32, branches)
        warnings.warn(
            f"this {type(model).__name__} cannot run in float64 ({error}); that the pruned net equals "
            "the masked one was checked in float32",
            stacklevel=2,
        )
        return exact


def _is_exact(
    model: nn.Module,
    groups: list[Group],
    keep: Keep,
    inputs: Any,
    dtype: torch.dtype,
    branches: bool,
) -> bool:
    dense = to_inference_(copy.deepcopy(model).cpu().to(dtype), branches=branches)
    for name, masks in _masks(model, groups, keep).items():
        layer = held(dense, name)
        if isinstance(layer, Conv | nn.Linear) and not channelwise(layer):
            axes = 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2
            outs, ins = (~m.view(-1, *[1] * axes) for m in masks)
            layer.register_forward_pre_hook(lambda _, x, ins=ins: x[0].masked_fill(ins, 0))
            if isinstance(model, LightCNN):
                layer.register_forward_hook(lambda _, x, y, o=outs: y.masked_fill(o, -math.inf))
    small = to_inference_(cut(model, groups, keep).cpu().to(dtype), branches=branches)
    example = tree_map(lambda x: x.to(dtype) if _is_real(x) else x, inputs)
    with torch.no_grad():
        with _Narrowing() as narrowing:
            wanted = tensors(call(dense, example))
        try:
            pairs = list(zip(wanted, tensors(call(small, example)), strict=True))
        except (RuntimeError, ValueError, IndexError):
            return False
    double = dtype == torch.float64 and not narrowing.found
    rounding = _ROUNDING if double else _ROUNDING_OF_FLOATS
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= rounding * a.abs().max())
        for a, b in pairs
    )


class _Narrowing(TorchDispatchMode):
    """Notes whether any operation gives a narrower floating-point type than float64, which it took."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x.dtype != torch.float64 for x in tensors(out)):
            self.found |= any(x.dtype == torch.float64 for x in tensors(args))
        return out


def reading_weight(layer: nn.Module) -> Tensor:
    """The weight of a conv or linear layer by what it reads: (outputs, inputs, taps, 1).

    Of a grouped conv, outputs are those of one group.
    """
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, Transposed):
        weight = weight.transpose(0, 1)
    elif isinstance(layer, Convolution):
        weight = torch.cat(weight.chunk(layer.groups), dim=1)
    return weight.reshape(*weight.shape[:2], -1, 1)


def channelwise(layer: nn.Module) -> bool:
    """Whether each output has its own one input: norms and depthwise convs."""
    if isinstance(layer, Conv):
        return 1 < layer.groups == layer.in_channels
    return not isinstance(layer, nn.Linear)


def widths(model: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a layer, or the entries of a bare parameter twice."""
    layer = held(model, name)
    if isinstance(layer, Tensor):
        return layer.shape[_axis(layer)], layer.shape[_axis(layer)]
    found = {side: int(getattr(layer, key)) for key, side in _WIDTHS.items() if hasattr(layer, key)}
    return found[OUT], found.get(IN, found[OUT])


def held(model: nn.Module, name: str) -> nn.Module | Tensor:
    """A module, parameter or buffer by its name; the model itself by an empty one."""
    if not name:
        return model
    parent, _, key = name.rpartition(".")
    found: nn.Module | Tensor = getattr(model.get_submodule(parent), key)
    return found


def _axis(bare: Tensor) -> int:
    """The axis of channels of a bare parameter or buffer; the first of a depthwise kernel."""
    return next((d for d, size in enumerate(bare.shape) if size > 1), 0)


def kept_outputs(model: nn.Module, groups: list[Group], keep: Keep) -> dict[str, Tensor]:
    """The outputs that stay of each layer that loses some, (outputs left,)."""
    masks = _masks(model, groups, keep)
    return {name: outs.nonzero().flatten() for name, (outs, _) in masks.items() if not outs.all()}


def shifts(model: nn.Module, graph: Graph) -> set[str]:
    """The layers of which each output goes through a batch norm, which can move its mean."""
    normed = {
        int(c)
        for follower in graph.followers
        if isinstance(held(model, follower.layer), _BatchNorm)
        for c in graph.classes(follower.channels)
    }
    return {
        p.layer for p in graph.producers if normed.issuperset(graph.classes(p.channels).tolist())
    }


def _masks(model: nn.Module, groups: list[Group], keep: Keep) -> dict[str, tuple[Tensor, Tensor]]:
    """Which outputs and inputs of each layer stay; only of layers that lose some."""
    masks: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        stays = keep.get(group.root)
        if stays is None or bool(stays.all()):
            continue
        for member in group.members:
            if member.layer not in masks:
                outs, ins = widths(model, member.layer)
                masks[member.layer] = torch.ones(outs).bool(), torch.ones(ins).bool()
            for side in member.sides:
                # A depthwise conv may make several outputs of each input.
                sizes = [len(mask) for mask in masks[member.layer]]
                copies = sizes[OUT] // sizes[side] if len(member.sides) > 1 else 1
                channels, kept = member.channels[::copies] // copies, stays[member.units[::copies]]
                masks[member.layer][side][channels] &= kept
    return masks


def _kept(layer: nn.Module, key: str, tensor: Tensor, outs: Tensor, ins: Tensor) -> Tensor:
    """The part of a layer's parameter or buffer that stays, in the same memory format."""
    if key == "weight" and isinstance(layer, Transposed):
        new = _select(tensor, 0, ins)
        if not channelwise(layer):
            pairs = zip(new.chunk(layer.groups), outs.chunk(layer.groups), strict=True)
            new = torch.cat([_select(w, 1, o) for w, o in pairs])
    elif key != "weight" or channelwise(layer):
        new = _select(tensor, 0, outs)
    else:
        parts = (x.chunk(getattr(layer, "groups", 1)) for x in (tensor, outs, ins))
        new = torch.cat([_select(_select(w, 0, o), 1, i) for w, o, i in zip(*parts, strict=True)])
    for memory in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == 4 + (memory is torch.channels_last_3d) and not tensor.is_contiguous():
            return new.contiguous(memory_format=memory)
    return new


def _select(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
