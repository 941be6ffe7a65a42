"""Coupled channels of any CNN, from torch-pruning's dependency graph: found, cut, checked."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from prune_dn.errors import PruningError
from prune_dn.models import LightCNN
from prune_dn.pruning.branches import tensors, to_inference_

Conv = nn.Conv2d | nn.ConvTranspose2d
Norm = _BatchNorm | nn.InstanceNorm2d
Layer = Conv | nn.Linear | Norm | nn.PReLU
Keep = dict[str, Tensor]  # the root of a group to the mask of its channels that stay

OUT, IN = 0, 1
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
    "num_parameters": OUT,
}
# Kinds of torch-pruning's nodes that pass channels on as they are.
_PASSED = {"ELEMENTWISE", "CONCAT", "RESHAPE", "EXPAND"}
_BARRIERS = {"OUTPUT": "an output of the net", "PARAMETER": "a bare parameter"}


@dataclass(frozen=True)
class Member:
    """A layer whose `channels`, on its side OUT, IN or both, are the group's channels `units`."""

    layer: str
    sides: tuple[int, ...]
    channels: Tensor
    units: Tensor


@dataclass(frozen=True)
class Group:
    """`size` coupled channels in `blocks` equal parts (of grouped convs) that lose equally many.

    `root` is a conv that makes them.
    """

    root: str
    size: int
    blocks: int
    members: tuple[Member, ...]


def find_groups(model: nn.Module, image: Tensor, *, branches: bool = False) -> list[Group]:
    """The conv outputs that can go, by what must go together; `image` (1, C, H, W) is passed through.

    With `branches` also through those that only training takes (see `branches`).

    Raises PruningError when the net cannot be followed, or nothing can go.
    """
    import torch_pruning  # takes a second: only those who need it wait

    net = copy.deepcopy(model).cpu().float()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                net,
                image,
                forward_fn=lambda model, x: to_inference_(model, branches=branches)(x),
                output_transform=lambda out: [x * 1 for x in tensors(out) if x.requires_grad],
                verbose=False,
            )
            ties = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.ConvTranspose2d)))
    except Exception as error:
        raise PruningError(
            f"torch-pruning cannot follow this {type(model).__name__} on an image of shape "
            f"{tuple(image.shape)} ({type(error).__name__}: {error})"
        ) from error
    names = {module: name for name, module in net.named_modules()}
    held = Counter(id(p) for m in names for p in m._parameters.values() if p is not None)
    shared = {p for p, times in held.items() if times > 1}
    found = [_group(tie, names, shared) for tie in ties]
    if groups := [group for group in found if isinstance(group, Group)]:
        return groups
    why = "; ".join(map(str, found[:3])) or "no conv is in what gradients of the answers reach"
    raise PruningError(f"no channels of this model can be cut: {why}")


def _group(tie: Any, names: dict[nn.Module, str], shared: set[int]) -> Group | str:
    """One group of torch-pruning's as ours, or why it must stay."""
    root = tie[0].dep.target.module
    size, blocks, members = root.out_channels, 1, []
    for item in tie.items:
        layer, kind = item.dep.target.module, item.dep.target.type.name
        if kind in _PASSED:
            continue
        if not isinstance(layer, Layer) or None in item.root_idxs:
            what = _BARRIERS.get(kind, f"a {type(layer).__name__}")
            return f"{names[root]} reaches {what}"
        computed = getattr(layer, "weight", None) is not layer._parameters.get("weight")
        if computed or any(id(p) in shared for p in layer._parameters.values()):
            return f"{names[root]} reaches {names[layer]}, whose weight is shared or computed"
        outward = item.dep.handler.__name__ == "prune_out_channels"
        channels, units = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        widths = dict(zip((OUT, IN), _widths(layer), strict=True))
        if int(channels.max()) >= widths[OUT if outward else IN]:
            return f"{names[root]} reaches {names[layer]} with another number of channels"
        if len(set(units.bincount(minlength=size).tolist())) > 1:
            return f"{names[root]} reaches {names[layer]} in part only"
        parts = 1 if channelwise(layer) else getattr(layer, "groups", 1)
        if parts > 1:
            whole = channels.equal(units) and channels.equal(torch.arange(size))
            if not isinstance(layer, nn.Conv2d) or parts == layer.out_channels or not whole:
                return f"{names[root]} reaches {names[layer]}, a grouped conv of an unusual kind"
            blocks = math.lcm(blocks, parts)
        sides = (OUT, IN) if channelwise(layer) else (OUT if outward else IN,)
        if not isinstance(layer, nn.PReLU) or layer.num_parameters > 1:
            members.append(Member(names[layer], sides, channels, units))
    if not any(member.sides == (OUT,) for member in members):
        return f"{names[root]} passes the model's input on"
    return Group(names[root], size, blocks, tuple(members))


