"""Coupled channels of any CNN, from torch-pruning's dependency graph: found, cut, checked."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from prune_dn.errors import PruningError

LAYERS = {"CONV", "DEPTHWISE_CONV", "LINEAR", "BN", "PRELU", "IN"}
PASSED = {"ELEMENTWISE", "CONCAT", "RESHAPE", "EXPAND"}
KINDS = {
    "OUTPUT": "an output of the net",
    "LN": "a layer norm",
    "GN": "a group norm",
    "PARAMETER": "a bare parameter",
}
OUT, IN = 0, 1
WIDTHS = {"out_channels": OUT, "in_channels": IN, "out_features": OUT, "in_features": IN}
WIDTHS |= {"num_features": OUT, "num_parameters": OUT}
Keep = dict[str, Tensor]  # the root of a group to the mask of its channels that stay


@dataclass(frozen=True)
class Member:
    """A layer whose `channels`, on its side OUT, IN or both, are the group's channels `units`."""

    layer: str
    sides: tuple[int, ...]
    channels: Tensor
    units: Tensor


@dataclass(frozen=True)
class Group:
    """`size` coupled channels in `blocks` equal parts (of grouped convs) that lose equally many."""

    root: str
    size: int
    blocks: int
    members: tuple[Member, ...]


def trace(model: nn.Module, inputs: Sequence[Any]) -> tuple[list[Group], dict[str, int]]:
    """The conv outputs that must go together, and how often a forward pass uses each weight."""
    import torch_pruning  # takes a second: only those who need it wait

    net = copy.deepcopy(model)
    names = {module: name for name, module in net.named_modules()}
    uses: dict[str, int] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        side = IN if isinstance(layer, _ConvTransposeNd) else OUT
        numbers = (output, args[0])[side].numel()
        uses[names[layer]] = uses.get(names[layer], 0) + numbers // _widths(layer)[side]

    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for layer in names:
        if isinstance(layer, _ConvNd | nn.Linear):
            layer.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                net,
                inputs,
                forward_fn=lambda net, inputs: net(*inputs),
                output_transform=lambda out: [x * 1 for x in _tensors(out) if x.requires_grad],
                verbose=False,
            )
            ties = list(graph.get_all_groups(root_module_types=(_ConvNd,)))
    except Exception as error:
        raise PruningError(
            f"cannot trace the model on example_inputs ({type(error).__name__}: {error}): give what "
            "it takes in eval mode; if it takes this, torch-pruning cannot follow its operations"
        ) from error
    held = Counter(id(p) for m in names for p in m._parameters.values() if p is not None)
    shared = {p for p, times in held.items() if times > 1}
    found = [_group(tie, names, shared) for tie in ties]
    if not (groups := [group for group in found if isinstance(group, Group)]):
        raise PruningError(
            f"no channels of this model can be cut: {'; '.join(map(str, found[:3]))}"
        )
    return groups, uses


def _group(tie: Any, names: dict[nn.Module, str], shared: set[int]) -> Group | str:
    """One group of torch-pruning's as ours, or why it must stay."""
    root = tie[0].dep.target.module
    size, blocks, members = _widths(root)[OUT], 1, []
    for item in tie.items:
        layer, kind = item.dep.target.module, item.dep.target.type.name
        if kind in PASSED:
            continue
        if kind not in LAYERS or None in item.root_idxs:
            return f"{names[root]} reaches {KINDS.get(kind, f'a {kind.lower()} operation')}"
        unusual = getattr(layer, "weight", None) is not layer._parameters.get("weight")
        if unusual or any(id(p) in shared for p in layer._parameters.values()):
            return f"{names[root]} reaches {names[layer]}, whose weight is shared or computed"
        groups = getattr(layer, "groups", 1)
        if groups > 1 and not _single(layer):
            whole = item.idxs == item.root_idxs == list(range(size))
            if isinstance(layer, _ConvTransposeNd) or groups == layer.out_channels or not whole:
                return f"{names[root]} reaches {names[layer]}, a grouped conv of an unusual kind"
            blocks = math.lcm(blocks, groups)
        outward = item.dep.handler.__name__ == "prune_out_channels"
        sides = (OUT, IN) if _single(layer) else (OUT if outward else IN,)
        if getattr(layer, "num_parameters", 0) != 1:  # a PReLU's one slope is for all channels
            channels, units = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            members.append(Member(names[layer], sides, channels, units))
    if not any(member.sides == (OUT,) for member in members):
        return f"{names[root]} passes the model's input on"
    return Group(names[root], size, blocks, tuple(members))


