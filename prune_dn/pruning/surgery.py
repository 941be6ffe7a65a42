"""Carry out a plan: a new, smaller net with the weights that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.sound import check_filled
from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.compensate import KEPT_ALL, check_compensation, compensate, kept_of
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.criteria import reads_images
from prune_dn.pruning.cuts import cut_net
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.parts import Mask, Scores
from prune_dn.pruning.plan import Plan, planned
from prune_dn.pruning.planning import Told, decide
from prune_dn.pruning.ratios import Ratios
from prune_dn.pruning.request import request_of, with_defaults
from prune_dn.pruning.subject import NetShape, Subject, subject
from prune_dn.pruning.units import Units
from prune_dn.pruning.verify import check_exact


@usual_defaults()
@torch.inference_mode(False)
def prune(
    model: nn.Module,
    pruning_ratio: float | PruneConfig,
    *,
    calibration: Iterable[object] | None = None,
    example_inputs: Any = None,
    loss: str | LossFunction | None = None,
    ratios: Ratios | None = None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None = None,
    **fields: Any,
) -> nn.Module:
    """A smaller net of the same kind; `model` stays as it is.

    The request is a `PruneConfig`, or its `pruning_ratio` and other fields by name. With `calibration`, a
    few hundred training images (N, C, H, W) in batches, normalised and without augmentation, the criterion is
    `reconstruction` and the compensation `least_squares`, each unless another is said; `compensate="none"`
    cuts only. A criterion that reads no images leaves them to the compensation. `loss`, what the net's outputs
    mean (see `make_plan`), serves both, and is asked for where labels do not say it. Without `calibration` the
    criterion is `bn_scale` where norms have scales, else `l2`, and nothing is compensated: fine-tune the
    result, or at least `recalibrate_batch_norm_` it.

    With `rounds` above 1 the ratio is reached in as many equal steps: what a cut and refit left is scored anew, and
    every refit has the given net as its target. Whether that pays differs from net to net: measure it.

    A DenseNet of ours, torchvision or timm becomes our `DenseNet`; any other CNN, and a variant of torchvision's
    or timm's DenseNet, such as one with another head, becomes a smaller one of its own class. What goes is
    what `make_plan` decides, which also takes the other arguments and says what was achieved; `apply_plan`
    and `compensate_plan` carry it out. That the pruned net equals the given one with masks where
    layers read the cut channels is checked on the example, in float64.

    >>> import torchvision
    >>> small = prune(torchvision.models.densenet121(), 0.5)
    >>> small.eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """
    config, loss = request_of(pruning_ratio, fields, loss)
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)
    given = subject(model, config.input_size, example_inputs, calibration)
    config = with_defaults(config, given.model, calibration is not None)
    check_compensation(str(config.compensate), calibration is not None)
    if config.rounds > 1 and ratios is not None:
        raise PruningError(
            "rounds above 1 and ratios do not go together: these were measured on the net before the first"
        )
    return cut_in_rounds(
        given,
        config,
        calibration=calibration,
        loss=loss,
        ratios=ratios,
        latency_model=latency_model,
    )[0]


Decision = tuple[Subject, Units, Mask, Told]


def cut_in_rounds(
    given: Subject,
    config: PruneConfig,
    *,
    calibration: Iterable[object] | None,
    loss: str | LossFunction | None,
    ratios: Ratios | None = None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None = None,
    scores: Scores | None = None,
) -> tuple[nn.Module, Decision]:
    """The net that `config`, with its defaults filled in, leaves of `given`, and the last round's decision.

    Arguments as of `prune`; `scores` are those of the given net, where they are known already.
    """
    method, alone = str(config.compensate), config.compensate == "none"
    current, small, kept = given, given.model, KEPT_ALL
    first = given.model if isinstance(given.config, NetShape) else given.config
    for number in range(1, config.rounds + 1):
        if number > 1:
            current = subject(small, config.input_size, given.inputs, calibration)
        share = config.pruning_ratio
        if share is not None:
            share = share * number / config.rounds
        table, keep, told = decide(
            current,
            dataclasses.replace(config, pruning_ratio=share),
            calibration=calibration if reads_images(config.criterion) or alone else None,
            loss=loss,
            ratios=ratios,
            baseline=None if number == 1 else first,
            latency_model=latency_model,
            scores=scores if number == 1 else None,
        )
        small = carried_out(current, table, keep)
        if calibration is not None and not alone:
            kept = kept.then(kept_of(table, keep))
            small = compensate(given, kept, small, calibration, method, loss=loss, seed=config.seed)
    return small, (current, table, keep, told)


@usual_defaults()
@torch.inference_mode(False)
def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """The pruned net; `model` stays as it is.

    Each module that remains keeps its name, its training flag, and its tensors' dtype, device,
    memory format and `requires_grad`; nothing is shared with `model`. Of a DenseNet or Light CNN, hooks
    are not carried over. Any other net is followed anew on an example as the plan describes it, and comes
    back as its own class.

    Raises PruningError when the plan was made for a net of another shape, or its parts disagree.

    >>> from prune_dn.models import densenet40
    >>> from prune_dn.pruning import make_plan
    >>> net = densenet40()
    >>> small = apply_plan(net, make_plan(net, 0.5))
    >>> small.config.num_init_features < net.config.num_init_features
    True
    """
    return carried_out(*planned(model, plan))


def carried_out(given: Subject, table: Units, keep: Mask) -> nn.Module:
    """The net that a closed `keep` leaves, checked."""
    if isinstance(given.config, NetShape):
        check_exact(given, table, keep)
    small = cut_net(given, table, keep)
    check_filled(small)
    return small
