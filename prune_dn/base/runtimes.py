"""What runs a net when it is timed."""

from __future__ import annotations

from typing import Literal, get_args

Runtime = Literal["eager", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
