"""safetensors files with metadata: written whole, read with every check before anything is believed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from prune_dn.base.files import StrPath, atomic_path, file_size, parse_json
from prune_dn.errors import CheckpointError, WriteError

_MAX_HEADER = 100_000_000  # bytes, as in the safetensors format
_LONGEST_REASON = 2_000  # characters


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one file, with a digest of all that it says; the same content gives the same bytes.

    Raises CheckpointError for a path that cannot be written, and a dtype that the format has not.
    """
    told = {**metadata, "digest": _digest(metadata, tensors)}
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, metadata=told)
            _order_header_(temporary)
    except WriteError as error:
        raise CheckpointError(str(error)) from error
    except (SafetensorError, KeyError) as error:  # a KeyError names a dtype
        raise CheckpointError(f"cannot write {path}: {error}; nothing was changed") from error


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file. Raises CheckpointError where it is damaged."""
    metadata = read_metadata(path)
    try:
        tensors = load_bytes(path.read_bytes())  # a path may be no UTF-8
        changed = metadata.get("digest", digest := _digest(metadata, tensors)) != digest
    except Exception as error:  # safetensors and torch raise many kinds for broken files
        raise CheckpointError(f"{path} is damaged: {str(error)[:_LONGEST_REASON]}") from error
    if changed:
        raise CheckpointError(
            f"{path} is damaged: it was changed since it was saved; copy it again"
        )
    return metadata, tensors


def is_safetensors(path: Path) -> bool:
    """By content. Raises CheckpointError for a path that cannot be any checkpoint."""
    try:
        file_size(path)
        with path.open("rb") as file:
            start = file.read(9)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint file in it") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; it was not written to the end")
    if start[8:] == b"{":  # asked first: the length before it may be any 8 bytes
        return True
    if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip of torch.save, or its older pickle
        return False
    raise CheckpointError(
        f"{path} is no checkpoint: neither a safetensors file nor a .pt state dict"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone. Raises CheckpointError for a file that is truncated or no such file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is truncated: its header needs {length} bytes")
        try:
            header = parse_json(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no strings")
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is no safetensors file: its header is broken") from error
    if size < 8 + length + end:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes of {8 + length + end}; copy or make it again"
        )
    return dict(metadata)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with a storage of its own and nothing else in it."""
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError("cannot save a model on the meta device: it has no weights yet")
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata, and of the names, dtypes, shapes and bytes of the tensors."""
    told = sorted((key, value) for key, value in metadata.items() if key != "digest")
    digest = hashlib.sha256(json.dumps(told).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _order_header_(path: Path) -> None:
    """Put the metadata into one order: safetensors leaves it in that of a random hash."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "written in another way than safetensors does"
        file.seek(8)
        file.write(text.ljust(length))
