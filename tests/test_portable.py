"""`make test-portable` changes what it says it changes, and marks what compares numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune_dn.models import fused

ROOT = Path(__file__).parents[1]
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "PRUNE_DN_KERNELS")
SAYS = f"""#!{sys.executable}
import os, sys
print(*(f"{{k}}={{os.environ[k]}}" for k in {SETTINGS} if k in os.environ), "|", *sys.argv[1:])
sys.exit(os.environ.get("OMP_NUM_THREADS") == "2")
"""


def test_each_setting_reaches_the_tests(tmp_path: Path) -> None:
    """And one that fails does not hide the others."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(SAYS)
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    clean = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "MAKEFLAGS", "WORKERS")}
    done = subprocess.run(
        ["make", "-s", "test-portable", f"VENV={tmp_path}", "PORTABLE_TESTS=some"],
        cwd=ROOT, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    runs = [line.partition(" | ") for line in done.stdout.splitlines()]
    assert [setting for setting, _, _ in runs] == [
        "ATEN_CPU_CAPABILITY=default",
        "ATEN_CPU_CAPABILITY=avx2",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "OMP_NUM_THREADS=1",
        "OMP_NUM_THREADS=2",
        "PRUNE_DN_KERNELS=0",
    ]
    for setting, _, how in runs:  # two threads are for one worker
        workers = "1" if setting == "OMP_NUM_THREADS=2" else "auto"
        end = "--dist worksteal -p no:cacheprovider -m numbers some"
        assert how == f"-m pytest -n {workers} {end}"
    assert done.returncode == 2 and "portable-2-threads" in done.stderr


def test_threads_are_those_asked_for_and_numbers_are_marked(request: pytest.FixtureRequest) -> None:
    assert torch.get_num_threads() == int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.testing.assert_close(torch.ones(1 << 20).sum(), torch.tensor(2.0**20))
    assert request.node.get_closest_marker("numbers") is not None


def test_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_DN_KERNELS", "0")
    assert fused.library.__wrapped__() is None
