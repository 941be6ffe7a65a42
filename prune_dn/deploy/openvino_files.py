"""OpenVINO files: an .xml with its .bin, written from a net, run by OpenVINO on the CPU."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import atomic_paths
from prune_dn.base.runtimes import Precision, extra
from prune_dn.deploy import about
from prune_dn.deploy.onnx_files import write_onnx
from prune_dn.deploy.preparing import LONGEST, ExportReport, prepare, verify
from prune_dn.deploy.running import Array, Running, Shape, answers
from prune_dn.errors import ExportError
from prune_dn.models.sizes import ImageSize

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of what is not quantised


def with_weights(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of a net: its .xml, and the .bin that OpenVINO looks for beside it."""
    return Path(path), Path(path).with_suffix(".bin")


@usual_defaults()
def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
    info: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a net for OpenVINO: `path` ends in .xml, and its weights go into a .bin beside it.

    As `export_onnx`: a float32 copy in eval mode with a dynamic batch, checked at batch 1 and 7, there in
    float32. Both files get their names, or none.

    Raises RuntimeMissingError where OpenVINO is not installed, and what `export_onnx` raises.
    """
    check_ending(path)
    openvino()
    net, inputs = prepare(model, image_size, example_inputs, in_channels)
    with atomic_paths(*with_weights(path)) as parts, tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "net.onnx"
        names = write_onnx(net, inputs, onnx_file)
        write_openvino(read_openvino([onnx_file]), parts, about.describe(info, precision="fp32"))
        running = open_openvino(parts)
        worst = verify(net, inputs, lambda x: answers(running, x, names), tolerance, "OpenVINO net")
        size = sum(part.stat().st_size for part in parts)
    return ExportReport(Path(path), size, worst)


def openvino() -> Any:
    """The library. Raises RuntimeMissingError where it is not installed."""
    return extra("openvino", "openvino")


@functools.cache
def core() -> Any:
    """OpenVINO's core, one for the process: compiled nets run in its plug-ins."""
    return openvino().Core()


def check_ending(path: str | os.PathLike[str]) -> None:
    """Raise ExportError unless a path ends in .xml."""
    if Path(path).suffix != ".xml":
        raise ExportError(f"{path} must end in .xml; OpenVINO's weights go into a .bin beside it")


def read_openvino(parts: Sequence[Path]) -> Any:
    """A net as OpenVINO holds it, from its two files or an ONNX file.

    Raises ExportError for files that it cannot read.
    """
    given = {"weights": str(parts[1])} if len(parts) > 1 else {}
    for part in parts:
        if not part.is_file():
            raise ExportError(
                f"there is no {part}; OpenVINO's nets are an .xml and a .bin beside it"
            )
    reader = core()
    try:
        return reader.read_model(str(parts[0]), **given)
    except Exception as error:
        raise ExportError(f"OpenVINO cannot read {parts[0]}: {str(error)[:LONGEST]}") from error


def openvino_of_onnx(onnx_file: Path, path: Path) -> None:
    """Write an ONNX file as the float net that it is, for OpenVINO."""
    write_openvino(
        read_openvino([onnx_file]), with_weights(path), about.describe({}, precision="fp32")
    )


def write_openvino(net: Any, parts: Sequence[Path], told: str) -> None:
    """Write both files of a net that OpenVINO holds, and what it says of itself."""
    net.set_rt_info(told, about.KEY)
    openvino().serialize(net, str(parts[0]), str(parts[1]))


def open_openvino(
    parts: Sequence[Path],
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Running:
    """A net in OpenVINO on the CPU; with `shapes` it is compiled for these alone, which is faster.

    `precision` is that of what is not quantised. Raises ExportError for files that it cannot read.
    """
    return running(read_openvino(parts), precision, threads, shapes)


def running(
    net: Any,
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Running:
    """A net that OpenVINO holds, compiled; see `open_openvino`."""
    if shapes is not None:
        net.reshape({port: list(shape) for port, shape in zip(net.inputs, shapes, strict=True)})
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return running_compiled(core().compile_model(net, "CPU", options))


def running_compiled(compiled: Any) -> Running:
    """A compiled net."""
    request = compiled.create_infer_request()
    ports = list(compiled.outputs)

    def run(inputs: Sequence[Array]) -> list[Array]:
        request.infer(list(inputs))
        return [request.get_tensor(port).data.copy() for port in ports]  # they outlive the request

    names = tuple(port.get_any_name() for port in compiled.inputs)
    sizes = tuple(
        tuple(None if n.is_dynamic else n.get_length() for n in port.get_partial_shape())
        for port in compiled.inputs
    )
    return Running(names, sizes, run, f"openvino {openvino().__version__.split('-')[0]}")


def openvino_info(parts: Sequence[Path]) -> dict[str, Any]:
    """The metadata of a net."""
    net = read_openvino(parts)
    text = net.get_rt_info(about.KEY).value if net.has_rt_info(about.KEY) else None
    return about.parse(text, parts[0])
