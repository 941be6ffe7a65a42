"""Checkpoints that were changed by hand, and how loading them must end."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from prune_dn.checkpoints.checkpoint import load
from prune_dn.errors import CheckpointError


def rewritten(path: Path, edit: Callable[[dict], None]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].pop("digest", None)  # as in a file from before there were digests
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def fails(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as error:
        load(path)
    assert str(path) in str(error.value)
