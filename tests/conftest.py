"""Determinism and small helpers for all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model of latency see times that depend on the nets alone, not on the machine."""
    from prune_dn.profiling import count
    from prune_dn.pruning import latency_model

    def measure(configs, runtime, batch_size, image_size, repeats):
        return [0.1 + 1e-6 * count(config, image_size).macs for config in configs], "made up"

    monkeypatch.setattr(latency_model, "_measure", measure)
