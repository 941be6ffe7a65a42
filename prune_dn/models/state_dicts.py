"""From a plain state dict to the config that it fits, and to the net."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from prune_dn.errors import ConversionError
from prune_dn.models.config import DenseNetConfig, LayerConfig, Stem, TransitionConfig
from prune_dn.models.dense_net import DenseNet, build_empty
from prune_dn.models.light_cnn import LightCNN
from prune_dn.models.light_cnn_config import LightCNNConfig
from prune_dn.models.light_cnn_keys import infer_light_cnn, is_light_cnn

Net = DenseNet | LightCNN

WRAPPERS = ("state_dict", "model")
EXPECTED = (
    "torchvision's DenseNet keys such as features.conv0.weight, "
    "features.denseblock1.denselayer1.norm1.weight, features.norm5.weight, classifier.weight"
)
_COUNTERS = ("total_ops", "total_params")  # left behind by thop
_OLD_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
_LAYER_KEY = re.compile(r"features\.denseblock(\d+)\.(denselayer(\d+))\.")
_TRANSITION_KEY = re.compile(r"features\.transition(\d+)\.")


def from_state_dict(state_dict: Mapping[str, Any]) -> Net:
    """Build the net whose weights these are; its widths are read from the tensors' shapes.

    A DenseNet's keys are torchvision's, or its old ones (`norm.1`), a Light CNN's those of the
    published code; `module.` and `_orig_mod.` are taken off, and `{"state_dict": ...}` or
    `{"model": ...}` is opened. The tensors are copied, with their dtype. What no tensor tells is
    taken as usual: dropout 0 and eps 1e-5; a Light CNN's dropout 0.5 and images of 16 pixels for
    each one of its last maps.

    Raises ConversionError if this is neither, or one whose structure shapes do not show: a DenseNet
    with MFM, readers that read only a part of the stream, an MFM layer that lost single filters.

    >>> from prune_dn.models import densenet40
    >>> from_state_dict(densenet40().state_dict()).config == densenet40().config
    True
    """
    tensors = clean_state_dict(state_dict)
    if is_light_cnn(tensors):
        return fill(infer_light_cnn(tensors), tensors)
    return fill(infer_config(tensors), tensors)


def clean_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict under torchvision's present keys. Nothing is copied."""
    for wrapper in WRAPPERS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            return clean_state_dict(state_dict[wrapper])
    if not isinstance(state_dict, Mapping):
        raise ConversionError(
            f"a state dict is a mapping of names to tensors, not {_kind(state_dict)}; "
            "pass model.state_dict()"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _OLD_KEY.sub(r"\1", str(key).replace("_orig_mod.", ""))
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name.rpartition(".")[2] in _COUNTERS:
            continue
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"the value of {key!r} is {_kind(value)}, not a tensor; expected {EXPECTED}"
            )
        if name in tensors:
            raise ConversionError(f"two keys of the state dict mean {name!r}; one is {key!r}")
        tensors[name] = value
    return tensors


def infer_config(tensors: Mapping[str, Tensor]) -> DenseNetConfig:
    """The config that fits `tensors` (as `clean_state_dict` gives them)."""
    conv0, linear = _tensor(tensors, "features.conv0", 4), _tensor(tensors, "classifier", 2)
    stem = _stem(tensors, conv0)
    numbers = sorted(
        {(int(m[1]), int(m[3]), m[2]) for m in map(_LAYER_KEY.match, tensors) if m is not None}
    )
    ends = {int(m[1]) for m in map(_TRANSITION_KEY.match, tensors) if m is not None}
    n_blocks = max([1, *(b for b, _, _ in numbers), *(b + 1 for b in ends)])
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
    return DenseNetConfig(
        num_init_features=conv0.shape[0],
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        num_classes=linear.shape[0],
        in_channels=conv0.shape[1],
        stem=stem,
    )


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
    model = empty_net(config)
    filled = {
        name: tensor.detach() if share else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    expected = model.state_dict()
    for name in expected.keys() - filled.keys():
        if name.endswith("num_batches_tracked"):
            filled[name] = torch.zeros((), dtype=torch.long)
    problems = list(misfits(expected, filled))
    if problems:
        kind = type(model).__name__
        raise ConversionError(f"the tensors do not fit a {kind}: {shorten(problems)}")
    model.load_state_dict(filled, assign=True)
    return model


def shorten(items: list[str], most: int = 6) -> str:
    """The first items, and how many more there are."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


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


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
