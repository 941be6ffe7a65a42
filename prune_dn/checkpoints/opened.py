"""A checkpoint as a command gets it: the net, and what its file says of data and training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.base import limits
from prune_dn.base.processes import process_state
from prune_dn.base.runtimes import Precision
from prune_dn.checkpoints.checkpoint import load, read_info
from prune_dn.data.augment import AUGMENTATIONS
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.formats import deployed_info
from prune_dn.errors import CheckpointError


def open_checkpoint(
    path: Path, ema: bool = False, model: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The net, on this process's device, and the info that its file holds.

    With `ema` the averaged weights. `model` names the net that the weights of a training script belong
    to, such as torchvision/resnet18. Raises CheckpointError for a file that `load` refuses, or whose info
    commands cannot go by.
    """
    net, info = load(path, ema=ema, model=model), read_known_info(path)
    return net.to(process_state().device), info


def open_deployed_net(path: Path, precision: Precision = "fp32") -> tuple[Deployed, dict[str, Any]]:
    """A deployed file (.onnx, .xml, .pt2) as a net, and the info that it holds.

    Raises ExportError for a file that its runtime cannot read, CheckpointError for an info that
    commands cannot go by.
    """
    info = deployed_info(path)
    _check_info(path, info)
    return Deployed(path, precision), info


def read_known_info(path: Path) -> dict[str, Any]:
    """The info of a file. Raises CheckpointError where commands cannot go by it."""
    info = read_info(path)
    _check_info(path, info)
    return info


def _check_info(path: Path, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless the parts that commands read have the shape that they need."""
    told = info.get("data")
    data: dict[str, Any] = told if isinstance(told, dict) else {}
    size = data.get("image_size")
    for key, value, right, needed in (
        ("data", told, isinstance(told, dict), "a mapping"),
        ("history", info.get("history"), isinstance(info.get("history"), dict), "a mapping"),
        ("augment", info.get("augment"), _is_augmentation(info.get("augment")), "an augmentation"),
        ("data.name", data.get("name"), isinstance(data.get("name"), str), "a string"),
        ("data.image_size", size, _is_size(size), f"a size of 1 to {limits.IMAGE_SIZE:,} pixels"),
        ("data.mean", data.get("mean"), _are_numbers(data.get("mean")), "a list of numbers"),
        ("data.std", data.get("std"), _are_numbers(data.get("std")), "a list of numbers"),
    ):
        if value is not None and not right:
            raise CheckpointError(
                f"{path}: its info says that {key} is {value!r:.100}, which is not {needed}; save the "
                "net again with another info"
            )


def _is_augmentation(value: Any) -> bool:
    return isinstance(value, str) and value in AUGMENTATIONS


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value is not True and 1 <= value <= limits.IMAGE_SIZE


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int | float) and abs(x) <= sys.float_info.max for x in value
    )
