"""Save and load nets: a safetensors file that rebuilds its model, no pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import StrPath, parse_json
from prune_dn.base.pickles import read_pickle, write_pickle
from prune_dn.checkpoints.other_nets import describe, from_file_of_others, rebuilt
from prune_dn.checkpoints.tensor_files import (
    copies,
    is_safetensors,
    read_metadata,
    read_tensors,
    write_tensors,
)
from prune_dn.errors import CheckpointError, ConfigError, ConversionError, PruningError, WriteError
from prune_dn.models import DENSE_NET
from prune_dn.models.as_built import as_built
from prune_dn.models.families import config_of, family_named, family_of, known_family
from prune_dn.models.named import Option
from prune_dn.models.probe import Probe, make
from prune_dn.models.state_dicts import check_usable, fill, net_of
from prune_dn.models.weights import cut, find_weights, shorten
from prune_dn.pruning import Plan

# The first is that of our own nets, the second of others. A number goes up when an older prune_dn would read
# a new file wrongly; not for metadata that it may overlook.
FORMATS = ("prune_dn/1", "prune_dn/2")
_PREFIX = "prune_dn/"
_DEFAULT_MOMENTUM = 0.1

logger = logging.getLogger(__name__)


@usual_defaults()
def save(
    model: nn.Module,
    path: StrPath,
    *,
    info: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    example_inputs: Any = None,
    name: str | None = None,
    options: Mapping[str, Option] | None = None,
) -> None:
    """Write a net to one safetensors file that `load` turns back into the net.

    `info` is anything that JSON can hold, read back by `read_info`; usual keys are "data",
    "history" and "metrics". `plan`, by which the net was cut, is read back by `read_plan`. Norm momentum
    is kept; modes, hooks and `requires_grad` are not. The same net and `info` give the same bytes. A
    digest of all that the file says is in it.

    A DenseNet or Light CNN of ours is described by its config, that of the layers as they are (see
    `models.as_built`). Of any other net the file holds the tensors, the name of the class, and, where it
    can be, some answers of eval mode on inputs like `example_inputs` (a tensor, a tuple of the forward's
    arguments, or a dict of them by name; by default images of usual sizes are tried). A net of torchvision or
    timm is rebuilt by its constructor: found by its class, or given as `name` and `options`, such as
    "timm/resnet18" and {"num_classes": 10}; it is kept only where it gives the same modules and the
    same answers. `load` gets any other net as a dense instance of its class.

    Raises CheckpointError for a net that `load` would not give back: one of ours that was changed so
    that its file would be another net (other layers, hooks), a `name` that does not rebuild it,
    computed weights, weights that are not finite; and for a path that cannot be written.

    >>> import os, tempfile, torchvision
    >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
    >>> save(torchvision.models.resnet18(num_classes=10), path)
    >>> load(path).fc
    Linear(in_features=512, out_features=10, bias=True)
    """
    if config_of(model) is not None:
        given = {"example_inputs": example_inputs, "name": name, "options": options}
        if wrong := [key for key, value in given.items() if value is not None]:
            raise CheckpointError(
                f"{wrong[0]} has no effect: a {type(model).__name__} is saved with its config; leave it out"
            )
        metadata, tensors = _describe_ours(model)
        metadata["format"] = FORMATS[0]
    else:
        metadata, tensors = describe(model, example_inputs, name, options)
        metadata["format"] = FORMATS[1]
    metadata |= {
        "info": _info_json(info or {}),
        "prune_dn_version": _version(),
        "torch_version": str(torch.__version__),
    }
    if plan is not None:
        metadata["plan"] = plan.to_json()
    write_tensors(path, copies(tensors), metadata)


def _describe_ours(model: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a DenseNet or Light CNN."""
    try:
        model = as_built(model, share=True)
    except ConversionError as error:
        raise CheckpointError(
            f"cannot save a model that would be loaded as another: {error}"
        ) from error
    tensors = copies(model.state_dict())
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
        "architecture": known_family(model.config).name,
        "config": model.config.to_json(),
        "norm_momentum": json.dumps(momentum),
    }
    return metadata, tensors


