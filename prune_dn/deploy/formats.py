"""The formats of deployed files, by their endings: who writes and who runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_dn.base.files import file_size
from prune_dn.base.runtimes import Precision, Runtime, why_not_offered
from prune_dn.deploy.onnx_files import export_onnx, onnx_info, open_onnx
from prune_dn.deploy.openvino_files import (
    export_openvino,
    open_openvino,
    openvino_info,
    with_weights,
)
from prune_dn.deploy.preparing import ExportReport
from prune_dn.deploy.running import Running, Shape
from prune_dn.deploy.torch_files import export_torch, open_torch, torch_info
from prune_dn.errors import ExportError

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Format:
    """`parts` are all files of a net of which one is named; `info` is what they say of themselves."""

    runtime: Runtime
    export: Callable[..., ExportReport]
    open: Callable[..., Running]
    info: Callable[[Sequence[Path]], dict[str, Any]]
    parts: Callable[[StrPath], tuple[Path, ...]] = lambda path: (Path(path),)


FORMATS = {
    ".onnx": Format("onnxruntime", export_onnx, open_onnx, onnx_info),
    ".xml": Format("openvino", export_openvino, open_openvino, openvino_info, with_weights),
    ".pt2": Format("eager", export_torch, open_torch, torch_info),
}
ENDINGS = {form.runtime: ending for ending, form in FORMATS.items()}


def is_deployed(path: StrPath) -> bool:
    """Whether a path ends as a deployed file does."""
    return Path(path).suffix in FORMATS


def format_of(path: StrPath) -> Format:
    """The format of a file. Raises ExportError for an ending that is none, and a file that is not there."""
    if not is_deployed(path):
        raise ExportError(f"{path} is no deployed file; these end in {', '.join(FORMATS)}")
    form = FORMATS[Path(path).suffix]
    deployed_bytes(path)
    return form


def open_deployed(
    path: StrPath,
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Running:
    """A deployed file, ready to run. Raises ExportError for one that its runtime cannot read."""
    form = format_of(path)
    if precision != "int8" and (why := why_not_offered(form.runtime, precision)):
        raise ExportError(f"{path} cannot run so: {why}")
    return form.open(form.parts(path), precision, threads, shapes)


def deployed_info(path: StrPath) -> dict[str, Any]:
    """What a deployed file says of itself: the `info` of its export, its precision, prune_dn's version.

    Empty for a file of others.
    """
    form = format_of(path)
    return form.info(form.parts(path))


def deployed_bytes(path: StrPath) -> int:
    """Bytes of all files of a deployed net. Raises ExportError where one is missing."""
    try:
        return sum(file_size(part) for part in FORMATS[Path(path).suffix].parts(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"cannot read {error.filename or path}: {reason}") from error
