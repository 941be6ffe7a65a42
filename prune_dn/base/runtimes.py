"""What runs a net when it is timed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

from prune_dn.errors import RuntimeMissingError

Runtime = Literal["eager", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def extra(module: str, name: str) -> ModuleType:
    """Import a library of the extra `name`. Raises RuntimeMissingError that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise RuntimeMissingError(
            f"this needs {module}, and it cannot be imported ({error}): pip install 'prune_dn[{name}]'"
        ) from error
