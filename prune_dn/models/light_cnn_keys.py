"""From the tensors of a published Light CNN to the `LightCNNConfig` that they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from prune_dn.errors import ConfigError, ConversionError
from prune_dn.models.light_cnn_config import (
    STAGES,
    LightCNNConfig,
    MFMConfig,
    Place,
    Variant,
    places,
)

_BLOCK = re.compile(r"block([1-4])\.(\d+)\.conv1\.filter\.weight")


def infer_light_cnn(tensors: Mapping[str, Tensor]) -> LightCNNConfig:
    """The config that fits `tensors`. Raises ConversionError where shapes do not show one."""
    variant: Variant = "29" if "fc.filter.weight" in tensors else "29_v2"
    if "features.0.filter.weight" in tensors:
        variant = "9"
    depths = [0] * STAGES
    for stage, _ in (match.groups() for match in map(_BLOCK.fullmatch, tensors) if match):
        depths[int(stage) - 1] += 1
    where = places(variant, tuple(depths))
    layers = []
    for place in where:
        filters = _shape(tensors, place.name, 4 if place.kernel else 2)[0]
        if place.name.endswith(".filter") and filters % 2:
            raise ConversionError(
                f"{place.name}.weight has {filters} filters, which are no pairs. Where single "
                "filters were cut that is right, but a plain state dict does not say which: load "
                "the .safetensors file that prune_dn.save wrote"
            )
        alone = () if place.name.endswith(".filter") else tuple(range(filters))
        layers.append(MFMConfig((filters + len(alone)) // 2, alone))
    try:
        return LightCNNConfig(
            variant,
            tuple(depths),
            tuple(layers),
            num_classes=_shape(tensors, "fc2", 2)[0],
            in_channels=_shape(tensors, where[0].name, 4)[1],
            image_size=16 * _side(tensors, where[-1], layers[-2].units),
        )
    except ConfigError as error:
        raise ConversionError(f"the tensors do not fit a Light CNN: {error}") from error


def _side(tensors: Mapping[str, Tensor], linear: Place, units: int) -> int:
    """Height of the last maps: the linear layer reads each of their pixels."""
    read = _shape(tensors, linear.name, 2)[1]
    side = math.isqrt(max(read // units, 1))
    if side * side * units != read:
        raise ConversionError(
            f"{linear.name}.weight reads {read} numbers, which are not {units} square maps"
        )
    return side


def _shape(tensors: Mapping[str, Tensor], name: str, dim: int) -> tuple[int, ...]:
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.dim() != dim or 0 in weight.shape:
        what = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise ConversionError(
            f"these keys begin like a Light CNN's, but {name}.weight {what}; expected {dim} sizes"
        )
    return tuple(weight.shape)
