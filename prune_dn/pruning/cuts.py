"""Which outputs and inputs of each layer stay, and the tensors that this leaves."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.graph.inference import held
from prune_dn.graph.selecting import select_inputs_
from prune_dn.models.families import empty_net, shares_memory
from prune_dn.models.shapes import set_widths_
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.parts import Mask, Positions
from prune_dn.pruning.patches import Transposed
from prune_dn.pruning.subject import NetShape, Subject, shapes_of
from prune_dn.pruning.units import Units


class Cut(NamedTuple):
    """The outputs and the inputs of a layer that stay, in their new order; None = all, as they are.

    `width` is how many outputs it had.
    """

    outputs: Tensor | None
    inputs: Tensor | None
    width: int = 0


def cuts(units: Units, keep: Mask) -> dict[str, Cut]:
    """What stays of each layer that a closed `keep` changes."""
    readers = {reader.layer: reader for reader in units.graph.readers}
    behind = {
        s.reader.select: _changed(units.selected(s, keep)[0], s.edges.size)
        for s in units.selections
    }
    found = {}
    for producer in units.graph.producers:
        layer, width = producer.layer, len(producer.channels)
        outputs = _changed(units.outputs(layer, producer.channels, keep), width)
        inputs = _changed(units.inputs(readers[layer], keep), len(readers[layer].channels))
        found[layer] = Cut(outputs, inputs, width)
    for follower in units.graph.followers:
        at = units.unit(follower.channels)
        kept = _changed(units.kept(at, keep), len(at))
        found[follower.layer] = Cut(behind.get(follower.layer, kept), None, len(at))
    return {n: c for n, c in found.items() if c.outputs is not None or c.inputs is not None}


def cut_net(subject: Subject, units: Units, keep: Mask) -> nn.Module:
    """The net that a closed `keep` leaves, of the same class; nothing is shared, no gradients.

    One of ours is built anew from its config: hooks are not carried over. Any other is a copy.
    """
    kept = cuts(units, keep)
    if isinstance(subject.config, NetShape):
        net = copy.deepcopy(subject.model)
        net.zero_grad(set_to_none=True)
        for name, cut in kept.items():
            _shrink_(net, name, cut)
        for selection in units.selections:
            norm = net.get_submodule(str(selection.reader.select))
            positions = units.selected(selection, keep)[1]
            width = len(units.kept(selection.stream, keep))
            select_inputs_(norm, _changed(positions, width))
        return net
    old_modules = dict(subject.model.named_modules())
    device = next(subject.model.parameters()).device
    net = empty_net(subject.config.after(indices_of(units, keep)))
    for name, new in net.named_modules():
        old = old_modules[name]
        new.training = old.training
        if new._parameters:
            _fill_(new, old, kept.get(name, Cut(None, None)))
        else:  # the indices of a reader or an MFM
            for key, index in new._buffers.items():
                if index is not None:
                    new._buffers[key] = index.to(device)
        if isinstance(new, nn.BatchNorm2d) and isinstance(old, _BatchNorm):
            new.momentum = old.momentum
    if shares_memory(net):
        net.memory_efficient = subject.model.memory_efficient
    return net


def shape_after(subject: Subject, units: Units, keep: Mask) -> NetShape:
    """The shape of the net without a config that a closed `keep` leaves."""
    before = subject.config
    assert isinstance(before, NetShape)
    kept = indices_of(units, keep)
    groups = {
        name: (kind, len(kept.get(name, range(size))))
        for name, (kind, size) in before.groups.items()
    }
    tensors = shapes_of(cut_net(subject, units, keep))
    return NetShape(before.model, tensors, groups, before.inputs)


def _fill_(new: nn.Module, old: nn.Module, cut: Cut) -> None:
    """Give a layer what stays of another one's tensors."""
    for key, parameter in old._parameters.items():
        if parameter is not None:
            kept = _kept(old, key, parameter.detach(), cut)
            new._parameters[key] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    for key, buffer in old._buffers.items():
        if buffer is not None:
            new._buffers[key] = _kept(old, key, buffer, cut)


def _shrink_(net: nn.Module, name: str, cut: Cut) -> None:
    """Leave a layer, or a bare parameter or buffer, what stays of it."""
    layer = held(net, name)
    if isinstance(layer, nn.Module):
        _fill_(layer, layer, cut)
        set_widths_(layer, name)
        return
    parent, _, key = name.rpartition(".")
    axis = next((d for d, size in enumerate(layer.shape) if size > 1), 0)  # that of channels
    assert cut.outputs is not None
    new = layer.detach().index_select(axis, cut.outputs.to(layer.device))
    if isinstance(layer, nn.Parameter):
        new = nn.Parameter(new, requires_grad=layer.requires_grad)
    owner = net.get_submodule(parent)
    setattr(owner, key, new)
    owner._non_persistent_buffers_set.discard(key)  # its width cannot be built anew
    set_widths_(owner)


def _kept(layer: nn.Module, key: str, tensor: Tensor, cut: Cut) -> Tensor:
    """A copy of the part of a layer's parameter or buffer that stays, in the same memory format."""
    outputs, inputs, width = cut
    groups = int(getattr(layer, "groups", 1))
    new = tensor
    if key != "weight" or tensor.ndim < 2 or 1 < groups == getattr(layer, "in_channels", 0):
        copies = tensor.shape[1] if key == "weight" and isinstance(layer, Transposed) else 1
        if outputs is not None and tensor.ndim and len(tensor) * copies == width:
            rows = outputs[::copies] // copies  # of a transposed one a row for each input
            new = new.index_select(0, rows.to(tensor.device))
    elif groups > 1:
        new = _of_groups(tensor, groups, isinstance(layer, Transposed), cut)
    else:
        sides = (inputs, outputs) if isinstance(layer, Transposed) else (outputs, inputs)
        for dim, index in enumerate(sides):
            if index is not None:
                new = new.index_select(dim, index.to(tensor.device))
    for memory in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == 4 + (memory is torch.channels_last_3d) and not tensor.is_contiguous():
            return new.clone(memory_format=memory)
    return new.clone() if new is tensor else new


def _of_groups(weight: Tensor, groups: int, transposed: bool, cut: Cut) -> Tensor:
    """The weight of a grouped convolution, of which each group keeps equally many channels.

    Its first axis runs over the channels of all groups, the second over those of one.
    """
    outer, inner = (cut.inputs, cut.outputs) if transposed else (cut.outputs, cut.inputs)
    new = weight if outer is None else weight.index_select(0, outer.to(weight.device))
    if inner is None:
        return new
    width = weight.shape[1]
    parts = zip(new.chunk(groups), inner.to(weight.device).chunk(groups), strict=True)
    return torch.cat([part.index_select(1, index % width) for part, index in parts])


def _changed(kept: Positions, width: int) -> Tensor | None:
    return None if np.array_equal(kept, np.arange(width)) else torch.from_numpy(kept)
