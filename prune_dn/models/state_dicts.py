"""From a plain state dict to the config that it fits, and to the net."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from prune_dn.base import limits
from prune_dn.errors import ConfigError, ConversionError
from prune_dn.models.config import DenseNetConfig, LayerConfig, Stem, TransitionConfig
from prune_dn.models.dense_net import DenseNet, build_empty
from prune_dn.models.light_cnn import LightCNN
from prune_dn.models.light_cnn_config import LightCNNConfig
from prune_dn.models.light_cnn_keys import infer_light_cnn, is_light_cnn
from prune_dn.models.weights import COUNTER, EXPECTED, find_weights, shorten, unusable

Net = DenseNet | LightCNN

_LAYER_KEY = re.compile(r"features\.denseblock(\d{1,9})\.(denselayer(\d{1,9}))\.")
_TRANSITION_KEY = re.compile(r"features\.transition(\d{1,9})\.")


def from_state_dict(state_dict: Mapping[str, Any], *, ema: bool = False) -> Net:
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


def net_of(tensors: Mapping[str, Tensor]) -> Net:
    """The net that fits `tensors`, with their dtype. Raises ConversionError for what is none."""
    check_usable(tensors)
    if is_light_cnn(tensors):
        return fill(infer_light_cnn(tensors), tensors)
    return fill(infer_config(tensors), tensors)


def check_usable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ConversionError for tensors that no net can compute with (see `unusable`)."""
    problems = list(unusable(tensors))
    if problems:
        raise ConversionError(f"no net can run with these weights: {shorten(problems)}")


def infer_config(tensors: Mapping[str, Tensor]) -> DenseNetConfig:
    """The config that fits `tensors` (as `clean_state_dict` gives them)."""
    conv0 = _tensor(tensors, "features.conv0", 4)
    _check_head(tensors)
    linear = _tensor(tensors, "classifier", 2)
    stem = _stem(tensors, conv0)
    numbers = sorted(
        {(int(m[1]), int(m[3]), m[2]) for m in map(_LAYER_KEY.match, tensors) if m is not None}
    )
    ends = {int(m[1]) for m in map(_TRANSITION_KEY.match, tensors) if m is not None}
    n_blocks = max([1, *(b for b, _, _ in numbers), *(b + 1 for b in ends)])
    if len(numbers) + n_blocks > limits.LAYERS:
        raise ConversionError(f"there are more than {limits.LAYERS:,} layers and blocks")
    width, blocks, transitions = conv0.shape[0], [], []
    for b in range(1, n_blocks + 1):
        layers = []
        for name in (name for block, _, name in numbers if block == b):
            layers.append(_layer(tensors, f"features.denseblock{b}.{name}", name, width))
            width += layers[-1].out_channels
        blocks.append(tuple(layers))
        if b < n_blocks:
            conv = _reader(tensors, f"features.transition{b}.conv", width)
            width = conv.shape[0]
            transitions.append(TransitionConfig(width))
    _check_read("classifier", linear, width)
    try:
        return DenseNetConfig(
            num_init_features=conv0.shape[0],
            blocks=tuple(blocks),
            transitions=tuple(transitions),
            num_classes=linear.shape[0],
            in_channels=conv0.shape[1],
            stem=stem,
        )
    except ConfigError as error:
        raise ConversionError(f"the tensors do not fit a DenseNet: {error}") from error


def empty_net(config: DenseNetConfig | LightCNNConfig) -> Net:
    """A net without weights, on the meta device (see `build_empty`)."""
    if isinstance(config, DenseNetConfig):
        return build_empty(config)
    with torch.device("meta"):
        return LightCNN(config)


@overload
def fill(
    config: DenseNetConfig, tensors: Mapping[str, Tensor], *, share: bool = False
) -> DenseNet: ...
@overload
def fill(
    config: LightCNNConfig, tensors: Mapping[str, Tensor], *, share: bool = False
) -> LightCNN: ...


