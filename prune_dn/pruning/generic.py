"""Other CNNs: channels that torch-pruning's dependency graph ties together are cut together.

The graph only says which channels of which layers are one; choosing, counting and cutting happen
here. The contract is that of the DenseNets: the pruned net equals the given one with the cut
channels masked where convs and linear layers read them. Every call checks it, in float64.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prune_dn.errors import PruningError
from prune_dn.models import DenseNet
from prune_dn.pruning.budget import BUDGET_UNITS, SCOPES
from prune_dn.pruning.calibration import Batches, read_batches
from prune_dn.pruning.coupled import (
    IN,
    WIDTHS,
    Group,
    Keep,
    Member,
    cut,
    is_exact,
    trace,
    weight_rows,
)

GENERIC_CRITERIA = ("bn_scale", "l1", "l2", "random", "taylor")


def prune_generic(
    model: nn.Module,
    pruning_ratio: float,
    *,
    unit: str = "channels",
    criterion: str = "bn_scale",
    scope: str = "global",
    protect: Iterable[str] = (),
    min_channels: int = 1,
    round_to: int = 1,
    example_inputs: Tensor | Sequence[Any] | None = None,
    calibration: Iterable[object] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of a CNN that is no DenseNet; `model` stays as it is.

    At least the share `pruning_ratio` in (0, 1) of `unit` goes, and as little more as the ranking
    allows: `channels` (conv outputs that can go, coupled ones counted once), `params`, or `macs` of
    `example_inputs`, a batch (N, C, H, W) or a tuple of arguments. A channel's score is a sum over
    its layers: `bn_scale` |gamma| of its norms (arXiv:1708.06519); `l1`, `l2` the weights that make
    or read it (arXiv:1608.08710); `taylor` |first-order change of the loss| when nothing reads it
    (arXiv:1906.10771; needs `calibration` of (images, labels)); `random`. Scope `global` ranks
    scores over their group's mean, ties evenly; `local` cuts the same share of each group. A cut
    width is a multiple of `round_to` and at least `min_channels`. What a layer that matches
    `protect` (by its name or a parent's) makes or reads stays.

    So do outputs of the net and of linear layers, and channels that pass a split, a norm over
    channels (layer or group norm), a shared weight or a bare parameter.

    Raises PruningError for a request that is wrong or out of reach, and for nets with attention.

    >>> from torchvision.models import resnet18
    >>> small = prune_generic(
    ...     resnet18(), 0.5, unit="macs", round_to=8, example_inputs=torch.zeros(1, 3, 64, 64)
    ... )
    >>> small.layer1[0].conv1
    Conv2d(48, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    _check(pruning_ratio, unit, criterion, scope, min_channels, round_to)
    _check_model(model)
    batches = _calibration(calibration, criterion)
    inputs = _arguments(model, example_inputs)
    groups, uses = trace(model, inputs)
    free = _unprotected(model, groups, protect)
    scores = score(model, free, criterion, batches, seed)
    ladder = _ladder(free, scores, scope, min_channels, round_to)
    shapes = copy.deepcopy(model).to("meta")

    def remains(prefix: int) -> int:
        keep = ladder(prefix)
        if unit == "channels":
            return sum(int(keep[g.root].sum()) if g.root in keep else g.size for g in groups)
        net = cut(shapes, groups, keep)
        if unit == "params":
            return sum(p.numel() for p in net.parameters())
        return sum(net.get_parameter(f"{name}.weight").numel() * n for name, n in uses.items())

    low, high = 1, sum(group.size // group.blocks for group in free)
    whole, least = remains(0), remains(high)
    if least > (target := (1 - pruning_ratio) * whole):
        raise PruningError(
            f"cannot bring {unit} from {whole:,} down to {target:,.0f}: the least that "
            f"min_channels={min_channels}, round_to={round_to} and the channels that must stay "
            f"allow is {least:,} ({1 - least / whole:.1%} fewer); ask for less, or allow more"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if remains(middle) <= target else (middle + 1, high)
    keep = ladder(low)
    if not is_exact(model, groups, keep, inputs):
        cuts = [{root: mask} for root, mask in keep.items() if not mask.all()]
        wrong = [root for c in cuts if not is_exact(model, groups, c, inputs) for root in c]
        raise PruningError(
            "the pruned net would not equal the masked one: what the model does with the outputs "
            f"of {', '.join(wrong) or 'several layers together'} depends on their number or order "
            "(a shuffle, a sum with the input, a fixed view, a layer that torch-pruning does not "
            f"know); leave those layers as they are{f': protect={wrong}' if wrong else ''}"
        )
    return cut(model, groups, keep)


def score(
    model: nn.Module, groups: list[Group], criterion: str, batches: Batches | None, seed: int
) -> list[Tensor]:
    """The importance of each group's channels, (size,) in float64, over the group's mean."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros(g.size, dtype=torch.float64) for g in groups]
    for effects in _effects(model, batches) if batches else ({},):
        for group, total in zip(groups, found, strict=True):
            change = torch.zeros_like(total)
            if criterion == "random":
                change = torch.rand(group.size, generator=generator, dtype=torch.float64)
            for m in group.members:
                part = _part(model.get_submodule(m.layer), m, criterion, effects)
                if part is not None:
                    change.index_add_(0, m.units, part.detach().cpu().double()[m.channels])
            total += change.abs()
    for group, total in zip(groups, found, strict=True):
        layers = [model.get_submodule(m.layer) for m in group.members]
        scaled = any(isinstance(layer, _NormBase) and layer.affine for layer in layers)
        if criterion == "bn_scale" and not scaled:
            raise PruningError(
                "criterion 'bn_scale' finds no batch norm with a scale on the channels of "
                f"{group.root!r}: choose l1, l2, taylor or random, or protect={[group.root]}"
            )
        if not torch.isfinite(total).all():
            raise PruningError(
                f"criterion {criterion!r}: scores of {group.root} are not finite; the weights or "
                "the calibration images hold NaN or infinity, so load a sound checkpoint"
            )
    found = [total.sqrt() for total in found] if criterion == "l2" else found
    return [total / total.mean() if total.any() else total for total in found]


