"""From the tensors of a DenseNet to the `DenseNetConfig` that they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from prune_dn.base import limits
from prune_dn.errors import ConfigError, ConversionError
from prune_dn.models.config import DenseNetConfig, LayerConfig, Stem, TransitionConfig
from prune_dn.models.weights import EXPECTED, shape_of, shorten

_LAYER_KEY = re.compile(r"features\.denseblock(\d{1,9})\.(denselayer(\d{1,9}))\.")
_TRANSITION_KEY = re.compile(r"features\.transition(\d{1,9})\.")


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
        raise ConversionError(f"{where}.weight has shape {shape_of(weight)}; it needs {dim} sizes")
    return weight