def cut(model: nn.Module, groups: list[Group], keep: Keep) -> nn.Module:
    """A copy of `model` with only the channels that stay; nothing is shared, no gradients."""
    net = copy.deepcopy(model)
    net.zero_grad(set_to_none=True)
    masks = _masks(model, groups, keep)
    for name, (outs, ins) in masks.items():
        layer: Any = net.get_submodule(name)
        for key, old in layer._parameters.items():
            if old is not None:
                new = _kept(layer, key, old.detach(), outs, ins)
                setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad))
        for key, old in layer._buffers.items():
            if old is not None and old.ndim:
                setattr(layer, key, _kept(layer, key, old, outs, ins))
        if isinstance(layer, Conv) and channelwise(layer):
            layer.groups = int(outs.sum())
        for key, side in _WIDTHS.items():
            if hasattr(layer, key):
                setattr(layer, key, int((outs, ins)[side].sum()))
    if isinstance(net, LightCNN):
        net.refit_({name: outs for name, (outs, _) in masks.items()})
    return net


def is_exact(
    model: nn.Module, groups: list[Group], keep: Keep, image: Tensor, *, branches: bool = False
) -> bool:
    """Whether cutting equals masking what convs and linear layers read; on the CPU, in float64.

    In float32, with a warning, where the net cannot run in float64. In a Light CNN, filters that go
    are minus infinity in their maximum as well.
    """
    try:
        return _is_exact(model, groups, keep, image.double(), branches)
    except RuntimeError as error:
        exact = _is_exact(model, groups, keep, image.float(), branches)
        warnings.warn(
            f"this {type(model).__name__} cannot run in float64 ({error}); that the pruned net equals "
            "the masked one was checked in float32",
            stacklevel=2,
        )
        return exact


def _is_exact(
    model: nn.Module, groups: list[Group], keep: Keep, image: Tensor, branches: bool
) -> bool:
    dense = to_inference_(copy.deepcopy(model).cpu().to(image.dtype), branches=branches)
    for name, masks in _masks(model, groups, keep).items():
        layer = dense.get_submodule(name)
        if isinstance(layer, Conv | nn.Linear) and not channelwise(layer):
            outs, ins = (~m if isinstance(layer, nn.Linear) else ~m[:, None, None] for m in masks)
            layer.register_forward_pre_hook(lambda _, x, ins=ins: x[0].masked_fill(ins, 0))
            if isinstance(model, LightCNN):
                layer.register_forward_hook(lambda _, x, y, o=outs: y.masked_fill(o, -math.inf))
    small = to_inference_(cut(model, groups, keep).cpu().to(image.dtype), branches=branches)
    with torch.no_grad():
        with _Narrowing() as narrowing:
            wanted = tensors(dense(image))
        try:
            pairs = list(zip(wanted, tensors(small(image)), strict=True))
        except (RuntimeError, ValueError, IndexError):
            return False
    double = image.dtype == torch.float64 and not narrowing.found
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
    """The weight of a conv or linear layer by what it reads: (outputs, inputs, height, width).

    Of a grouped conv, outputs are those of one group.
    """
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.transpose(0, 1)
    if isinstance(layer, nn.Conv2d):
        return torch.cat(weight.chunk(layer.groups), dim=1)
    return weight[:, :, None, None]


def channelwise(layer: nn.Module) -> bool:
    """Whether each output has its own one input: norms and depthwise convs."""
    if isinstance(layer, Conv):
        return 1 < layer.groups == layer.in_channels == layer.out_channels
    return not isinstance(layer, nn.Linear)


def _masks(model: nn.Module, groups: list[Group], keep: Keep) -> dict[str, tuple[Tensor, Tensor]]:
    """Which outputs and inputs of each layer stay; only of layers that lose some."""
    masks: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        stays = keep.get(group.root)
        if stays is None or bool(stays.all()):
            continue
        for member in group.members:
            if member.layer not in masks:
                outs, ins = _widths(model.get_submodule(member.layer))
                masks[member.layer] = torch.ones(outs).bool(), torch.ones(ins).bool()
            for side in member.sides:
                masks[member.layer][side][member.channels] &= stays[member.units]
    return masks


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    found = {side: getattr(layer, key) for key, side in _WIDTHS.items() if hasattr(layer, key)}
    return found[OUT], found.get(IN, found[OUT])


def _kept(layer: nn.Module, key: str, tensor: Tensor, outs: Tensor, ins: Tensor) -> Tensor:
    """The part of a layer's parameter or buffer that stays, in the same memory format."""
    if key != "weight" or channelwise(layer):
        new = _select(tensor, 0, outs)
    elif isinstance(layer, nn.ConvTranspose2d):
        new = _select(_select(tensor, 0, ins), 1, outs)
    else:
        parts = (x.chunk(getattr(layer, "groups", 1)) for x in (tensor, outs, ins))
        new = torch.cat([_select(_select(w, 0, o), 1, i) for w, o, i in zip(*parts, strict=True)])
    if tensor.ndim == 4 and not tensor.is_contiguous():
        return new.contiguous(memory_format=torch.channels_last)
    return new


def _select(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
