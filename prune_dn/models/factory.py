"""Nets that a function of the user's own makes."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_dn.errors import ConfigError

_LONGEST = 500  # characters of another's error
PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


@dataclass(frozen=True)
class Factory:
    """A function, written package.module:function, and its keyword arguments.

    Only for a path that its own user wrote: `build` imports the module. Raises ConfigError for another
    form.

    >>> Factory("torch.nn:Conv2d", {"in_channels": 3, "out_channels": 8, "kernel_size": 1}).build()
    Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.match(PATH, self.path):
            raise ConfigError(
                f"factory {self.path!r:.100} is not written package.module:function, such as "
                "my_nets.small:make_net"
            )

    def build(self) -> nn.Module:
        """The net, with whatever weights the function gives it.

        The module is looked for where Python looks, and last in the working directory. Raises ConfigError
        that names the module and the function.
        """
        place, _, name = self.path.partition(":")
        here = str(Path.cwd())
        sys.path.append(here)
        try:
            try:
                found: Any = importlib.import_module(place)
            except Exception as error:  # whatever a module does as it is imported
                raise ConfigError(
                    f"factory {self.path}: the module {place} cannot be imported: {_said(error)}; "
                    "install it, or run from the folder in which it lies"
                ) from error
            try:
                for step in name.split("."):
                    found = getattr(found, step)
            except AttributeError as error:
                raise ConfigError(
                    f"factory {self.path}: the module {place} has no function {name}: {_said(error)}"
                ) from error
            if not callable(found):
                raise ConfigError(
                    f"factory {self.path}: {name} is no function: its type is {type(found).__name__}"
                )
            try:
                with torch.random.fork_rng([]):
                    net = found(**self.arguments)
            except Exception as error:  # whatever a function raises
                raise ConfigError(
                    f"factory {self.path}: {name} failed with {dict(self.arguments)}: {_said(error)}"
                ) from error
        finally:
            sys.path.remove(here)
        if not isinstance(net, nn.Module):
            raise ConfigError(
                f"factory {self.path}: {name} gives no torch.nn.Module: its type is {type(net).__name__}"
            )
        return net


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:_LONGEST]}"
