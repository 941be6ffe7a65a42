"""Static quantisation by onnxruntime's own tool: QDQ, unsigned activations, signed weights per channel.

How one quantises decides. Signed activations, the tool's default, are slower than float32 on CPUs with VNNI.
Quantised concatenations convert every map for every reader, so in a DenseNet convolutions and linear layers alone
are faster; nets with sums or gates may be faster with everything quantised. `quantize` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_dn.deploy import about
from prune_dn.deploy.onnx_files import open_onnx
from prune_dn.deploy.onnx_graphs import clear_metadata_, layers_of
from prune_dn.deploy.quantising import Control, Source, quietly
from prune_dn.errors import ExportError

SETTINGS: Mapping[str, tuple[str, ...] | None] = {
    "layers": ("Conv", "Gemm", "MatMul"),
    "everything": None,
}
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # else the tool logs to the root


def quantise_onnx(
    source: Source, parts: Sequence[Path], setting: str, control: Control | None = None
) -> tuple[list[str], list[str]]:
    """Write the int8 net; names of all its layers, and of those that stay in float.

    With a `control`, the layers whose quantisation alone changes answers most stay in float: as few as it takes.
    """
    if control is None:
        return _write(source, parts, setting)
    layers, _ = _write(source, parts, setting)
    plain = open_onnx([source.onnx])
    wanted = [plain.run([x]) for x in source.few]

    def error(layer: str) -> float:
        _write(source, parts, "layers", only=[layer])
        small = open_onnx(parts)
        return sum(
            float(((a - b) ** 2).sum())
            for x, answers in zip(source.few, wanted, strict=True)
            for a, b in zip(small.run([x]), answers, strict=True)
        )

    worst = sorted(layers, key=error, reverse=True)

    def holds(count: int) -> bool:
        _write(source, parts, setting, leave=worst[:count])
        return control.holds(open_onnx(parts))

    low, high = 0, len(worst)  # no layer in float does not hold; all of them do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    if high == len(worst):
        raise ExportError(
            f"the metric falls by {control.fell():.4g} in int8, and by more than {control.max_drop:g} "
            "however many layers stay in float; allow a larger max_drop, or give more calibration images"
        )
    return _write(source, parts, setting, leave=worst[:high])


def _write(
    source: Source,
    parts: Sequence[Path],
    setting: str,
    only: Collection[str] = (),
    leave: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    proto = onnx.load(str(source.onnx))
    clear_metadata_(proto)
    onnx.helper.set_model_props(proto, dict([_PREPARED]))
    types = SETTINGS[setting]
    with quietly():
        quantize_static(
            proto,
            str(parts[0]),
            _reader(source),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if types is None else list(types),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(only),
            nodes_to_exclude=list(leave),
            calibration_cache_path=source.onnx.with_suffix(f".{setting}.json"),
        )
    written = onnx.load(str(parts[0]))
    layers, plain = layers_of(written.graph)
    clear_metadata_(written)
    onnx.helper.set_model_props(written, {about.KEY: source.told(plain)})
    onnx.save(written, str(parts[0]))
    return layers, plain


def _reader(source: Source) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Any] = iter(source.images)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.left, None)
            return None if images is None else {source.name: images}

    return Reader()


Quantise = Callable[..., tuple[list[str], list[str]]]
