"""Other CNNs: channels that torch-pruning's dependency graph ties together are cut together.

The graph only says which channels of which layers are one; scoring, counting and cutting happen
here, with the criteria and units of DenseNets. So is the contract: the pruned net equals the given
one with masks where convs and linear layers read the cut channels. Every call checks it, in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.losses import LossFunction
from prune_dn.models import LightCNN
from prune_dn.models.answers import computed_weights
from prune_dn.models.as_built import as_built
from prune_dn.profiling import ImageSize, example_image, module_rows, total, weight_uses
from prune_dn.pruning.branches import has_branches
from prune_dn.pruning.budget import unreachable
from prune_dn.pruning.coupled import (
    IN,
    OUT,
    Conv,
    Group,
    Keep,
    Layer,
    cut,
    find_groups,
    is_exact,
)
from prune_dn.pruning.coupled_importance import importance, scaled
from prune_dn.pruning.importance import CRITERIA, calibration_for
from prune_dn.pruning.light_cnn import light_cnn_groups, light_cnn_scores, losers, sibling_groups
from prune_dn.pruning.protect import matching
from prune_dn.pruning.request import Request, names_in, usual_criterion
from prune_dn.sound import check_filled, check_sound


@torch.inference_mode(False)
def prune_cnn(
    model: nn.Module,
    pruning_ratio: float,
    *,
    unit: str = "channels",
    criterion: str | None = None,
    scope: str = "global",
    siblings: bool = False,
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
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
    embedding (protect `fc2` to keep it), and one map after MFM is what is judged, where it is read;
    `mfm_win_rate` judges what competes, where it is made, and the rest stays. With `siblings` only
    single filters of a Light CNN go, of each pair the less important one; then `round_to` and
    `min_channels` count filters.

    Outputs of the net and of other linear layers stay, and channels that pass a split, a norm over
    channels (layer or group norm), a shared weight or a bare parameter; for `bn_scale`, also those
    without a norm of their own.

    Raises PruningError for a request that is wrong or out of reach, and for transformers.

    >>> from torchvision.models import resnet18
    >>> small = prune_cnn(resnet18(), 0.5, unit="macs", round_to=8, input_size=64)
    >>> small.layer1[0].conv1
    Conv2d(48, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    criterion = usual_criterion(model) if criterion is None else criterion
    asked = Request(
        pruning_ratio,
        unit=unit,
        criterion=criterion,
        scope=scope,
        protect=names_in(protect, "protect"),
        min_channels=min_channels,
        round_to=round_to,
        input_size=input_size,
        seed=seed,
    )
    _check_model(model)
    check_sound(model)
    if isinstance(model, LightCNN):
        model = as_built(model, share=True)
    if computed := list(computed_weights(model)):
        raise PruningError(
            f"this {type(model).__name__} has weights that are not its own: {computed[0]}"
        )
    _check_criterion(model, criterion)
    batches = calibration_for(calibration, criterion, loss)
    if input_size is None and batches is not None:
        input_size = (batches.images[0].shape[2], batches.images[0].shape[3])
    if input_size is None and isinstance(model, LightCNN):
        input_size = model.config.image_size
    _check_size(model, input_size)
    image, uses = example_image(model, input_size), weight_uses(model, input_size)
    branches = has_branches(model, image)
    groups = _groups(model, image, siblings, branches)
    free = _unprotected(model, groups, asked.protect)
    if branches:
        free = _judged(free, uses)
    if criterion == "bn_scale":
        free = scaled(model, free)
    generator = torch.Generator().manual_seed(asked.seed)
    if isinstance(model, LightCNN):
        scores = light_cnn_scores(model, free, criterion, batches, generator, siblings)
    else:
        scores = importance(model, free, criterion, batches, generator)
    may_go = [losers(score) if siblings else score.isfinite() for score in scores]
    if not any(mask.any() for mask in may_go):
        raise PruningError(
            f"criterion {criterion!r} judges only what competes, and no filters of this "
            f"{type(model).__name__} that may go do; choose another criterion"
        )
    ladder = _ladder(free, scores, may_go, scope, asked.min_channels, asked.round_to)
    shapes = copy.deepcopy(model).to("meta")

    def remains(prefix: int) -> int:
        rows = module_rows(cut(shapes, groups, ladder(prefix)), uses)
        return int(getattr(total(list(rows)), unit))

    most = sum(int(m.sum()) // g.blocks for g, m in zip(free, may_go, strict=True))
    whole, least = remains(0), remains(most)
    if least > (target := (1 - asked.pruning_ratio) * whole):
        amounts = (whole, target, least)
        raise unreachable(unit, amounts, min_channels, round_to, "and the channels that must stay")
    keep = ladder(bisect_left(range(most), True, key=lambda count: remains(count) <= target))
    _check_exact(model, groups, keep, image, branches)
    small = cut(model, groups, keep)
    check_filled(small)
    return small


def _groups(model: nn.Module, image: Tensor, siblings: bool, branches: bool) -> list[Group]:
    """What may go together; for `siblings` each filter of a Light CNN's pairs."""
    if not isinstance(model, LightCNN):
        return find_groups(model, image, branches=branches)
    if not siblings:
        return light_cnn_groups(model.config)
    if found := sibling_groups(model.config):
        return found
    raise PruningError(
        f"units=['sibling']: in this {type(model).__name__} no filters compete any more, each unit has "
        "one; leave units out, to cut whole units"
    )


