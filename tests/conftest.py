"""Determinism and small helpers for all tests."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from prune_dn.models import fused

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))  # processes of tests too
torch.set_num_threads(THREADS)  # for fixtures of a module too
COMPARES = re.compile(r"assert_close|approx\(|allclose|torch\.equal|import .*masked|check_contract")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def pytest_report_header() -> str:
    """What the numbers are made with: `make test-portable` goes through several."""
    isa, kernels = torch.backends.cpu.get_cpu_capability(), fused.library() is not None
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "as it finds")
    return f"ATen {isa}, oneDNN {onednn}, {THREADS} threads, compiled kernels: {kernels}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `numbers`: every test of a module that compares numbers, and every example of the docs."""
    for item in items:
        if isinstance(item, pytest.DoctestItem) or _compares(item.path):
            item.add_marker(pytest.mark.numbers)


@functools.cache
def _compares(path: Path) -> bool:
    return COMPARES.search(path.read_text()) is not None


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model of latency see times that depend on the nets alone, not on the machine."""
    from prune_dn.measure.profiling import count
    from prune_dn.pruning import latency_model

    def measure(configs, timing, image_size, repeats):
        return [0.1 + 1e-6 * count(config, image_size).macs for config in configs], "made up", 0.0

    monkeypatch.setattr(latency_model, "_measure", measure)
