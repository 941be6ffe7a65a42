"""One process or several."""

from __future__ import annotations

import importlib
import os

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Accelerate's view of this process; under torchrun without a GPU too (gloo on the CPU)."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        # Its default arguments hold the group that they find. DistributedDataParallel imports it:
        # after the group, destroy_process_group would leave gloo's threads to crash at exit.
        importlib.import_module("torch.distributed.nn.functional")
    return PartialState(cpu=True) if several and not torch.cuda.is_available() else PartialState()
