"""The pruners that `compare_pruners.py` sets side by side: ours, Torch-Pruning's, Network Slimming's.

A method is a function `(net, ratio, batches, image_size, seed) -> pruned net` that removes at least
`ratio` of the MACs (of the time in onnxruntime at batch 1, where its name ends in `/latency`) and as
little more as it can.
"""

from __future__ import annotations

import copy
import functools
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prune_dn
from prune_dn.models import DenseNet, DenseNetConfig
from prune_dn.pruning import CRITERIA
from prune_dn.pruning.criteria import reads_images
from prune_dn.pruning.importance import importance
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.units import Units

Batches = list[tuple[Tensor, Tensor]]
Method = Callable[[DenseNet, float, Batches, int, int], nn.Module]
UNITS = {
    "stream": ("stream",),
    "edge": ("edge",),
    "bottleneck": ("bottleneck",),
    "stream+bottleneck": ("stream", "bottleneck"),
    "stream+bottleneck+layer": ("stream", "bottleneck", "layer"),
    "all": ("stream", "bottleneck", "edge"),
}
THEIRS = ("bn_scale", "l1", "l2", "taylor", "lamp", "fpgm")


def methods(round_to: int = 1) -> dict[str, Method]:
    """All methods by name: `ours/CRITERION/COMPENSATE/UNITS`, `tp/CRITERION/SCOPE`, `slimming`.

    Ours once more with `/latency` at the end. `round_to` is for ours and Torch-Pruning's.
    """
    found: dict[str, Method] = {"slimming": slimming}
    for criterion in sorted(CRITERIA):
        for compensate in ("none", "mean", "least_squares"):
            for kinds, units in UNITS.items():
                name = f"ours/{criterion}/{compensate}/{kinds}"
                choices: dict[str, Any] = {
                    "criterion": criterion,
                    "compensate": compensate,
                    "units": units,
                }
                found[name] = ours(unit="macs", round_to=round_to, **choices)
                found[f"{name}/latency"] = ours(unit="latency", round_to=round_to, **choices)
    for criterion in THEIRS:
        for scope in ("global", "local"):
            found[f"tp/{criterion}/{scope}"] = theirs(criterion, scope == "global", round_to)
    return found


def ours(criterion: str, compensate: str, **choices: Any) -> Method:
    """Our `prune` with these choices."""

    def cut(net: DenseNet, ratio: float, batches: Batches, size: int, seed: int) -> nn.Module:
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
    config, units = net.config, Units(net.config.graph())
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

    target = (1 - ratio) * macs_of(net, size)

    def enough(count: int) -> bool:
        return prune_dn.count(config.after(indices_of(units, keep(count))), size).macs <= target

    count = bisect_left(range(len(order)), True, key=enough)
    return prune_dn.apply_plan(net, plan_of(config, units, keep(count)))


def theirs(criterion: str, global_pruning: bool, round_to: int) -> Method:
    """Torch-Pruning's BasePruner with these choices, its ratio bisected to the MACs asked for."""
    import torch_pruning as tp

    scorer = {
        "bn_scale": tp.importance.BNScaleImportance,
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
    }[criterion]

    def once(net: DenseNet, ratio: float, batches: Batches, size: int) -> nn.Module:
        model = copy.deepcopy(net).eval()
        if criterion == "taylor":
            for images, labels in batches:
                F.cross_entropy(model(images), labels, reduction="sum").backward()
        tp.pruner.BasePruner(
            model,
            torch.zeros(1, net.config.in_channels, size, size),
            importance=scorer(),
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            global_pruning=global_pruning,
            round_to=None if round_to == 1 else round_to,
            ignored_layers=[model.classifier],
        ).step()
        model.zero_grad()
        return model

    def cut(net: DenseNet, ratio: float, batches: Batches, size: int, seed: int) -> nn.Module:
        whole, low, high, best = macs_of(net, size), 0.0, 1.0, None
        for _ in range(8):
            middle = (low + high) / 2
            model = once(net, middle, batches, size)
            if macs_of(model, size) <= (1 - ratio) * whole:
                high, best = middle, model
            else:
                low = middle
        if best is None:
            raise RuntimeError(f"no ratio removes {ratio:.0%} of the MACs")
        return best

    return cut


def macs_of(model: nn.Module, size: int) -> int:
    """MACs of one image, by torch's counter: the same for all."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, first.in_channels, size, size))
    return int(counter.get_total_flops()) // 2
