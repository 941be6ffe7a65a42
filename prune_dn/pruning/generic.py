"""Other CNNs: channels that torch-pruning's dependency graph ties together are cut together.

The graph only says which channels of which layers are one; scoring, counting and cutting happen
here, with the criteria and units of DenseNets. So is the contract: the pruned net equals the given
one with masks where convs and linear layers read the cut channels. Every call checks it, in float64.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.models import LightCNN
from prune_dn.profiling import ImageSize, example_image, module_rows, total, weight_uses
from prune_dn.pruning.budget import unreachable
from prune_dn.pruning.calibration import Batches, Statistics
from prune_dn.pruning.coupled import (
    IN,
    Conv,
    Group,
    Keep,
    Layer,
    Member,
    Norm,
    cut,
    find_groups,
    is_exact,
    reading_weight,
)
from prune_dn.pruning.importance import CRITERIA, Reading, check_losses, judge, observe
from prune_dn.pruning.light_cnn import light_cnn_groups
from prune_dn.pruning.plan import calibration_for, check_request, names_in
from prune_dn.pruning.protect import matching


def prune_cnn(
    model: nn.Module,
    pruning_ratio: float,
    *,
    unit: str = "channels",
    criterion: str | None = None,
    scope: str = "global",
    calibration: Iterable[object] | None = None,
    protect: Iterable[str] = (),
    min_channels: int = 1,
    round_to: int = 1,
    input_size: ImageSize | None = None,
    seed: int = 0,
) -> nn.Module:
    """`prune` for a CNN that is no DenseNet; `model` stays as it is.

    The arguments are those of `make_plan`. Outputs of convs that a sum or a depthwise conv ties
    together are one unit. Its importance is the sum over the convs and linear layers that read it;
    that of `bn_scale` the sum of |gamma| over the norms on it (arXiv:1708.06519). Scope `global`
    compares shares of the mean of each group of coupled channels. `criterion` None is `bn_scale`
    where norms have scales, else `l2`. `input_size` is that of `calibration` where it is not given,
    or what a Light CNN takes. There a channel is an MFM unit, all of its filters, also in the
    embedding (protect `fc2` to keep it), and one map after MFM is what is judged, where it is read.

    Outputs of the net and of other linear layers stay, and channels that pass a split, a norm over
    channels (layer or group norm), a shared weight or a bare parameter; for `bn_scale`, also those
    without a norm of their own.

    Raises PruningError for a request that is wrong or out of reach, and for transformers.

    >>> from torchvision.models import resnet18
    >>> small = prune_cnn(resnet18(), 0.5, unit="macs", round_to=8, input_size=64)
    >>> small.layer1[0].conv1
    Conv2d(48, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    patterns = names_in(protect, "protect")
    criterion = usual_criterion(model) if criterion is None else criterion
    check_request(pruning_ratio, unit, criterion, scope, ("stream",), min_channels, round_to)
    _check_model(model)
    _check_criterion(model, criterion)
    batches = calibration_for(calibration, criterion)
    if input_size is None and batches is not None:
        input_size = (batches.images[0].shape[2], batches.images[0].shape[3])
    if input_size is None and isinstance(model, LightCNN):
        input_size = model.config.image_size
    _check_size(model, input_size)
    image, uses = example_image(model, input_size), weight_uses(model, input_size)
    groups = (
        light_cnn_groups(model.config) if isinstance(model, LightCNN) else find_groups(model, image)
    )
    free = _unprotected(model, groups, patterns)
    if criterion == "bn_scale":
        free = _scaled(model, free)
    scores = importance(model, free, criterion, batches, seed)
    ladder = _ladder(free, scores, scope, min_channels, round_to)
    shapes = copy.deepcopy(model).to("meta")

    def remains(prefix: int) -> int:
        rows = module_rows(cut(shapes, groups, ladder(prefix)), uses)
        return int(getattr(total(list(rows)), unit))

    most = sum(group.size // group.blocks for group in free)
    whole, least = remains(0), remains(most)
    if least > (target := (1 - pruning_ratio) * whole):
        amounts = (whole, target, least)
        raise unreachable(unit, amounts, min_channels, round_to, "and the channels that must stay")
    keep = ladder(bisect_left(range(most), True, key=lambda count: remains(count) <= target))
    _check_exact(model, groups, keep, image)
    return cut(model, groups, keep)


def usual_criterion(model: nn.Module) -> str:
    """`bn_scale` where norms have scales, else `l2`."""
    scaled = any(getattr(m, "affine", False) for m in model.modules() if isinstance(m, Norm))
    return "bn_scale" if scaled else "l2"


def importance(
    model: nn.Module, groups: list[Group], criterion: str, batches: Batches | None, seed: int
) -> list[Tensor]:
    """What goes with each unit of each group, (size,) in float64."""
    if criterion == "bn_scale":
        return [_scales(model, group) for group in groups]
    readers = {m.layer: None for group in groups for m in group.members if m.sides == (IN,)}
    found = observe(model, list(readers), criterion, batches, seed)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for group in groups:
        score = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if member.sides == (IN,):
                layer, statistics = model.get_submodule(member.layer), found.get(member.layer)
                reading = _reading(layer, member, group.size, generator, statistics)
                score += torch.from_numpy(judge(reading, criterion))
        scores.append(score)
    return scores


def _reading(
    layer: nn.Module,
    member: Member,
    size: int,
    generator: torch.Generator,
    statistics: Statistics | None,
) -> Reading:
    """How a conv or linear layer reads the units of a group, in their order.

    A linear layer behind a flattened map reads it as a conv with a kernel of the map's size would.
    """
    channels = member.channels[member.units.argsort(stable=True)].view(size, -1)
    weight = reading_weight(layer)[:, channels].flatten(2, 3).float()
    known = {
        k: v[channels].sum(1) for k, v in vars(statistics or Statistics()).items() if v is not None
    }
    return Reading(member.layer, None, weight, generator, Statistics(**known))


def _scales(model: nn.Module, group: Group) -> Tensor:
    """Sum of |gamma| over the norms on each unit."""
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in _norms(model, group):
        gamma = model.get_submodule(member.layer).get_parameter("weight").detach()
        score.index_add_(0, member.units, gamma.abs().double().cpu()[member.channels])
    check_losses(score.numpy(), "bn_scale", group.root, group.size)
    return score


def _ladder(
    groups: list[Group], scores: list[Tensor], scope: str, min_channels: int, round_to: int
) -> Callable[[int], Keep]:
    """From the number of least important units that go to what stays.

    In a group of several blocks, a unit is one channel of each: the least important left there.
    """
    orders, ranking = [], []
    for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
        losses, order = score.view(group.blocks, -1).sort(dim=1, stable=True)
        orders.append(order)
        places = [(k + 0.5) / order.shape[1] for k in range(order.shape[1])]
        shares = (losses.mean(0) / score.mean().clamp_min(1e-30)).tolist()
        values = shares if scope == "global" else places
        ranking += [(value, place, number) for value, place in zip(values, places, strict=True)]
    owners = torch.tensor([number for _, _, number in sorted(ranking)])

    def ladder(prefix: int) -> Keep:
        gone = owners[:prefix].bincount(minlength=len(groups)).tolist()
        keep = {}
        for group, order, count in zip(groups, orders, gone, strict=True):
            step = round_to // math.gcd(round_to, group.blocks)
            least = max(-(-min_channels // group.blocks), 1)
            left = -(-max(order.shape[1] - count, least) // step) * step
            first = order[:, : max(order.shape[1] - left, 0)]
            mask = torch.ones(order.shape, dtype=torch.bool).scatter_(1, first, False)
            keep[group.root] = mask.flatten()
        return keep

    return ladder


def _scaled(model: nn.Module, groups: list[Group]) -> list[Group]:
    """The groups that `bn_scale` can judge."""
    found = [group for group in groups if _norms(model, group)]
    if found:
        return found
    raise PruningError(
        f"criterion 'bn_scale': no norm with a scale is on channels of this {type(model).__name__} "
        "that can go; choose a criterion that reads weights, such as l2, or images, such as taylor"
    )


def _norms(model: nn.Module, group: Group) -> list[Member]:
    """The norms with a scale on the channels of a group."""
    return [m for m in group.members if getattr(model.get_submodule(m.layer), "affine", False)]


def _unprotected(model: nn.Module, groups: list[Group], patterns: tuple[str, ...]) -> list[Group]:
    """The groups of which no layer is protected."""
    names = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    matched = matching(names, patterns)
    free = [g for g in groups if not any(m.layer in matched for m in g.members)]
    if free:
        return free
    raise PruningError(f"protect={list(patterns)} leaves no channels that could be cut")


def _check_exact(model: nn.Module, groups: list[Group], keep: Keep, image: Tensor) -> None:
    """Raise PruningError where the contract does not hold, with the cuts that break it alone."""
    if is_exact(model, groups, keep, image):
        return
    cuts = [root for root, mask in keep.items() if not mask.all()]
    wrong = [root for root in cuts if not is_exact(model, groups, {root: keep[root]}, image)]
    raise PruningError(
        "the pruned net would not equal the masked one: what the model does with the outputs "
        f"of {', '.join(wrong) or 'several layers together'} depends on their number or order "
        "(a shuffle, a sum with the input, a fixed view, a layer that torch-pruning does not "
        f"know); leave those layers as they are{f': protect={wrong}' if wrong else ''}"
    )


def _check_model(model: nn.Module) -> None:
    """Raise PruningError for what is no CNN."""
    kind = type(model).__name__
    if not any(isinstance(module, Conv) for module in model.modules()):
        raise PruningError(f"this {kind} has no 2-D convolution: only CNNs can be pruned")
    layer_norms = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for name, module in model.named_modules():
        part = type(module).__name__
        if isinstance(module, nn.MultiheadAttention) or (layer_norms and "Attention" in part):
            raise PruningError(
                f"this {kind} is a transformer ({name} is a {part}): only CNNs can be pruned; "
                "torch-pruning's own pruners cut transformers"
            )


def _check_criterion(model: nn.Module, criterion: str) -> None:
    """Raise PruningError for what makes no sense for this net."""
    kind = type(model).__name__
    ours = ("gram", "wins")
    if CRITERIA[criterion].need in ours:
        raise PruningError(
            f"criterion {criterion!r} is for DenseNets; for a {kind} choose one of "
            f"{', '.join(n for n, c in sorted(CRITERIA.items()) if c.need not in ours)}"
        )


def _check_size(model: nn.Module, input_size: ImageSize | None) -> None:
    """Raise PruningError where the size of images is not known."""
    if input_size is None:
        raise PruningError(
            f"the size of images is needed for a {type(model).__name__}: give input_size in pixels, such as 224 "
            "or (height, width)"
        )
