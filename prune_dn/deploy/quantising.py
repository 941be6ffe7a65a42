"""The parts that both quantisers share: the float net with its calibration images, and the control of a metric."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from prune_dn.deploy import about
from prune_dn.deploy.deployed import Deployed
from prune_dn.deploy.running import Array, Running
from prune_dn.errors import ExportError

_FEW = 32  # images on which single layers are compared
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Source:
    """A float net as an ONNX file, whose one input is called `name`, and batches of calibration images."""

    net: nn.Module
    onnx: Path
    name: str
    images: tuple[Array, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def few(self) -> list[Array]:
        """Some images to compare answers on."""
        return [np.concatenate([x[:_FEW] for x in self.images])[:_FEW]]

    def told(self, float_layers: list[str]) -> str:
        """The metadata of the int8 file."""
        return about.describe(self.info, precision="int8", float_layers=float_layers)


class Control:
    """How far a metric, of which more is better, may fall below that of the float net."""

    def __init__(self, evaluate: Metric, net: nn.Module, max_drop: float) -> None:
        self.evaluate, self.max_drop = evaluate, max_drop
        self.wanted = metric_of(evaluate, net, "the float net")
        self.found = self.wanted

    def measure(self, running: Running) -> float:
        """The metric of a quantised net, kept in `found`."""
        self.found = metric_of(self.evaluate, Deployed.of(running), "a quantised net")
        return self.found

    def holds(self, running: Running) -> bool:
        return self.measure(running) >= self.wanted - self.max_drop

    def fell(self) -> float:
        """By how much the last one is worse than the float net."""
        return self.wanted - self.found


def metric_of(evaluate: Metric, net: nn.Module, what: str) -> float:
    """What `evaluate` says of a net. Raises ExportError unless it is a finite number."""
    found = evaluate(net)
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise ExportError(
            f"evaluate gave {found!r:.100} for {what}; it must return a number, more is better"
        ) from None
    if not math.isfinite(value):
        raise ExportError(f"evaluate gave {value} for {what}; it must return a finite number")
    return value


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what other libraries print, warn of, and add to the root logger, away from the user."""
    root = logging.getLogger()
    handlers, level, off = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(off)
