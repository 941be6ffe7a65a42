"""Save and load DenseNets and Light CNNs: a safetensors file that rebuilds its model, no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_dn.defaults import usual_defaults
from prune_dn.errors import CheckpointError, ConfigError, ConversionError, WriteError
from prune_dn.files import StrPath, atomic_path, file_size, parse_json
from prune_dn.models import DenseNet, DenseNetConfig, LightCNN, LightCNNConfig, Net
from prune_dn.models.as_built import as_built
from prune_dn.models.state_dicts import check_usable, fill, net_of
from prune_dn.models.weights import cut, find_weights, shorten
from prune_dn.pickles import read_pickle, write_pickle

# Goes up when an older prune_dn would read a new file wrongly; not for metadata that it may overlook.
FORMAT_VERSION = 1
_FORMAT = "prune_dn/"
_DEFAULT_MOMENTUM = 0.1
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors format

CONFIGS: dict[str, type[DenseNetConfig] | type[LightCNNConfig]] = {
    DenseNet.__name__: DenseNetConfig,
    LightCNN.__name__: LightCNNConfig,
}

logger = logging.getLogger(__name__)


@usual_defaults()
def save(model: nn.Module, path: StrPath, *, info: Mapping[str, Any] | None = None) -> None:
    """Write weights and config to one safetensors file that `load` turns back into the model.

    `info` is anything that JSON can hold, read back by `read_info`; usual keys are "data",
    "history" and "metrics". Norm momentum is kept; modes, hooks and `requires_grad` are not.

    The config is that of the layers as they are (see `models.as_built`), so that the file gives back
    what the model answers. The same model and `info` give the same bytes. A digest of all that the
    file says is in it.

    Raises CheckpointError for a model that is no DenseNet or Light CNN of ours, where it was changed
    so that the file would be another net (other layers, hooks, computed weights), for weights that
    are not finite, and for a path that cannot be written.
    """
    if not isinstance(model, Net):
        raise CheckpointError(
            f"cannot save a {type(model).__name__}: pass a prune_dn DenseNet or LightCNN "
            "(model.module of a wrapped one, prune_dn.models.convert.convert(model) for one of torchvision or timm); "
            "other nets go through torch.save(model, path) or torch.export"
        )
    try:
        model = as_built(model, share=True)
    except ConversionError as error:
        raise CheckpointError(
            f"cannot save a model that would be loaded as another: {error}"
        ) from error
    tensors = _own_tensors(model.state_dict())
    try:
        check_usable(tensors)
    except ConversionError as error:
        raise CheckpointError(f"cannot save this model: {error}") from error
    momentum = {
        name: norm.momentum
        for name, norm in model.named_modules()
        if isinstance(norm, nn.BatchNorm2d) and norm.momentum != _DEFAULT_MOMENTUM
    }
    metadata = {
        "format": f"{_FORMAT}{FORMAT_VERSION}",
        "architecture": next(n for n, kind in CONFIGS.items() if isinstance(model.config, kind)),
        "config": model.config.to_json(),
        "info": _info_json(info or {}),
        "norm_momentum": json.dumps(momentum),
        "prune_dn_version": _version(),
        "torch_version": str(torch.__version__),
    }
    metadata["digest"] = _digest(metadata, tensors)
    with _saving(path), atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        _order_header_(temporary)


@usual_defaults()
def load(path: StrPath, *, ema: bool = False) -> Net:
    """Rebuild a DenseNet or Light CNN from a file, on the CPU and in eval mode.

    Reads what `save` wrote, and state dicts of such nets in .safetensors or .pt/.pth files, also in a
    mapping with other things and behind prefixes (see `from_state_dict`, also for `ema`). Code in a file
    never runs: objects beside the weights are overlooked. Of a file that is not ours the logger
    "prune_dn.checkpoint" says which weights were taken, and what was assumed.

    Raises CheckpointError for a file that is missing, damaged, newer, or holds no such net.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return _from_tensors(path, read_pickle(path), ema)
    metadata = _read_metadata(path)
    try:
        tensors = load_bytes(path.read_bytes())  # a path may be no UTF-8
        changed = metadata.get("digest", digest := _digest(metadata, tensors)) != digest
    except Exception as error:  # safetensors and torch raise many kinds for broken files
        raise CheckpointError(f"{path} is damaged: {cut(str(error), 2_000)}") from error
    if changed:  # before the format is asked for, which may be what changed
        raise CheckpointError(
            f"{path} is damaged: it was changed since it was saved; copy it again"
        )
    if not metadata.get("format", "").startswith(_FORMAT):
        return _from_tensors(path, tensors, ema)
    _check_version(path, metadata)
    if ema:
        raise CheckpointError(f"{path} holds no averaged (EMA) weights: `save` writes one net")
    try:
        return _rebuilt(metadata, tensors).eval()
    except (ConfigError, ConversionError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {cut(str(error), 2_000)}") from error


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
        info = parse_json(metadata["info"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: its info cannot be read: {cut(str(error))}"
        ) from error
    if not isinstance(info, dict):
        raise CheckpointError(f"{path} is damaged: its info is no JSON object")
    return info


def save_state_dict(model: nn.Module, path: StrPath) -> None:
    """Write a plain .pt state dict, which `torch.load(path, weights_only=True)` reads anywhere.

    It holds tensors only. Unlike `save` it does not say what MFM or pruned edges a net has, so
    such a net is rebuilt from its config: `DenseNet(config).load_state_dict(torch.load(path))`.

    Raises CheckpointError for a path that cannot be written.
    """
    with _saving(path):
        write_pickle(path, _own_tensors(model.state_dict()))


@contextmanager
def _saving(path: StrPath) -> Iterator[None]:
    """Whatever a writer raises when the disk is full and the like, as CheckpointError."""
    try:
        yield
    except WriteError as error:
        raise CheckpointError(str(error)) from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}; nothing was changed") from error


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


def _rebuilt(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Net:
    """The net of a file of ours. Raises ConversionError and others where its parts do not agree."""
    check_usable(tensors)
    architecture = metadata.get("architecture", DenseNet.__name__)  # absent in older files
    if architecture not in CONFIGS:
        raise ValueError(f"its architecture is {architecture!r}, not {' or '.join(CONFIGS)}")
    model = fill(CONFIGS[architecture].from_json(metadata["config"]), tensors)
    momenta = parse_json(metadata.get("norm_momentum", "{}"))
    if not isinstance(momenta, dict):
        raise ValueError("its norm_momentum is no JSON object")
    for name, momentum in momenta.items():
        norm = model.get_submodule(name)
        if not isinstance(norm, nn.BatchNorm2d):
            raise ValueError(f"its norm_momentum names {name!r}, which is no norm")
        is_number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
        if momentum is not None and not (is_number and 0 <= momentum <= 1):
            raise ValueError(f"the norm_momentum of {name} is {momentum!r}, not in [0, 1]")
        norm.momentum = momentum
    return model


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


def _read_metadata(path: Path) -> dict[str, str]:
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


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata["format"].removeprefix(_FORMAT)
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format {cut(metadata['format'])}, made by prune_dn "
            f"{cut(metadata.get('prune_dn_version', '?'))}; this is prune_dn {_version()}, which reads "
            f"{_FORMAT}{FORMAT_VERSION}: upgrade prune_dn"
        )


def _from_tensors(path: Path, state: Any, ema: bool) -> Net:
    try:
        weights, others = find_weights(state, ema=ema)
        net = net_of(weights.tensors())
    except ConversionError as error:
        raise CheckpointError(f"{path}: {cut(str(error), 2_000)}") from error
    _say_what_was_taken(path, net, str(weights), list(map(str, others)))
    return net.eval()


def _say_what_was_taken(path: Path, net: Net, taken: str, others: list[str]) -> None:
    if isinstance(net, LightCNN):
        assumed = f"a dropout of {net.config.drop_rate}, images of {net.config.image_size} pixels"
    else:
        assumed = f"eps {net.config.norm_eps}, no dropout, ReLU and the poolings of torchvision"
    left = f", not {shorten(others)} (ema: the averaged ones)" if others else ""
    logger.warning(
        "%s: took %s%s; tensors do not tell, so this was assumed: %s; nor how pixels were normalised",
        *(path, taken, left, assumed),
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("prune_dn")
    except PackageNotFoundError:
        return "unknown"
