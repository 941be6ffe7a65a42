"""Other CNNs: channels that their graph ties together are cut together.

The contract is that of DenseNets: the pruned net equals the given one with masks where convs and
linear layers read the cut channels. Every call checks it, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.graph import Graph, trace
from prune_dn.graph.groups import IN, OUT, Group
from prune_dn.losses import LossFunction
from prune_dn.models import LightCNN
from prune_dn.models.answers import computed_weights
from prune_dn.models.as_built import as_built
from prune_dn.profiling import ImageSize, example_image, weight_uses
from prune_dn.pruning.budget import unreachable
from prune_dn.pruning.compensate import check_compensation, closer
from prune_dn.pruning.config import SIBLINGS, PruneConfig
from prune_dn.pruning.coupled import (
    Conv,
    Keep,
    Layer,
    cut,
    find_groups,
    is_exact,
    kept_outputs,
    shifts,
)
from prune_dn.pruning.coupled_importance import importance, scaled
from prune_dn.pruning.criteria import CRITERIA, follows_loss, reads_images
from prune_dn.pruning.importance import calibration_for
from prune_dn.pruning.light_cnn import light_cnn_groups, light_cnn_scores, losers, sibling_groups
from prune_dn.pruning.protect import matching
from prune_dn.pruning.refit import refit_
from prune_dn.pruning.table import Table
from prune_dn.pruning.widths import Widths
from prune_dn.sound import check_filled, check_sound


@torch.inference_mode(False)
def prune_cnn(
    model: nn.Module,
    config: PruneConfig,
    *,
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """`prune` for a CNN that is no DenseNet; `model` stays as it is.

    `config` is a request `with_defaults`. Outputs of convs that a sum or a depthwise conv ties
    together are one unit. Its importance is the sum over the convs and linear layers that read it;
    that of `bn_scale` the sum of |gamma| over the norms on it (arXiv:1708.06519). Scope `global`
    compares shares of the mean of each group of coupled channels, but with `reconstruction` the loss
    per cost saved. `compensate` refits what is left (see `compensate_plan`). `example_inputs` are
    what the net is followed and compared on: a tensor, a tuple of the forward's arguments, or a
    dict of them by name; where they are not given, an image of `calibration`, or a random one of
    `input_size` (a Light CNN says itself what it takes). There a channel is an MFM unit, all of its
    filters, also in the embedding (protect `fc2` to keep it), and one map after MFM is what is
    judged, where it is read; `mfm_win_rate` judges what competes, where it is made, and the rest
    stays. With `sibling` units only single filters of a Light CNN go, of each pair the less
    important one; then `round_to` and `min_channels` count filters.

    Outputs of the net stay, and channels that a norm over channels (layer or group norm), an unequal
    split, a slice or a shared weight reads; for `bn_scale`, also those without a norm of their own.

    Raises PruningError for a request that is wrong or out of reach, and for transformers.

    >>> from torchvision.models import resnet18
    >>> request = PruneConfig(0.5, unit="macs", criterion="l2", compensate="none", round_to=8, input_size=64)
    >>> small = prune_cnn(resnet18(), request)
    >>> small.layer1[0].conv1
    Conv2d(48, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    criterion, compensate = config.criterion, config.compensate
    unit, scope, input_size = config.unit, config.scope, config.input_size
    assert criterion is not None and compensate is not None
    siblings = config.units == SIBLINGS
    _check_model(model)
    check_sound(model)
    if isinstance(model, LightCNN):
        model = as_built(model, share=True)
    if computed := list(computed_weights(model)):
        raise PruningError(
            f"this {type(model).__name__} has weights that are not its own: {computed[0]}"
        )
    _check_criterion(model, criterion)
    check_compensation(compensate, calibration is not None)
    calibration = None if calibration is None else list(calibration)
    alone = compensate == "none"
    batches = calibration_for(
        calibration if reads_images(criterion) or alone else None,
        criterion,
        loss if follows_loss(criterion) or alone else None,
    )
    if example_inputs is None and input_size is None and calibration:
        example_inputs = read_batches(calibration[:1]).images[0][:1].float().cpu()
    if input_size is None and isinstance(model, LightCNN):
        input_size = model.config.image_size
    inputs, graph = _followed(model, input_size, example_inputs)
    groups = _groups(model, graph, siblings)
    uses = weight_uses(model, input_size) if graph is None else graph.uses()
    branches = graph is not None and any(reader.layer not in uses for reader in graph.readers)
    free = _unprotected(model, groups, config.protect)
    if branches:
        free = _judged(free, uses)
    if criterion == "bn_scale":
        free = scaled(model, free)
    generator = torch.Generator().manual_seed(config.seed)
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
    table = Table(model, free, uses)
    widths = Widths(table, scores, may_go, config.min_channels, config.round_to)
    whole, least = (table.total(unit, kept) for kept in (table.everything(), widths.all_steps()))
    if least > (target := (1 - config.pruning_ratio) * whole):
        amounts = (whole, target, least)
        raise unreachable(
            unit, amounts, config.min_channels, config.round_to, "and the channels that must stay"
        )
    if CRITERIA[criterion].need == "gram" and scope == "global":
        mask = widths.meet_by_price(unit, target)
    else:
        mask = widths.meet_by_share(unit, target, scores, scope)
    keep = {group.root: torch.from_numpy(mask[table.units(i)]) for i, group in enumerate(free)}
    _check_exact(model, groups, keep, inputs, branches)
    small = cut(model, groups, keep)
    check_filled(small)
    if compensate == "none":
        return small
    kept, shiftable = (
        kept_outputs(model, groups, keep),
        set() if graph is None else shifts(model, graph),
    )

    def fit_(net: nn.Module, dense: nn.Module, images: Sequence[Tensor]) -> None:
        refit = compensate == "least_squares"
        refit_(net, dense, kept, shiftable, images, weights=refit, seed=config.seed)

    return closer(small, model, calibration or (), compensate, loss, fit_)


def _followed(
    model: nn.Module, input_size: ImageSize | None, example_inputs: Any
) -> tuple[Any, Graph | None]:
    """Inputs to compare nets on, and the graph; a Light CNN's groups follow from its config."""
    if example_inputs is None:
        _check_size(model, input_size)
        example_inputs = example_image(model, input_size)
    return example_inputs, None if isinstance(model, LightCNN) else trace(model, example_inputs)


def _groups(model: nn.Module, graph: Graph | None, siblings: bool) -> list[Group]:
    """What may go together; for `siblings` each filter of a Light CNN's pairs."""
    if graph is not None:
        return find_groups(model, graph)
    assert isinstance(model, LightCNN)
    if not siblings:
        return light_cnn_groups(model.config)
    if found := sibling_groups(model.config):
        return found
    raise PruningError(
        f"units=['sibling']: in this {type(model).__name__} no filters compete any more, each unit has "
        "one; leave units out, to cut whole units"
    )


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
    model: nn.Module, groups: list[Group], keep: Keep, inputs: Any, branches: bool
) -> None:
    """Raise PruningError where the contract does not hold, with the cuts that break it alone."""

    def exact(part: Keep) -> bool:
        return all(
            is_exact(model, groups, part, inputs, branches=mode) for mode in {False, branches}
        )

    if exact(keep):
        return
    cuts = [g for g in groups if g.root in keep and not keep[g.root].all()]
    alone = [g.members for g in cuts if not exact({g.root: keep[g.root]})]
    makers = [next(m.layer for m in members if m.sides == (OUT,)) for members in alone]
    wrong = list(dict.fromkeys(makers))
    raise PruningError(
        "the pruned net would not equal the masked one: what the model does with the outputs "
        f"of {', '.join(wrong) or 'several layers together'} depends on their number or order "
        "(a fixed view, a width that the code remembers, an operation whose rule does not fit); "
        f"leave those layers as they are{f': protect={wrong}' if wrong else ''}"
    )


def _check_model(model: nn.Module) -> None:
    """Raise PruningError for what is no CNN."""
    kind = type(model).__name__
    if not any(isinstance(module, Conv) for module in model.modules()):
        raise PruningError(f"this {kind} has no convolution: only CNNs can be pruned")
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
    if CRITERIA[criterion].need == "wins" and not isinstance(model, LightCNN):
        raise PruningError(
            f"criterion {criterion!r} is for DenseNets and Light CNNs; for a {kind} choose one of "
            f"{', '.join(n for n, c in sorted(CRITERIA.items()) if c.need != 'wins')}"
        )


def _check_size(model: nn.Module, input_size: ImageSize | None) -> None:
    """Raise PruningError where the size of images is not known."""
    if input_size is None:
        raise PruningError(
            f"the size of images is needed for a {type(model).__name__}: give input_size in pixels, such as 224 "
            "or (height, width)"
        )
