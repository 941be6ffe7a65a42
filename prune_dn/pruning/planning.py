"""From a net and a request to the plan that meets it."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.errors import PruningError, PruningWarning
from prune_dn.graph import Graph
from prune_dn.graph.types import OUTPUT
from prune_dn.models.families import default_image_size
from prune_dn.models.losses import LossFunction, loss_name
from prune_dn.models.sizes import sides
from prune_dn.models.weights import shorten
from prune_dn.pruning import budget as budgets
from prune_dn.pruning.arrange import arranged
from prune_dn.pruning.config import LATENCY, PruneConfig, Timing
from prune_dn.pruning.criteria import CRITERIA, follows_loss
from prune_dn.pruning.figures import Baseline, Measure, checked_baseline
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.latency_model import (
    LatencyModel,
    doubts,
    fit_latency_model,
    meet_latency,
)
from prune_dn.pruning.parts import Mask, Positions, Scores
from prune_dn.pruning.plan import Plan, plan_of
from prune_dn.pruning.protect import protected_units
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.ratios import Ratios, measured_drops, read_ratios
from prune_dn.pruning.readings import judged
from prune_dn.pruning.request import check_ratios, check_rounding, request_of, with_defaults
from prune_dn.pruning.settle import settled
from prune_dn.pruning.siblings import keep_to_competing
from prune_dn.pruning.statistics import Gram, Wins
from prune_dn.pruning.subject import NetShape, Subject, subject
from prune_dn.pruning.units import Units


@usual_defaults()
def make_plan(
    model: nn.Module,
    pruning_ratio: float | PruneConfig,
    *,
    calibration: Iterable[object] | None = None,
    example_inputs: Any = None,
    loss: str | LossFunction | None = None,
    ratios: Ratios | None = None,
    baseline: Baseline | None = None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None = None,
    **fields: Any,
) -> Plan:
    """Decide what to cut from a convolutional net; nothing is changed.

    The request is a `PruneConfig`, or its `pruning_ratio` and other fields by name. The ratio is measured
    against `baseline`, the net or the config of it before, or the model itself. `compensate` is only
    noted here: `prune` and `compensate_plan` carry it out.

    A DenseNet of ours, torchvision or timm and a Light CNN tell by their config what they are made of. Any
    other net is followed on an example: `example_inputs` (a tensor, a tuple of the forward's arguments,
    or a dict of them by name), a random image of `input_size`, or the first of `calibration`. Channels that a
    sum or a depthwise convolution ties together go together; what the net's outputs, a norm over
    channels, a computed weight or an unknown operation reads stays.

    `ratios`, a `sensitivity.json` or the rows of `sensitivity`, replaces prices by what was measured:
    each group of units gives up its least important ones as far as one drop allows, the same for all
    groups and the smallest that meets the budget. Between measured ratios the drop is taken to rise
    linearly; beyond the largest, and in groups that were not measured, nothing goes.

    Some criteria need `calibration`: batches of images (N, C, H, W), or (images, labels) batches for
    `taylor` and `fisher`; any iterable, normalised as in training. Several inputs are a tuple or a dict in the
    place of the images (see `data.batches.each_batch`). `prune-dn criteria` lists them. With
    `calibration` the default criterion is `reconstruction`.
    These three follow the `loss` that the net was trained with: `softmax` (one class
    of several), `sigmoid` (yes or no for each output), `mse` (numbers), or a callable (outputs,
    labels) -> the mean over the batch, which always needs labels. None is `softmax` where labels are
    class numbers; nothing else is guessed.
    `mfm_win_rate` judges only what competes; the rest stays, as `protected` says.

    `latency` is priced by `latency_model`, or a function that fits one once nothing else is wrong; by
    default `fit_latency_model(model)`, with the request's `runtime` (onnxruntime), `precision` (fp32) and `batch_size` (1) on
    this machine. Widths above the block
    of channels that the runtime computes in (`rates.step`) are cut to multiples of it too, where that
    can meet the budget: others would lose channels and save no time. The net is then timed
    beside the baseline and the plan corrected until the measured time meets the request; the times,
    in milliseconds of the model's runtime, are in `achieved`. A busy machine, a model that fits badly
    and a result far from the request are a PruningWarning, and stand there as `warnings`.

    Raises PruningError for a request that is wrong, cannot be met, or would change nothing.

    >>> from prune_dn.models import densenet40
    >>> plan = make_plan(densenet40(), 0.5, unit="macs")
    >>> round(plan.achieved["ratio"], 2)
    0.5
    >>> from torchvision.models import resnet18
    >>> plan = make_plan(resnet18(), 0.5, unit="macs", input_size=64)
    >>> plan.layers[1]["name"], plan.layers[1]["kind"], plan.layers[1]["before"]
    ('layer1.0.conv1', 'bottleneck', 64)
    """
    config, loss = request_of(pruning_ratio, fields, loss)
    if config.rounds > 1:
        raise PruningError(
            f"rounds={config.rounds}: a plan is of one round, and the next is scored on what it leaves; "
            "use prune, or plan each round against baseline"
        )
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)
    given = subject(model, config.input_size, example_inputs, calibration)
    criterion = with_defaults(config, given.model, calibration is not None).criterion
    config = dataclasses.replace(config, criterion=criterion)
    table, keep, told = decide(
        given,
        config,
        calibration=calibration,
        loss=loss,
        ratios=ratios,
        baseline=baseline,
        latency_model=latency_model,
    )
    return plan_of(given, table, keep, *told)


def settling_plan(
    model: nn.Module,
    calibration: Iterable[object] | None = None,
    *,
    criterion: str = "mfm_win_rate",
    loss: str | LossFunction | None = None,
    **fields: Any,
) -> Plan:
    """The plan that settles every MFM of a DenseNet: of each pair the loser goes, nothing else.

    On new maps the net then has plain convs of half the filters, and as wide a stream as before. Of two
    stream channels that compete before a reader it reads the one that wins; a channel that loses
    before every reader is cut as well. `apply_plan`, `compensate_plan` and `Plan.save` take the plan.
    `calibration` are batches of images, (N, C, H, W), for criteria that read
    them, and `loss` what the outputs mean, for those that follow it (see `make_plan`). `fields` are those of
    `PruneConfig` that may stand beside `settle`.

    Raises PruningError where there is no MFM 2/1, or one of three siblings, which have no loser.

    >>> import torch
    >>> from prune_dn.models import densenet
    >>> from prune_dn.pruning import apply_plan
    >>> net = densenet([2], 8, stem="cifar", num_classes=3, mfm={"*": "2/1"}, mfm_skipped={"*": "2/1"})
    >>> plan = settling_plan(net, [torch.randn(4, 3, 8, 8)])
    >>> plain = apply_plan(net, plan)
    >>> {layer.mfm for layer in plain.config.blocks[0]}, plain.config.classifier_rivals
    ({None}, None)
    """
    asked = PruneConfig(None, settle=True, criterion=criterion, **fields)
    return make_plan(model, asked, calibration=calibration, loss=loss)


Told = tuple[dict[str, Any], dict[str, Any], dict[str, str]]


def decide(
    given: Subject,
    config: PruneConfig,
    *,
    calibration: Iterable[object] | None,
    loss: str | LossFunction | None,
    ratios: Ratios | None,
    baseline: Baseline | None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None,
    scores: Scores | None = None,
) -> tuple[Units, Mask, Told]:
    """The units of a net, which of them stay, and what a plan tells: requested, achieved, protected.

    `config` has a criterion; `scores` are those of `scores_of`, where they are known already. The other
    arguments are those of `make_plan`.
    """
    asked = _sized(given, config)
    criterion, unit = asked.criterion, asked.unit
    assert criterion is not None
    check_ratios(ratios, asked.scope, asked.units)
    table = Units(given.graph)
    if asked.settle:
        keep, requested = settled(given, table, asked, calibration, _heeded(asked, loss))
        return table, keep, (requested, {}, {})
    assert asked.pruning_ratio is not None
    batches = calibration_for(calibration, criterion, _heeded(asked, loss))
    rows = None if ratios is None else read_ratios(ratios, table, asked.units)
    check_rounding(table, asked.units, asked.round_to)
    may_go, protected = allowed(given, table, asked)
    latency = _latency_model(latency_model, given, asked)
    baseline = checked_baseline(given, baseline)
    measure = Measure(given, table, asked, latency)
    whole = measure.before if baseline is None else measure.of(baseline)
    target = (1.0 - asked.pruning_ratio) * whole[unit]
    if measure.before[unit] <= target:
        raise PruningError(
            f"pruning_ratio={asked.pruning_ratio} of {unit} is reached already: the net has "
            f"{round(measure.before[unit], 3):,} of {round(whole[unit], 3):,}; nothing would be cut"
        )
    if scores is None:
        scores = importance(given.model, table, criterion, calibration=batches, seed=asked.seed)
    whole_units, place, summed, all_may = paired(table, scores, may_go)
    ranks = None
    if asked.scope == "local":
        ranks = budgets.quantiles(whole_units, summed)
    elif not table.selections and CRITERIA[criterion].need is not Gram:
        # Where no layer selects from a stream, layers are of many kinds: scores that are no loss are
        # compared within their group.
        ranks = budgets.shares(whole_units, summed, all_may)
    if rows is not None:
        ranks = measured_drops(whole_units, summed, all_may, rows)
    rates = COUNTED[unit] if latency is None else latency.rates
    least, multiple, layers = asked.min_channels, asked.round_to, "layer" in asked.units
    budget = budgets.Budget(
        target - measure.rest,
        unit,
        rates,
        ranks,
        least,
        multiple,
        layers,
        "connection" in asked.units,
        rest=measure.rest,
        stays=_what_stays(given.graph),
    )
    times: dict[str, float] = {}

    def chosen(asked: budgets.Budget) -> Mask:
        return budgets.choose(whole_units, summed, all_may, asked)[place]

    if latency is None:
        keep = chosen(budget)
    else:
        own = given.model if isinstance(given.config, NetShape) else given.config
        base = own if baseline is None else baseline
        keep, times = meet_latency(given, table, chosen, budget, latency, base)
    table = arranged(table, keep)
    requested = {
        **dataclasses.asdict(asked),
        "calibration_images": None if batches is None else len(batches),
        "loss": loss_name(loss),
    }
    if ratios is not None:
        is_path = isinstance(ratios, str | os.PathLike)
        requested["ratios"] = str(ratios) if is_path else "rows of sensitivity"
    if latency is not None:
        requested["latency_model"] = dataclasses.asdict(latency)
    achieved: dict[str, Any] = {"unit": unit}
    costs = {"baseline": whole, "before": measure.before, "after": measure.after(keep)}
    for when, cost in costs.items():
        achieved[when] = {name: cost[name] for name in COUNTED}
        if times:
            achieved[when][LATENCY] = times[when]
    achieved["ratio"] = 1.0 - achieved["after"][unit] / achieved["baseline"][unit]
    if latency is not None:
        achieved["runtime"], achieved["precision"] = latency.runtime, latency.precision
        achieved["warnings"] = doubts(latency, asked.pruning_ratio, times)
        for doubt in achieved["warnings"]:
            warnings.warn(doubt, PruningWarning, stacklevel=4)
    return table, keep, (requested, achieved, protected)


def scores_of(
    given: Subject,
    config: PruneConfig,
    calibration: Iterable[object] | None,
    loss: str | LossFunction | None,
) -> Scores:
    """The importance of each unit, which is the same for every ratio; arguments as of `decide`."""
    criterion = str(config.criterion)
    batches = calibration_for(calibration, criterion, _heeded(config, loss))
    table = Units(given.graph)
    return importance(given.model, table, criterion, calibration=batches, seed=config.seed)


def _heeded(config: PruneConfig, loss: str | LossFunction | None) -> str | LossFunction | None:
    """The loss where the criterion follows it; where only the compensation does, None."""
    follows = follows_loss(str(config.criterion)) or config.compensate in (None, "none")
    return loss if follows else None


def allowed(given: Subject, table: Units, asked: PruneConfig) -> tuple[Mask, dict[str, str]]:
    """The units that may go, and per group of units why others stay.

    Raises PruningError where none may.
    """
    kept_back, protected = protected_units(table, asked.protect)
    may_go = ~kept_back & table.of_kinds(asked.units)
    criterion, kind = str(asked.criterion), type(given.model).__name__
    if asked.protect and not may_go.any():
        raise PruningError(
            f"protect={list(asked.protect)} leaves no channels of this {kind} that could be cut"
        )
    if CRITERIA[criterion].need is Wins:
        may_go, why = keep_to_competing(table, may_go, asked.units, criterion)
        return may_go, {**why, **protected}
    can = judged(given.model, table, criterion)
    if criterion == "bn_scale" and may_go.any() and not (may_go & can).any():
        raise PruningError(
            f"criterion {criterion!r}: no norm with a scale is on channels of this {kind} that can go; "
            "choose a criterion that reads weights, such as l2, or images, such as taylor"
        )
    return may_go & can, protected


def paired(table: Units, scores: Scores, may_go: Mask) -> tuple[Units, Positions, Scores, Mask]:
    """Units of which the blocks of a grouped convolution give up one each at a time (see
    `Units.paired`), which of them each unit of `table` is, their scores, and which may go."""
    whole, place = table.paired(np.where(may_go, scores, np.inf))
    all_may = np.ones(whole.size, dtype=bool)
    np.logical_and.at(all_may, place, may_go)
    summed = np.bincount(place, scores, whole.size).astype(np.float64, copy=False)
    return whole, place, summed, all_may


def _what_stays(graph: Graph) -> str:
    """The first layers that keep all their channels though none is an output of the net, and why."""
    reasons = {p.layer: graph.why_fixed(p.layer) for p in graph.producers}
    found = [f"{layer} stays: {why}" for layer, why in reasons.items() if why not in (None, OUTPUT)]
    return shorten(found, 2)


def _sized(given: Subject, config: PruneConfig) -> PruneConfig:
    """The request with the size of images that a net of ours takes."""
    if isinstance(given.config, NetShape):
        return config
    return dataclasses.replace(
        config, input_size=config.input_size or default_image_size(given.config)
    )


def _latency_model(
    given_model: LatencyModel | Callable[[], LatencyModel] | None,
    given: Subject,
    asked: PruneConfig,
) -> LatencyModel | None:
    """The model of latency that the plan goes by, fitted here and now if need be."""
    if given_model is not None and asked.unit != LATENCY:
        raise PruningError(
            f"latency_model has no effect with unit {asked.unit!r}; use unit='latency'"
        )
    if asked.unit != LATENCY:
        return None
    inputs = given.config.inputs if isinstance(given.config, NetShape) else None
    size = asked.input_size if inputs is None else None
    if given_model is None:
        return fit_latency_model(
            given.model,
            **asked.timed._asdict(),
            image_size=size,
            example_inputs=given.inputs,
            seed=asked.seed,
        )
    found = given_model if isinstance(given_model, LatencyModel) else given_model()
    if found.inputs != inputs:
        raise PruningError(
            "latency_model was fitted on other inputs than this net was followed on; fit it on this "
            f"{type(given.model).__name__}, with the same image_size or example_inputs"
        )
    if size is not None and found.image_size is not None and sides(found.image_size) != sides(size):
        raise PruningError(
            f"latency_model was fitted on images of {found.image_size} pixels, and input_size is "
            f"{size}; fit it with image_size={size}"
        )
    for name in Timing._fields:
        if getattr(asked, name) not in (None, getattr(found, name)):
            raise PruningError(
                f"latency_model was fitted with {name} {getattr(found, name)!r}, and "
                f"{getattr(asked, name)!r} is asked for; leave one of the two out"
            )
    return found