def fill(
    config: DenseNetConfig | LightCNNConfig, tensors: Mapping[str, Tensor], *, share: bool = False
) -> Net:
    """A net of this config that holds copies of `tensors`, with their dtype and device.

    With `share` it holds the tensors themselves.

    Missing counters (`num_batches_tracked`) become 0. Raises ConversionError with the list of
    tensors that are missing, unexpected or of another shape.
    """
    layers = config.layers if isinstance(config, LightCNNConfig) else sum(config.blocks, ())
    if len(layers) > len(tensors):  # before so many are made
        raise ConversionError(f"{len(tensors)} tensors do not fit a net of {len(layers)} layers")
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
            yield f"{name} has shape {_shape(found[name])} where {_shape(tensor)} is needed"
        elif tensor.is_floating_point() and not found[name].is_floating_point():
            yield f"{name} has dtype {found[name].dtype} where floating point is needed"
    yield from (f"{name} is unexpected" for name in found if name not in expected)


def _check_head(tensors: Mapping[str, Tensor]) -> None:
    """Raise ConversionError where the classifier is something else than one linear layer."""
    if "classifier.weight" in tensors:
        return
    head = [name for name in tensors if not name.startswith("features.")]
    linear = [n for n in head if n.endswith(".weight") and tensors[n].dim() == 2]
    if len(linear) == 1:
        where = linear[0].removesuffix(".weight")
        remedy = (
            f"If {where} is all of it (but dropout, or a sigmoid on its answers), rename {where}.weight "
            f"and {where}.bias to classifier.weight and classifier.bias; else pass"
        )
    else:
        remedy = "Pass"
    raise ConversionError(
        "this is a DenseNet with another head than one linear layer (classifier.weight, "
        f"classifier.bias): it has {shorten(head) or 'none'}. {remedy} the module itself to "
        "prune_dn.prune"
    )


def _stem(tensors: Mapping[str, Tensor], conv0: Tensor) -> Stem:
    kernel, norm = tuple(conv0.shape[2:]), "features.norm0.weight" in tensors
    if "features.conv1.weight" in tensors:
        raise ConversionError(
            "the stem has several convs (features.conv0, features.conv1), as in timm's '...d' "
            "variants; only the 3x3 stem for small images and the 7x7 stem are supported"
        )
    if kernel == (3, 3) and not norm:
        return "cifar"
    if kernel == (7, 7) and norm:
        return "imagenet"
    raise ConversionError(
        f"the stem is a {kernel[0]}x{kernel[1]} conv {'with' if norm else 'without'} "
        "features.norm0; supported are 3x3 without norm0 and 7x7 with norm0"
    )


def _layer(tensors: Mapping[str, Tensor], where: str, name: str, width: int) -> LayerConfig:
    conv1 = _reader(tensors, f"{where}.conv1", width)
    if conv1.shape[2:] == (3, 3):
        return LayerConfig(name, conv1.shape[0])
    conv2 = _tensor(tensors, f"{where}.conv2", 4)
    return LayerConfig(name, conv2.shape[0], bottleneck=conv1.shape[0])


def _reader(tensors: Mapping[str, Tensor], where: str, width: int) -> Tensor:
    conv = _tensor(tensors, where, 4)
    _check_read(where, conv, width)
    return conv


def _check_read(where: str, weight: Tensor, width: int) -> None:
    read = weight.shape[1]
    if read < width:
        raise ConversionError(
            f"{where} reads {read} of the {width} channels before it. In a net with MFM or with "
            "pruned edges that is right, but a plain state dict does not say which: load the "
            ".safetensors file that prune_dn.save wrote"
        )
    if read > width:
        raise ConversionError(f"{where} reads {read} channels, but only {width} are made before it")


def _tensor(tensors: Mapping[str, Tensor], where: str, dim: int) -> Tensor:
    weight = tensors.get(f"{where}.weight")
    if weight is None:
        seen = shorten(list(tensors)) or "no keys"
        raise ConversionError(
            f"this is no DenseNet: {where}.weight is missing; expected {EXPECTED}; found {seen}"
        )
    if weight.dim() != dim or 0 in weight.shape:
        raise ConversionError(f"{where}.weight has shape {_shape(weight)}; it needs {dim} sizes")
    return weight


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