def _ladder(
    groups: list[Group],
    scores: list[Tensor],
    may_go: list[Tensor],
    scope: str,
    min_channels: int,
    round_to: int,
) -> Callable[[int], Keep]:
    """From the number of least important units that go to what stays.

    In a group of several blocks, a unit is one channel of each: the least important left there.
    """
    orders, ranking = [], []
    for number, (group, score, goes) in enumerate(zip(groups, scores, may_go, strict=True)):
        value = score.masked_fill(~goes, math.inf).view(group.blocks, -1)
        losses, order = value.sort(dim=1, stable=True)
        orders.append(order)
        losses = losses[:, : int(goes.sum()) // group.blocks]
        places = [(k + 0.5) / order.shape[1] for k in range(losses.shape[1])]
        shares = (losses.mean(0) / score[score.isfinite()].mean().clamp_min(1e-30)).tolist()
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


def _unprotected(model: nn.Module, groups: list[Group], patterns: tuple[str, ...]) -> list[Group]:
    """The groups of which no layer is protected."""
    names = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    matched = matching(names, patterns)
    free = [g for g in groups if not any(m.layer in matched for m in g.members)]
    if free:
        return free
    raise PruningError(f"protect={list(patterns)} leaves no channels that could be cut")


def _judged(groups: list[Group], uses: Mapping[str, int]) -> list[Group]:
    """Groups made by layers that run in eval mode, with those of their readers that do.

    What only training runs keeps fitting, but its own channels stay, and it judges no others.
    """
    return [
        dataclasses.replace(
            group,
            members=tuple(m for m in group.members if m.sides != (IN,) or m.layer in uses),
        )
        for group in groups
        if any(m.sides == (OUT,) and m.layer in uses for m in group.members)
    ]


def _check_exact(
    model: nn.Module, groups: list[Group], keep: Keep, image: Tensor, branches: bool
) -> None:
    """Raise PruningError where the contract does not hold, with the cuts that break it alone."""

    def exact(part: Keep) -> bool:
        return all(
            is_exact(model, groups, part, image, branches=mode) for mode in {False, branches}
        )

    if exact(keep):
        return
    cuts = [root for root, mask in keep.items() if not mask.all()]
    wrong = [root for root in cuts if not exact({root: keep[root]})]
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
    ours = ("gram",) if isinstance(model, LightCNN) else ("gram", "wins")
    if CRITERIA[criterion].need in ours:
        wins = CRITERIA[criterion].need == "wins"
        raise PruningError(
            f"criterion {criterion!r} is for DenseNets{' and Light CNNs' if wins else ''}; for a {kind} "
            "choose one of "
            f"{', '.join(n for n, c in sorted(CRITERIA.items()) if c.need not in ours)}"
        )


def _check_size(model: nn.Module, input_size: ImageSize | None) -> None:
    """Raise PruningError where the size of images is not known."""
    if input_size is None:
        raise PruningError(
            f"the size of images is needed for a {type(model).__name__}: give input_size in pixels, such as 224 "
            "or (height, width)"
        )
