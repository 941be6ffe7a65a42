"""What tests of the command line share: fixtures, what they ask of a result, and two processes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_dn.checkpoints.checkpoint import save
from prune_dn.cli import app as cli
from prune_dn.data.datasets import load_datasets
from prune_dn.models import densenet

RECIPE = """\
model: {name: densenet, block_config: [2, 2], growth_rate: 4, bn_size: 2, stem: cifar}
data: {name: digits, image_size: 8, limit: 64}
train: {epochs: 1, batch_size: 16, learning_rate: 0.05}
prune: {pruning_ratio: 0.4, unit: macs, recalibrate_batches: 2}
finetune: {epochs: 1, batch_size: 16, learning_rate: 0.05}
export: {onnx: false}
report: {batch_sizes: [1], repeats: 2}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `prune-dn` in a folder of its own; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A checkpoint that knows its data."""
    torch.manual_seed(1)
    model = densenet((2, 2), 4, bn_size=2, stem="cifar", num_classes=10, in_channels=1)
    spec = load_datasets("digits", image_size=8).spec
    save(model, tmp_path / "net.safetensors", info={"data": spec.to_dict()})
    return tmp_path / "net.safetensors"


def bad(result: tuple[int, str, str], message: str) -> None:
    """Exit code 2, nothing on stdout, the message and no traceback on stderr."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert re.search(message, err), err


def document(result: tuple[int, str, str]) -> Any:
    """Exit code 0; the JSON on stdout."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def in_two_processes(script: Path, *arguments: str) -> None:
    """Run a script under torchrun, in two processes on a free port, to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
