"""Carry out a plan: a new, smaller DenseNet with the weights that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from prune_dn.defaults import usual_defaults
from prune_dn.errors import ConversionError, PruningError
from prune_dn.losses import LossFunction
from prune_dn.models import DenseNet, LightCNN
from prune_dn.models.convert import check_not_wrapped, convert, is_densenet
from prune_dn.models.dense_net import build_empty
from prune_dn.pruning.compensate import check_compensation, compensate_plan
from prune_dn.pruning.config import LATENCY, SIBLINGS, USUAL_UNITS, PruneConfig
from prune_dn.pruning.criteria import reads_images
from prune_dn.pruning.cuts import Cut, cuts, fill_
from prune_dn.pruning.generic import prune_cnn
from prune_dn.pruning.kept import units_of
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.plan import Plan, make_plan
from prune_dn.pruning.ratios import Ratios
from prune_dn.pruning.request import request_of, with_defaults
from prune_dn.pruning.units import Units
from prune_dn.sound import check_filled, check_sound


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

    A DenseNet of ours, torchvision or timm becomes our `DenseNet`, by `make_plan`, which also takes the
    other arguments and says what was achieved, `apply_plan` and `compensate_plan`.

    Any other CNN, and a variant of torchvision's or timm's DenseNet, such as one with another head, becomes
    a smaller one of its own class (see `generic.prune_cnn`), a `LightCNN` one that can be saved. Others need
    `input_size`, `calibration` images to take it from, or `example_inputs` (see there); `units`, `ratios` and
    latency are for DenseNets. But a Light CNN also takes `units=["sibling"]`: of each MFM pair the less
    important filter may go, and nothing else; its units go whole without. `mfm_win_rate` is for
    DenseNets and Light CNNs. In a net without norms `channels` counts the filters of convs.

    >>> import torchvision
    >>> small = prune(torchvision.models.densenet121(), 0.5)
    >>> small.eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """
    check_not_wrapped(model)
    config, loss = request_of(pruning_ratio, fields, loss)
    net = _as_densenet(model, config, ratios, latency_model)
    if net is None:
        _check_cnn_options(model, config, ratios, latency_model)
        config = with_defaults(config, model, calibration is not None)
        return prune_cnn(
            model, config, calibration=calibration, loss=loss, example_inputs=example_inputs
        )
    if example_inputs is not None:
        raise PruningError(
            "example_inputs have no effect on a DenseNet, which takes images of any size: leave them "
            "out, or give input_size"
        )
    config = with_defaults(config, net, calibration is not None)
    assert config.compensate is not None
    check_compensation(config.compensate, calibration is not None)
    batches = None if calibration is None else list(calibration)
    alone = config.compensate == "none"
    plan = make_plan(
        net,
        config,
        ratios=ratios,
        latency_model=latency_model,
        calibration=batches if reads_images(config.criterion) or alone else None,
        loss=loss,
    )
    small = apply_plan(net, plan)
    if batches is None or alone:
        return small
    return compensate_plan(
        small, net, plan, batches, config.compensate, loss=loss, seed=config.seed
    )


def _as_densenet(
    model: nn.Module,
    config: PruneConfig,
    ratios: Ratios | None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None,
) -> DenseNet | None:
    """The model as our DenseNet; None for one that is followed by its graph instead.

    That is any other CNN, and a variant of torchvision's or timm's DenseNet, such as one with another
    head, unless what is asked for is for DenseNets alone.
    """
    if isinstance(model, nn.Module) and not is_densenet(model):
        return None
    try:
        return convert(model, share=True)
    except ConversionError:
        only = config.units != USUAL_UNITS or ratios is not None or config.unit == LATENCY
        is_module = isinstance(model, nn.Module) and not isinstance(model, DenseNet)
        if not is_module or only or latency_model is not None:
            raise
        return None


def _check_cnn_options(
    model: nn.Module,
    config: PruneConfig,
    ratios: Ratios | None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None,
) -> None:
    kind, units = type(model).__name__, config.units
    light = isinstance(model, LightCNN)
    if units not in ((USUAL_UNITS, SIBLINGS) if light else (USUAL_UNITS,)):
        other = ", or give ['sibling'] to cut single filters of MFM units" if light else ""
        raise PruningError(
            f"units={list(units)} is for DenseNets; leave it out for a {kind}{other}"
        )
    if ratios is not None:
        raise PruningError(f"ratios are for DenseNets; leave them out for a {kind}")
    if config.unit == LATENCY or latency_model is not None:
        raise PruningError(
            f"a latency budget is for DenseNets; for a {kind} choose unit='macs', without a "
            "latency_model, and compare_latency afterwards"
        )


@usual_defaults()
@torch.inference_mode(False)
def apply_plan(model: nn.Module, plan: Plan) -> DenseNet:
    """The pruned net; `model` stays as it is.

    Each module that remains keeps its name, its training flag, and its tensors' dtype, device,
    memory format and `requires_grad`; nothing is shared with `model`. Hooks are not carried over.

    Raises PruningError when the plan was made for a net of another shape, or its parts disagree.

    >>> from prune_dn.models import densenet40
    >>> from prune_dn.pruning import make_plan
    >>> net = densenet40()
    >>> small = apply_plan(net, make_plan(net, 0.5))
    >>> small.config.num_init_features < net.config.num_init_features
    True
    """
    if not isinstance(plan, Plan):
        raise PruningError(
            f"the plan is a {type(plan).__name__}; give a Plan, such as Plan.load(path)"
        )
    plan = dataclasses.replace(plan)  # its mappings may have changed since it was checked
    check_sound(model)
    net = convert(model, share=True)
    if net.config != plan.config_before:
        raise PruningError(
            "this plan was made for a DenseNet of another shape; make a new plan for this model "
            "(a plan fits only the net that it was made for, before the cut)"
        )
    table = Units(net.config.graph())
    kept = cuts(table, units_of(table, plan.keep_indices))
    small = build_empty(plan.config_after, memory_efficient=net.memory_efficient)
    old_modules = dict(net.named_modules())
    device = net.classifier.weight.device
    for name, new in small.named_modules():
        old = old_modules[name]
        new.training = old.training
        if isinstance(new, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            fill_(new, old, kept.get(name, Cut(None, None)))
        else:  # the indices of a reader or an MFM
            for key, index in new._buffers.items():
                if index is not None:
                    new._buffers[key] = index.to(device)
        if isinstance(new, nn.BatchNorm2d) and isinstance(old, nn.BatchNorm2d):
            new.momentum = old.momentum
    check_filled(small)
    return small
