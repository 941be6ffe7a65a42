"""Runtimes in which a net is timed or deployed, and their precisions."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

from prune_dn.errors import RuntimeMissingError

Runtime = Literal["eager", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# What each one computes in on a CPU. PyTorch itself has no int8 any more: its quantised modules are deprecated.
OFFERED: dict[Runtime, tuple[Precision, ...]] = {
    "eager": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
QUANTISED: tuple[Runtime, ...] = tuple(name for name in RUNTIMES if "int8" in OFFERED[name])


def why_not_offered(runtime: Runtime, precision: Precision) -> str | None:
    """Why a runtime does not compute in a precision, in words; None = it does.

    >>> why_not_offered("onnxruntime", "bf16")
    'onnxruntime has no bf16; it has fp32, int8, and bf16 is in eager, openvino'
    """
    if precision in OFFERED[runtime]:
        return None
    others = ", ".join(name for name in RUNTIMES if precision in OFFERED[name])
    has = ", ".join(OFFERED[runtime])
    return f"{runtime} has no {precision}; it has {has}, and {precision} is in {others}"


def extra(module: str, name: str) -> ModuleType:
    """Import a library of the extra `name`. Raises RuntimeMissingError that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise RuntimeMissingError(
            f"this needs {module}, and it cannot be imported ({error}): pip install 'prune_dn[{name}]'"
        ) from error
