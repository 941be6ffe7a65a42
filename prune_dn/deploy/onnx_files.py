"""ONNX files: written from a net, run by onnxruntime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import atomic_path
from prune_dn.base.runtimes import Precision
from prune_dn.deploy import about
from prune_dn.deploy.onnx_graphs import tidy_
from prune_dn.deploy.preparing import (
    EXAMPLE_BATCH,
    LONGEST,
    ExportReport,
    Inputs,
    dynamic,
    prepare,
    program_of,
    tensors,
    verify,
)
from prune_dn.deploy.running import Array, Running, Shape, answers
from prune_dn.errors import ExportError
from prune_dn.graph.inference import arguments, call
from prune_dn.models.examples import by_name, names_in
from prune_dn.models.sizes import ImageSize

INPUT_NAME, OUTPUT_NAME = "input", "logits"
OLDEST_OPSET = 18


@usual_defaults()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
    info: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write one ONNX file of any net, float32, with a dynamic batch.

    A net of images takes `image_size` in pixels; any other takes `example_inputs`, as it is called: a
    tensor, a tuple of the forward's arguments, or a dict of them by name. Each tensor that has as many
    rows as the first one has a dynamic batch, the others are constants. A single tensor is "input", a single
    answer "logits", several inputs have the names of the forward's arguments, several answers those of their
    keys and positions (`maps_0`); what a net answers beside tensors is left out.

    The model itself is not touched: a copy in eval mode on the CPU is exported. onnxruntime then
    runs the file at batch 1 and 7; `tolerance` is the error allowed, as a share of the largest
    answer. `opset=None` leaves the choice to PyTorch, which writes 18 and newer ones.

    Of `info`, as `save` takes it, the file keeps how pixels are read and what classes are called
    ("data"), what the net costs and which plan it was cut by; `read_info` reads it back.

    Raises ExportError if the model cannot be run or exported, in that opset, or if the answers differ.
    """
    import onnx

    _check_opset(opset, onnx.defs.onnx_opset_version())
    net, inputs = prepare(model, image_size, example_inputs, in_channels)
    with atomic_path(path) as temporary:
        names = write_onnx(net, inputs, temporary, opset, info)
        try:
            running = open_onnx([temporary])
        except ExportError as error:
            raise ExportError(
                f"onnxruntime cannot read the exported file: {error.__cause__}"
            ) from error
        worst = verify(net, inputs, lambda x: answers(running, x, names), tolerance, "ONNX file")
        size = temporary.stat().st_size
    return ExportReport(Path(path), size, worst)


def write_onnx(
    net: nn.Module,
    inputs: Inputs,
    path: Path,
    opset: int | None = None,
    info: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a prepared net as it is, unverified; the names of its inputs."""
    import onnx

    example = inputs(EXAMPLE_BATCH)
    with torch.no_grad():
        answer = call(net, example)
    handle = None
    if isinstance(answer, Tensor):
        outputs = [OUTPUT_NAME]
    else:
        outputs = names_in(answer)
        handle = net.register_forward_hook(lambda _, given, out: tensors(out))
    positional, named = arguments(example)
    names = names_in(by_name(net, example))
    if not named and len(positional) == 1 and isinstance(positional[0], Tensor):
        names = [INPUT_NAME]
    outputs = [f"{name}_out" if name in names else name for name in outputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's internals
        try:
            program = torch.onnx.export(
                program_of(net, example),
                dynamo=True,
                dynamic_shapes=dynamic(net, example),  # for the axis's name
                input_names=names,
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"PyTorch could not export the model to ONNX: {str(error)[:LONGEST]}"
            ) from error
        finally:
            if handle is not None:
                handle.remove()
    assert program is not None
    proto = program.model_proto
    written = {entry.domain: entry.version for entry in proto.opset_import}
    if opset is not None and written != {"": opset}:
        raise ExportError(
            f"opset {opset} was asked for, but PyTorch exported {written}; leave opset out"
        )
    tidy_(proto)
    onnx.helper.set_model_props(proto, {about.KEY: about.describe(info, precision="fp32")})
    onnx.save(proto, str(path))
    return names


def open_onnx(
    parts: Sequence[Path],
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Running:
    """An ONNX file in onnxruntime on the CPU. Raises ExportError for one that it cannot read."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of its own optimisations
    if threads is not None:
        options.intra_op_num_threads = threads
    # Its threads would wait for work in a busy loop, and take the cores from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(parts[0]), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"onnxruntime cannot read {parts[0]}: {error}") from error
    given = session.get_inputs()
    names = tuple(entry.name for entry in given)

    def run(inputs: Sequence[Array]) -> list[Array]:
        found: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return found

    sizes = tuple(tuple(n if isinstance(n, int) else None for n in entry.shape) for entry in given)
    return Running(names, sizes, run, f"onnxruntime {onnxruntime.__version__}")


def onnx_info(parts: Sequence[Path]) -> dict[str, Any]:
    """The metadata of an ONNX file."""
    import onnx

    try:
        proto = onnx.load(str(parts[0]), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{parts[0]} is no ONNX file: {str(error)[:LONGEST]}") from error
    text = next((entry.value for entry in proto.metadata_props if entry.key == about.KEY), None)
    return about.parse(text, parts[0])


def _check_opset(opset: Any, newest: int) -> None:
    is_whole = isinstance(opset, Integral) and not isinstance(opset, bool)
    if opset is not None and not (is_whole and OLDEST_OPSET <= opset <= newest):
        raise ExportError(
            f"opset is {opset!r}; PyTorch's exporter can write the integers from {OLDEST_OPSET} to "
            f"{newest}, and None leaves the choice to it"
        )
