"""One process or several."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Accelerate's view of this process; under torchrun without a GPU too (gloo on the CPU)."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=True) if several and not torch.cuda.is_available() else PartialState()