@usual_defaults()
def load(path: StrPath, *, model: nn.Module | str | None = None, ema: bool = False) -> nn.Module:
    """Rebuild a net from a file, on the CPU and in eval mode.

    Reads what `save` wrote, and state dicts of DenseNets and Light CNNs in .safetensors or .pt/.pth
    files, also in a mapping with other things and behind prefixes (see `from_state_dict`, also for
    `ema`). Nothing from a file is imported or run: objects beside the weights are overlooked, and of
    torchvision and timm only nets that they list by name are built. Of a file that is not ours the logger
    "prune_dn.checkpoints.checkpoint" says which weights were taken, and what was assumed.

    `model` is for any other net: a dense instance of its class, which stays as it is. A copy gets the
    file's tensors and their widths, wherever they were cut; where the file holds answers, the copy must give
    the same ones, to half of the digits of float64 (or of float32, for nets that run only so). A
    name such as "torchvision/resnet18" says what the state dict of a training script belongs to.

    Raises CheckpointError for a file that is missing, damaged, newer, or holds no such net: then with
    the first tensor that does not fit and both shapes.
    """
    path = Path(path)
    if not is_safetensors(path):
        return _from_tensors(path, read_pickle(path), model, ema)
    metadata, tensors = read_tensors(path)
    if not metadata.get("format", "").startswith(_PREFIX):
        return _from_tensors(path, tensors, model, ema)
    _check_version(path, metadata)
    if ema:
        raise CheckpointError(f"{path} holds no averaged (EMA) weights: `save` writes one net")
    ours = metadata["format"] == FORMATS[0]
    if ours and model is not None:
        raise CheckpointError(f"{path} holds a net of ours, whole: leave model out")
    try:
        return (_rebuilt(metadata, tensors) if ours else rebuilt(metadata, tensors, model)).eval()
    except (ConfigError, ConversionError, KeyError, ValueError, AttributeError) as error:
        if not ours and isinstance(error, ConversionError):
            what = "does not fit"
        elif "digest" in metadata:  # it is what was written
            writer = cut(metadata.get("prune_dn_version", "?"))
            what = (
                f"was written by prune_dn {writer}, and this prune_dn {_version()} cannot read it"
            )
        else:
            what = "is damaged"
        raise CheckpointError(f"{path} {what}: {cut(str(error), 2_000)}") from error


def read_info(path: StrPath) -> dict[str, Any]:
    """The `info` that was saved with a model; empty for files that prune_dn did not write."""
    path = Path(path)
    metadata = _ours(path)
    try:
        info = parse_json(metadata["info"]) if metadata else {}
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: its info cannot be read: {cut(str(error))}"
        ) from error
    if not isinstance(info, dict):
        raise CheckpointError(f"{path} is damaged: its info is no JSON object")
    return info


def read_plan(path: StrPath) -> Plan | None:
    """The plan that was saved with a model; None where there is none."""
    metadata = _ours(Path(path))
    try:
        return Plan.from_json(metadata["plan"]) if "plan" in metadata else None
    except PruningError as error:
        raise CheckpointError(
            f"{path} is damaged: its plan cannot be read: {cut(str(error))}"
        ) from error


def read_example(path: StrPath) -> Any:
    """Inputs like the `example_inputs` that a net was saved with; None where there were none."""
    metadata = _ours(Path(path))
    try:
        known = Probe.from_json(metadata["probe"]) if "probe" in metadata else None
        return make(known.inputs) if known is not None and known.given else None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {cut(str(error))}") from error


def _ours(path: Path) -> dict[str, str]:
    """The metadata of a file that `save` wrote; none of any other."""
    metadata = read_metadata(path) if is_safetensors(path) else {}
    if not metadata.get("format", "").startswith(_PREFIX):
        return {}
    _check_version(path, metadata)
    return metadata


def save_state_dict(model: nn.Module, path: StrPath) -> None:
    """Write a plain .pt state dict, which `torch.load(path, weights_only=True)` reads anywhere.

    It holds tensors only. Unlike `save` it does not say what MFM or pruned edges a net has, so
    such a net is rebuilt from its config: `DenseNet(config).load_state_dict(torch.load(path))`.

    Raises CheckpointError for a path that cannot be written.
    """
    try:
        write_pickle(path, copies(model.state_dict()))
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def _rebuilt(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The net of a file of ours. Raises ConversionError and others where its parts do not agree."""
    check_usable(tensors)
    family = family_named(metadata.get("architecture", DENSE_NET.name))  # absent in older files
    model: nn.Module = fill(family.config.from_json(metadata["config"]), tensors)
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


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata["format"] not in FORMATS:
        raise CheckpointError(
            f"{path} has format {cut(metadata['format'])}, made by prune_dn "
            f"{cut(metadata.get('prune_dn_version', '?'))}; this is prune_dn {_version()}, which reads "
            f"{' and '.join(FORMATS)}: upgrade prune_dn"
        )


def _from_tensors(path: Path, state: Any, model: nn.Module | str | None, ema: bool) -> nn.Module:
    try:
        if model is not None:
            net, taken, others = from_file_of_others(state, model, ema=ema)
        else:
            weights, rest = find_weights(state, ema=ema)
            net, taken, others = net_of(weights.tensors()), str(weights), list(map(str, rest))
    except ConversionError as error:
        raise CheckpointError(f"{path}: {cut(str(error), 2_000)}") from error
    _say_what_was_taken(path, net, taken, others)
    return net.eval()


def _say_what_was_taken(path: Path, net: nn.Module, taken: str, others: list[str]) -> None:
    family = family_of(net)
    if family is None:
        assumed = f"the modules of this {type(net).__name__}"
    else:
        assumed = family.assumed(net.config)
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
