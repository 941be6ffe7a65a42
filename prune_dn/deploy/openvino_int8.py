"""Static quantisation for OpenVINO by NNCF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_dn.base.runtimes import extra
from prune_dn.deploy.openvino_files import read_openvino, running_compiled, write_openvino
from prune_dn.deploy.quantising import Control, Source, quietly
from prune_dn.errors import ExportError

SETTINGS = {"performance": None}  # NNCF's default: symmetric, unsigned behind a ReLU
_SUBSET = 300  # images, NNCF's usual number for its statistics
_LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")


def quantise_openvino(
    source: Source, parts: Sequence[Path], setting: str, control: Control | None = None
) -> tuple[list[str], list[str]]:
    """Write the int8 net; names of all its layers, and of those that stay in float.

    With a `control`, NNCF's accuracy control puts layers back into float until the metric holds.
    """
    nncf = library()
    given = nncf.Dataset([x[None] for batch in source.images for x in batch])
    options: dict[str, Any] = {"subset_size": min(_SUBSET, sum(map(len, source.images)))}
    net = read_openvino([source.onnx])
    with quietly():
        if control is None:
            found = nncf.quantize(net, given, **options)
        else:
            found = _controlled(nncf, net, given, options, control)
    layers, plain = _layers_of(found)
    write_openvino(found, parts, source.told(plain))
    return layers, plain


def library() -> Any:
    """NNCF, which sends nobody word of its use. Raises RuntimeMissingError where it is not installed."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # no telemetry
    try:
        extra("openvino", "openvino")
        with quietly():
            nncf = extra("nncf", "openvino")
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    return nncf


def _controlled(nncf: Any, net: Any, given: Any, options: dict[str, Any], control: Control) -> Any:
    """As `nncf.quantize`, with as many layers in float as the metric needs."""
    raised: list[Exception] = []

    def metric(compiled: Any, _: Any) -> tuple[float, None]:
        try:
            return control.measure(running_compiled(compiled)), None
        except Exception as error:
            raised.append(error)
            raise

    try:
        return nncf.quantize_with_accuracy_control(
            net, given, given, metric, max_drop=control.max_drop, **options
        )
    except Exception as error:
        if raised:
            raise raised[0] from error
        raise ExportError(f"NNCF's accuracy control failed: {error}") from error


def _layers_of(net: Any) -> tuple[list[str], list[str]]:
    layers, plain = [], []
    for op in net.get_ordered_ops():
        if op.get_type_name() not in _LAYERS or not _weighted(op):
            continue
        layers.append(op.get_friendly_name().removesuffix("/WithoutBiases"))
        if not _quantised(op.input_value(0).get_node()):
            plain.append(layers[-1])
    return layers, plain


def _weighted(op: Any) -> bool:
    """Whether the second input is made of constants alone."""
    left = [op.input_value(1).get_node()]
    while left:
        node = left.pop()
        if node.get_type_name() == "Parameter":
            return False
        left += [node.input_value(n).get_node() for n in range(node.get_input_size())]
    return True


def _quantised(node: Any) -> bool:
    """Whether what a layer reads is quantised, maybe before it was pooled, reshaped or joined."""
    passing = ("Reshape", "MaxPool", "Concat", "Squeeze", "Unsqueeze", "Transpose")
    while node.get_type_name() in passing:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")
