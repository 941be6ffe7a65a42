"""torch.export programs (.pt2): written from a net, run by PyTorch."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import atomic_path
from prune_dn.base.runtimes import Precision
from prune_dn.deploy import about
from prune_dn.deploy.preparing import (
    EXAMPLE_BATCH,
    LONGEST,
    ExportReport,
    prepare,
    program_of,
    tensors,
    verify,
)
from prune_dn.deploy.running import Array, Running, Shape
from prune_dn.errors import ExportError
from prune_dn.graph.inference import call
from prune_dn.models.sizes import ImageSize

_ABOUT = f"{about.KEY}.json"


@usual_defaults()
def export_torch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: ImageSize | None = None,
    example_inputs: Any = None,
    in_channels: int | None = None,
    tolerance: float = 1e-4,
    info: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a `torch.export` program (.pt2) with a dynamic batch; `torch.export.load` reads it.

    As `export_onnx`: a float32 copy in eval mode on the CPU, checked at batch 1 and 7. It is called as the
    net is, and answers in the same containers, with None for what is no tensor.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"{path} must end in .pt2, which torch.export asks for")
    net, inputs = prepare(model, image_size, example_inputs, in_channels)
    net.register_forward_hook(
        lambda _, given, out: tree_map(lambda x: x if isinstance(x, Tensor) else None, out)
    )
    example = inputs(EXAMPLE_BATCH)
    told = about.describe(info, precision="fp32")
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = program_of(net, example)
                for node in program.graph.nodes:
                    node.meta.pop("stack_trace", None)  # paths of this machine
                whole = io.BytesIO()  # on a full disk torch's own writer ends the process
                torch.export.save(program, whole, extra_files={_ABOUT: told})
            except Exception as error:
                raise ExportError(
                    f"torch.export could not export the model: {str(error)[:LONGEST]}"
                ) from error
            temporary.write_bytes(whole.getbuffer())
            try:
                loaded = torch.export.load(temporary).module()
            except Exception as error:
                raise ExportError(f"torch cannot read its own program again: {error}") from error
        worst = verify(
            net, inputs, lambda x: tensors(call(loaded, x)), tolerance, "exported program"
        )
        size = temporary.stat().st_size
    return ExportReport(Path(path), size, worst)


def open_torch(
    parts: Sequence[Path],
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Running:
    """A program in PyTorch on the CPU, with its present number of threads.

    Raises ExportError for a file that it cannot read.
    """
    program, _ = _load(parts[0])
    net = program.module()
    given = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    sizes = tuple(tuple(n if isinstance(n, int) else None for n in value.shape) for value in given)

    def run(inputs: Sequence[Array]) -> list[Array]:
        with torch.inference_mode():
            return [x.numpy() for x in tensors(net(*map(torch.from_numpy, inputs)))]

    names = tuple(program.graph_signature.user_inputs)
    return Running(names, sizes, run, f"torch.export, torch {torch.__version__}")


def torch_info(parts: Sequence[Path]) -> dict[str, Any]:
    """The metadata of a program."""
    _, text = _load(parts[0])
    return about.parse(text or None, parts[0])


def _load(path: Path) -> tuple[torch.export.ExportedProgram, str]:
    extra = {_ABOUT: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise ExportError(
            f"torch cannot read {path} as a program of torch.export: {str(error)[:LONGEST]}"
        ) from error
    return program, extra[_ABOUT]
