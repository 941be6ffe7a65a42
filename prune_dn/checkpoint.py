"""Save and load DenseNets and Light CNNs: a safetensors file that rebuilds its model, no pickle."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prune_dn.errors import CheckpointError, ConfigError, ConversionError
from prune_dn.files import atomic_path
from prune_dn.models import DenseNet, DenseNetConfig, LightCNN, LightCNNConfig, Net
from prune_dn.models.state_dicts import empty_net, fill, from_state_dict, misfits, shorten

FORMAT_VERSION = 1
_FORMAT = "prune_dn/"
_DEFAULT_MOMENTUM = 0.1
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors format

CONFIGS: dict[str, type[DenseNetConfig] | type[LightCNNConfig]] = {
    DenseNet.__name__: DenseNetConfig,
    LightCNN.__name__: LightCNNConfig,
}

StrPath = str | os.PathLike[str]


def save(model: nn.Module, path: StrPath, *, info: Mapping[str, Any] | None = None) -> None:
    """Write weights and config to one safetensors file that `load` turns back into the model.

    `info` is anything that JSON can hold, read back by `read_info`; usual keys are "data",
    "history" and "metrics". Norm momentum is kept; modes, hooks and `requires_grad` are not.

    Raises CheckpointError for a model that is no DenseNet or Light CNN of ours, or that was changed
    by hand.
    """
    if not isinstance(model, Net):
        raise CheckpointError(
            f"cannot save a {type(model).__name__}: pass a prune_dn DenseNet or LightCNN "
            "(model.module of a wrapped one, prune_dn.models.convert.convert(model) for one of torchvision or timm); "
            "other nets go through torch.save(model, path) or torch.export"
        )
    state = model.state_dict()
    problems = list(misfits(empty_net(model.config).state_dict(), state))
    if problems:
        raise CheckpointError(
            "cannot save a model that no longer fits its own config, so it could not be loaded: "
            + shorten(problems)
        )
    momentum = {
        name: norm.momentum
        for name, norm in model.named_modules()
        if isinstance(norm, nn.BatchNorm2d) and norm.momentum != _DEFAULT_MOMENTUM
    }
    metadata = {
        "format": f"{_FORMAT}{FORMAT_VERSION}",
        "architecture": type(model).__name__,
        "config": model.config.to_json(),
        "info": _info_json(info or {}),
        "norm_momentum": json.dumps(momentum),
        "prune_dn_version": _version(),
        "torch_version": str(torch.__version__),
    }
    tensors = _own_tensors(state)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(path: StrPath) -> Net:
    """Rebuild a DenseNet or Light CNN from a file, on the CPU and in eval mode.

    Reads what `save` wrote, and plain state dicts of such nets in .safetensors or .pt/.pth files
    (see `from_state_dict`); of the latter only tensors are read, code in them never runs.

    Raises CheckpointError for a file that is missing, damaged, newer, or holds no such net.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return _from_tensors(path, _read_pickle(path))
    metadata = _read_metadata(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not metadata.get("format", "").startswith(_FORMAT):
        return _from_tensors(path, tensors)
    _check_version(path, metadata)
    try:
        architecture = metadata.get("architecture", DenseNet.__name__)  # absent in older files
        model = fill(CONFIGS[architecture].from_json(metadata["config"]), tensors)
        momentum = json.loads(metadata.get("norm_momentum", "{}"))
        for name, value in momentum.items():
            model.get_submodule(name).momentum = value
    except (ConfigError, ConversionError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return model.eval()


def read_info(path: StrPath) -> dict[str, Any]:
    """The `info` that was saved with a model; empty for files that prune_dn did not write."""
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    metadata = _read_metadata(path)
    if not metadata.get("format", "").startswith(_FORMAT):
        return {}
    _check_version(path, metadata)
    try:
        return dict(json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its info is no JSON object") from error


def save_state_dict(model: nn.Module, path: StrPath) -> None:
    """Write a plain .pt state dict, which `torch.load(path, weights_only=True)` reads anywhere.

    It holds tensors only. Unlike `save` it does not say what MFM or pruned edges a net has, so
    such a net is rebuilt from its config: `DenseNet(config).load_state_dict(torch.load(path))`.
    """
    tensors = _own_tensors(model.state_dict())
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def _own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with a storage of its own and nothing else in it."""
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError("cannot save a model on the meta device: it has no weights yet")
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _info_json(info: Mapping[str, Any]) -> str:
    def scalar(value: Any) -> Any:
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return value.item()  # a number of numpy or torch
        raise TypeError(f"a value of type {type(value).__name__} is no JSON")

    try:
        return json.dumps(dict(info), default=scalar)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"info cannot be saved: {error}; use numbers, strings, lists and dicts"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """By content. Raises CheckpointError for a path that cannot be any checkpoint."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint file in it")
    try:
        with path.open("rb") as file:
            start = file.read(9)
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


def _read_metadata(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is truncated: its header needs {length} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is no safetensors file: its header is broken") from error
    if size < 8 + length + end:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes of {8 + length + end}; copy or make it again"
        )
    return {str(key): str(value) for key, value in metadata.items()}


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata["format"].removeprefix(_FORMAT)
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format {metadata['format']}, made by prune_dn "
            f"{metadata.get('prune_dn_version', '?')}; this is prune_dn {_version()}, which reads "
            f"{_FORMAT}{FORMAT_VERSION}: upgrade prune_dn"
        )


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and reading it would run code ({_reason(error)}). "
            "Where it was made, write torch.save(model.state_dict(), path) and load that"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The telling part of torch's long messages."""
    needed = re.search(r"GLOBAL (\S+)", str(error))
    return f"it needs {needed[1]}" if needed else str(error).split(". ")[0] or type(error).__name__


def _from_tensors(path: Path, state: Any) -> Net:
    try:
        return from_state_dict(state).eval()
    except ConversionError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("prune_dn")
    except PackageNotFoundError:
        return "unknown"