def _part(layer: Any, member: Member, criterion: str, effects: dict[str, Tensor]) -> Tensor | None:
    """What one layer adds to the importance of each of its channels; None = nothing."""
    if criterion == "bn_scale":
        return layer.weight.abs() if isinstance(layer, _NormBase) and layer.affine else None
    if criterion == "taylor":
        return effects[member.layer] if member.sides == (IN,) else None
    if criterion == "random" or not isinstance(layer, _ConvNd | nn.Linear):
        return None
    rows = weight_rows(layer, layer.weight, member.sides[0])
    return rows.abs().sum(1) if criterion == "l1" else rows.square().sum(1)


def _effects(model: nn.Module, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Per batch: the loss's first-order change with each channel that a conv or linear reads."""
    net = copy.deepcopy(model).eval()
    layers: dict[str, Any] = {
        n: m for n, m in net.named_modules() if isinstance(m, _ConvNd | nn.Linear)
    }
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    for images, labels in zip(batches.images, batches.labels or (), strict=True):
        try:
            with torch.enable_grad():
                logits = net(images.to(weights[0]))
                loss = F.cross_entropy(logits, labels.to(logits.device))
                slopes = torch.autograd.grad(loss, weights, materialize_grads=True)
        except (RuntimeError, IndexError, AttributeError, TypeError) as error:
            raise PruningError(
                "criterion 'taylor' needs images that the model takes, logits (N, classes) and "
                f"integer labels below the number of classes: {error}"
            ) from error
        effects = zip(layers.items(), slopes, strict=True)
        yield {n: weight_rows(m, m.weight * slope, IN).sum(1) for (n, m), slope in effects}


def _ladder(
    groups: list[Group], scores: list[Tensor], scope: str, min_channels: int, round_to: int
) -> Callable[[int], Keep]:
    """From the number of least important units that go to what stays."""
    tables = [
        s.view(g.blocks, -1).sort(dim=1, stable=True) for g, s in zip(groups, scores, strict=True)
    ]
    ranking = []
    for i, (values, order) in enumerate(tables):
        places = [(k + 0.5) / order.shape[1] for k in range(order.shape[1])]
        means = values.mean(0).tolist() if scope == "global" else places
        ranking += [(mean, place, i) for mean, place in zip(means, places, strict=True)]
    owners = torch.tensor([i for _, _, i in sorted(ranking)], dtype=torch.int64)

    def ladder(prefix: int) -> Keep:
        gone = owners[:prefix].bincount(minlength=len(groups)).tolist()
        keep = {}
        for group, (_, order), count in zip(groups, tables, gone, strict=True):
            units, step = order.shape[1], round_to // math.gcd(round_to, group.blocks)
            left = -(-max(units - count, -(-min_channels // group.blocks), 1) // step) * step
            mask = torch.ones(order.shape, dtype=torch.bool)
            keep[group.root] = mask.scatter_(1, order[:, : max(units - left, 0)], False).flatten()
        return keep

    return ladder


def _unprotected(model: nn.Module, groups: list[Group], protect: Iterable[str]) -> list[Group]:
    if isinstance(protect, str):
        raise PruningError(f"protect={protect!r} is one string; give a list, [{protect!r}]")
    names = [n for n, m in model.named_modules() if any(hasattr(m, key) for key in WIDTHS)]
    protected: set[str] = set()
    for pattern in protect:
        # A pattern names a layer or a parent of it.
        reach = (pattern, f"{pattern}.*")
        found = {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in reach)}
        if not found:
            raise PruningError(
                f"protect pattern {pattern!r} matches no layer; names look like "
                f"{', '.join(names[:4])}, ..., {names[-1]}"
            )
        protected |= found
    return [g for g in groups if not protected & {m.layer for m in g.members}]


def _calibration(calibration: Iterable[object] | None, criterion: str) -> Batches | None:
    if criterion == "taylor":
        if calibration is not None:
            return read_batches(calibration, needs_labels=True)
        raise PruningError(
            "criterion 'taylor' needs labels: give calibration=(images, labels) batches"
        )
    if calibration is not None:
        raise PruningError(f"calibration has no effect: criterion {criterion!r} reads no images")
    return None


def _arguments(model: nn.Module, example_inputs: Tensor | Sequence[Any] | None) -> tuple[Any, ...]:
    if example_inputs is None:
        raise PruningError(
            "example_inputs is missing: give a batch that the model takes, such as "
            "torch.zeros(1, 3, 224, 224); its size is also the one for macs"
        )
    device = next(model.parameters()).device
    parts = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in parts)


def _check_model(model: nn.Module) -> None:
    modules = list(model.modules())
    if isinstance(model, DenseNet):
        raise PruningError("this is a DenseNet of prune_dn; use prune(), which cuts more finely")
    norms = any(isinstance(m, nn.LayerNorm) for m in modules)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention) or (norms and "Attention" in kind):
            raise PruningError(
                f"{name} is attention ({kind}): prune_generic cuts channels of CNNs only; use "
                "torch-pruning's own pruners for transformers"
            )
    if not any(isinstance(m, _ConvNd) for m in modules):
        raise PruningError(
            f"this {type(model).__name__} has no convolution: prune_generic cuts channels of CNNs"
        )


def _check(ratio: Any, unit: str, criterion: str, scope: str, least: Any, step: Any) -> None:
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < 1:
        hint = f"; did you mean {ratio / 100}?" if number and 1 < ratio < 100 else ""
        raise PruningError(f"pruning_ratio is {ratio!r}; it must lie in (0, 1){hint}")
    given = {"unit": unit, "scope": scope, "criterion": criterion}
    choices = (BUDGET_UNITS, SCOPES, GENERIC_CRITERIA)
    for (name, value), allowed in zip(given.items(), choices, strict=True):
        if value not in allowed:
            raise PruningError(f"{name} {value!r} is unknown; choose from {', '.join(allowed)}")
    for name, value in (("min_channels", least), ("round_to", step)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PruningError(f"{name} is {value!r}; it must be an integer of at least 1")
