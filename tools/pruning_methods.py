"""The pruners that `compare_pruners.py` sets side by side: ours, Torch-Pruning's, Network Slimming's.

A method is a function `(net, ratio, batches, image_size, seed) -> pruned net` that removes at least
`ratio` of the MACs (of the time in onnxruntime at batch 1, where its name ends in `/latency`) and as
little more as it can.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

import prune_dn
from prune_dn.data.batches import read_batches
from prune_dn.models import DenseNet, DenseNetConfig
from prune_dn.models.examples import example_image
from prune_dn.pruning import CRITERIA
from prune_dn.pruning.criteria import reads_images
from prune_dn.pruning.importance import importance
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.statistics import Wins
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units
from prune_dn.run.rivals import THEIR_CRITERIA, THEIR_SCOPES, macs_of, torch_pruned

Batches = list[tuple[Tensor, Tensor]]
Method = Callable[[Any, float, Batches, int, int], nn.Module]
UNITS = {
    "stream": ("stream",),
    "edge": ("edge",),
    "bottleneck": ("bottleneck",),
    "stream+bottleneck": ("stream", "bottleneck"),
    "stream+bottleneck+layer": ("stream", "bottleneck", "layer"),
    "all": ("stream", "bottleneck", "edge"),
}


def methods(net: nn.Module, round_to: int = 1) -> dict[str, Method]:
    """All methods for a net by name: `ours/CRITERION/COMPENSATE`, `tp/CRITERION/SCOPE`.

    For our DenseNets `ours/CRITERION/COMPENSATE/UNITS`, the same with `/latency` at the end, and
    `slimming`. `round_to` is for ours and Torch-Pruning's.
    """
    ours_dense = isinstance(net, DenseNet)
    found: dict[str, Method] = {"slimming": slimming} if ours_dense else {}
    for criterion in sorted(CRITERIA):
        for compensate in ("none", "mean", "least_squares"):
            if not ours_dense:
                if CRITERIA[criterion].need is not Wins:
                    found[f"ours/{criterion}/{compensate}"] = ours(
                        criterion, compensate, unit="macs", round_to=round_to
                    )
                continue
            for kinds, units in UNITS.items():
                name = f"ours/{criterion}/{compensate}/{kinds}"
                choices: dict[str, Any] = {
                    "criterion": criterion,
                    "compensate": compensate,
                    "units": units,
                }
                found[name] = ours(unit="macs", round_to=round_to, **choices)
                found[f"{name}/latency"] = ours(unit="latency", round_to=round_to, **choices)
    for criterion in THEIR_CRITERIA:
        for scope in THEIR_SCOPES:
            found[f"tp/{criterion}/{scope}"] = theirs(criterion, scope, round_to)
    return found


def ours(criterion: str, compensate: str, **choices: Any) -> Method:
    """Our `prune` with these choices."""

    def cut(net: Any, ratio: float, batches: Batches, size: int, seed: int) -> nn.Module:
        needs = reads_images(criterion) or compensate != "none"
        in_time = choices["unit"] == "latency"
        return prune_dn.prune(
            net,
            ratio,
            criterion=criterion,
            compensate=compensate,
            calibration=batches if needs else None,
            input_size=size,
            seed=seed,
            latency_model=latency_model(net.config, size) if in_time else None,
            **choices,
        )

    return cut


@functools.cache
def latency_model(config: DenseNetConfig, size: int) -> LatencyModel:
    """One for all rows of a net: onnxruntime at batch 1, as it is timed for the table."""
    return prune_dn.fit_latency_model(DenseNet(config), image_size=size)


def slimming(net: DenseNet, ratio: float, batches: Batches, size: int, seed: int) -> nn.Module:
    """Network Slimming (arXiv:1708.06519): one threshold on |gamma| of every norm; producers stay.

    Its mask sets gamma and beta to zero; the channels behind them are then cut, which changes
    nothing (`masked == pruned` is a test).
    """
    given = subject(net)
    config, units = net.config, Units(given.graph)
    scores = importance(net, units, "bn_scale")
    may_go = np.ones(units.size, dtype=bool)
    for group in units.groups:
        if group.kind in ("stream", "sibling"):
            may_go[group.units] = False
        else:  # a layer keeps its largest
            may_go[group.start + int(scores[group.units].argmax())] = False
    order = np.flatnonzero(may_go)[np.argsort(scores[may_go], kind="stable")]

    def keep(count: int) -> Mask:
        mask = np.ones(units.size, dtype=bool)
        mask[order[:count]] = False
        return units.close(mask)

    target = (1 - ratio) * macs_of(net, example_image(net, size))

    def enough(count: int) -> bool:
        return prune_dn.count(config.after(indices_of(units, keep(count))), size).macs <= target

    count = bisect_left(range(len(order)), True, key=enough)
    return prune_dn.apply_plan(net, plan_of(given, units, keep(count)))


def theirs(criterion: str, scope: str, round_to: int) -> Method:
    """Torch-Pruning with these choices."""

    def cut(net: nn.Module, ratio: float, batches: Batches, size: int, seed: int) -> nn.Module:
        return torch_pruned(
            net, ratio, example_image(net, size), criterion, scope, read_batches(batches), round_to
        )

    return cut
