"""From a plain state dict to the config that it fits, and to the net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prune_dn.errors import ConversionError
from prune_dn.models.families import NetConfig, empty_net, families, known_family
from prune_dn.models.weights import COUNTER, EXPECTED, find_weights, shape_of, shorten, unusable


def from_state_dict(state_dict: Mapping[str, Any], *, ema: bool = False) -> Any:
    """Build the net whose weights these are; its widths are read from the tensors' shapes.

    A DenseNet's keys are torchvision's, or its old ones (`norm.1`), a Light CNN's those of the
    published code. They may lie in any mapping of a checkpoint (`{"state_dict": ...}`) and behind any
    prefix (`module.`, `backbone.`); of plain and averaged weights the plain are taken, or with `ema` the
    averaged. The tensors are copied, with their dtype. What no tensor tells is taken as usual:
    dropout 0 and eps 1e-5; a Light CNN's dropout 0.5 and images of 16 pixels for each one of its
    last maps.

    Raises ConversionError if this is neither, or one whose structure shapes do not show (a DenseNet
    with MFM, readers that read only a part of the stream, an MFM layer that lost single filters), or
    where there is more than one net, weights that are not finite or no plain floating point.

    >>> from prune_dn.models import densenet40
    >>> weights = {"net": {f"backbone.{k}": v for k, v in densenet40().state_dict().items()}}
    >>> from_state_dict(weights).config == densenet40().config
    True
    """
    return net_of(find_weights(state_dict, ema=ema)[0].tensors())


def net_of(tensors: Mapping[str, Tensor]) -> Any:
    """The net of ours that fits `tensors`, with their dtype. Raises ConversionError for what is none."""
    check_usable(tensors)
    for family in families():
        if family.infer is not None and not tensors.keys().isdisjoint(family.firsts):
            return fill(family.infer(tensors), tensors)
    raise ConversionError(
        f"this is no net of ours; expected {EXPECTED}; found {shorten(list(tensors)) or 'no keys'}"
    )


def check_usable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ConversionError for tensors that no net can compute with (see `unusable`)."""
    problems = list(unusable(tensors))
    if problems:
        raise ConversionError(f"no net can run with these weights: {shorten(problems)}")


def fill(config: NetConfig, tensors: Mapping[str, Tensor], *, share: bool = False) -> Any:
    """A net of this config that holds copies of `tensors`, with their dtype and device.

    With `share` it holds the tensors themselves.

    Missing counters (`num_batches_tracked`) become 0. Raises ConversionError with the list of
    tensors that are missing, unexpected or of another shape.
    """
    layers = known_family(config).layers(config)
    if layers > len(tensors):  # before so many are made
        raise ConversionError(f"{len(tensors)} tensors do not fit a net of {layers} layers")
    model = empty_net(config)
    filled = {
        name: tensor.detach() if share else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    expected = model.state_dict()
    for name in expected.keys() - filled.keys():
        if name.endswith(COUNTER):
            filled[name] = torch.zeros((), dtype=torch.long)
    for name in filled:
        if name.endswith(COUNTER):  # some scripts halve it with the weights
            filled[name] = filled[name].long()
    problems = list(misfits(expected, filled))
    if problems:
        kind = type(model).__name__
        raise ConversionError(f"the tensors do not fit a {kind}: {shorten(problems)}")
    model.load_state_dict(filled, assign=True)
    return model


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """How `found` differs from the tensors that are needed: missing, unexpected, shape, dtype."""
    for name, tensor in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name].shape != tensor.shape:
            yield f"{name} has shape {shape_of(found[name])} where {shape_of(tensor)} is needed"
        elif tensor.is_floating_point() and not found[name].is_floating_point():
            yield f"{name} has dtype {found[name].dtype} where floating point is needed"
    yield from (f"{name} is unexpected" for name in found if name not in expected)