def cut(model: nn.Module, groups: list[Group], keep: Keep) -> nn.Module:
    """A copy of `model` with only the channels that stay; nothing is shared, no gradients."""
    net = copy.deepcopy(model)
    net.zero_grad(set_to_none=True)
    for name, (outs, ins) in _masks(model, groups, keep).items():
        layer: Any = net.get_submodule(name)
        for key, old in [*layer._parameters.items(), *layer._buffers.items()]:
            if old is None or not old.ndim:
                continue
            if key != "weight" or _single(layer):
                new = _select(old.detach(), 0, outs)
            elif isinstance(layer, _ConvTransposeNd):
                new = _select(_select(old.detach(), 0, ins), 1, outs)
            else:
                parts = (x.chunk(getattr(layer, "groups", 1)) for x in (old.detach(), outs, ins))
                each = zip(*parts, strict=True)
                new = torch.cat([_select(_select(w, 0, o), 1, i) for w, o, i in each])
            if old.ndim == 4 and not old.is_contiguous():
                new = new.contiguous(memory_format=torch.channels_last)
            if key in layer._parameters:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(layer, key, new)
        if isinstance(layer, _ConvNd) and _single(layer):
            layer.groups = int(outs.sum())
        for key, side in WIDTHS.items():
            if hasattr(layer, key):
                setattr(layer, key, int((outs, ins)[side].sum()))
    return net


def _select(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))


def is_exact(model: nn.Module, groups: list[Group], keep: Keep, inputs: Sequence[Any]) -> bool:
    """Whether cutting equals masking what convs and linears read; random inputs, in float64."""
    generator = torch.Generator().manual_seed(0)
    random = [
        torch.randn(x.shape, generator=generator).double()
        if isinstance(x, Tensor) and x.is_floating_point()
        else (x.cpu() if isinstance(x, Tensor) else x)
        for x in inputs
    ]
    dense = copy.deepcopy(model).cpu().double().eval()
    for name, (_, ins) in _masks(model, groups, keep).items():
        layer = dense.get_submodule(name)
        if isinstance(layer, _ConvNd | nn.Linear) and not _single(layer):
            mask = ins.view(-1, *[1] * (layer.weight.ndim - 2))
            layer.register_forward_pre_hook(lambda _, args, mask=mask: args[0] * mask)
    small = cut(model, groups, keep).cpu().double().eval()
    with torch.no_grad():
        try:
            wanted = _tensors(dense(*random))
        except RuntimeError as error:
            raise PruningError(
                f"the check of the pruned net runs in float64 on the CPU, and the model cannot: {error}"
            ) from error
        try:
            pairs = list(zip(wanted, _tensors(small(*random)), strict=True))
        except (RuntimeError, ValueError, IndexError):
            return False
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * a.abs().max()) for a, b in pairs
    )


def weight_rows(layer: nn.Module, weight: Tensor, side: int) -> Tensor:
    """What makes (OUT) or reads (IN) each channel: (channels, numbers)."""
    if side == (IN if isinstance(layer, _ConvTransposeNd) else OUT) or _single(layer):
        return weight.flatten(1)
    parts = weight.chunk(getattr(layer, "groups", 1))
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])


def _masks(model: nn.Module, groups: list[Group], keep: Keep) -> dict[str, tuple[Tensor, ...]]:
    """Which outputs and inputs of each layer stay; only of layers that lose some."""
    masks: dict[str, tuple[Tensor, ...]] = {}
    for group in groups:
        for m in group.members if not keep.get(group.root, torch.ones(1)).all() else ():
            if m.layer not in masks:
                widths = _widths(model.get_submodule(m.layer))
                masks[m.layer] = tuple(torch.ones(w, dtype=torch.bool) for w in widths)
            for side in m.sides:
                masks[m.layer][side][m.channels] &= keep[group.root][m.units]
    return masks


def _single(layer: nn.Module) -> bool:
    """Whether each output has its own one input: norms and depthwise convs."""
    if isinstance(layer, _ConvNd):
        return 1 < layer.groups == layer.in_channels == layer.out_channels
    return not isinstance(layer, nn.Linear)


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    found = {side: getattr(layer, key) for key, side in WIDTHS.items() if hasattr(layer, key)}
    return found[OUT], found.get(IN, found[OUT])


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
