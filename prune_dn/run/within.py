"""As far as the accuracy allows: the largest cut whose measured drop stays within a budget."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_dn.base.defaults import usual_defaults
from prune_dn.base.files import StrPath
from prune_dn.base.intervals import paired_drop
from prune_dn.errors import BudgetError, ExportError, PruningError
from prune_dn.measure.latency import compare_latency
from prune_dn.measure.profiling import count
from prune_dn.models.families import default_image_size
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.compensate import check_compensation
from prune_dn.pruning.config import LATENCY, PruneConfig
from prune_dn.pruning.latency_model import fit_latency_model
from prune_dn.pruning.plan import Plan, plan_of
from prune_dn.pruning.planning import scores_of
from prune_dn.pruning.request import request_of, with_defaults
from prune_dn.pruning.subject import NetShape, Subject, subject
from prune_dn.pruning.surgery import cut_in_rounds
from prune_dn.run.trials import TOLERANCE, Trial, digest, mean, read_trials, write_trials

Evaluate = Callable[
    [nn.Module], Any
]  # a number, or a score per image, of which the metric is the mean


@dataclass(frozen=True)
class Found:
    """What a search found: the net, its trial, all trials in their order, and the dense net's metric.

    `plan` says what was cut; None of several rounds. `reach` is the largest share that the planner can cut at all, where the search met it, else None.
    """

    model: nn.Module
    plan: Plan | None
    best: Trial
    trials: tuple[Trial, ...]
    dense: float
    images: int | None
    reach: float | None

    def facts(self) -> dict[str, Any]:
        """All but the net and its plan, for a report."""
        return {
            "dense": self.dense,
            "images": self.images,
            "reach": self.reach,
            "best": asdict(self.best),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def __str__(self) -> str:
        best = self.best
        sure = "the metric is one number: how sure it is cannot be said"
        if best.interval is not None:
            low, high = best.interval
            sure = f"95 % interval {low:.4g} to {high:.4g} on {self.images:,} images"
        return (
            f"pruning_ratio {best.pruning_ratio:.3f}: {best.value:.4g} against {self.dense:.4g} "
            f"dense, a drop of {best.drop:.4g} ({sure})"
        )


@usual_defaults()
@torch.inference_mode(False)
def prune_within(
    model: nn.Module,
    evaluate: Evaluate,
    max_drop: float,
    *,
    calibration: Iterable[object] | None = None,
    example_inputs: Any = None,
    loss: str | LossFunction | None = None,
    tune: Callable[[nn.Module], object] | None = None,
    higher_is_better: bool = True,
    certain: bool = False,
    tolerance: float = TOLERANCE,
    timed: bool | None = None,
    path: StrPath | None = None,
    progress: Callable[[Trial], object] | None = None,
    request: PruneConfig | None = None,
    **fields: Any,
) -> Found:
    """The net with the largest cut whose metric falls by at most `max_drop`, found by bisection.

    `evaluate` gets a net in eval mode and returns the metric, in whose own units `max_drop` is: a number, or one
    score per image (a tensor, array or list), whose mean is the metric; then an interval says how sure the drop
    is. Give it validation images, not those of the last test. With `certain=True` a cut holds only if the upper
    end of that interval is within the budget. `higher_is_better=False` is for errors and losses.

    The search halves the span of `pruning_ratio` until it is at most `tolerance`. Each trial is cut anew from
    the given net by one set of scores, refitted where `calibration` is given, trained by `tune` (a function
    that changes the net, or returns another) if there is one, evaluated, and timed beside the dense net on
    the request's runtime, by default where the unit is `latency` (`timed`). What goes
    and how is said by the other arguments, those of `prune`, or by a `request`, whose ratio does not count. With `unit="latency"` it is
    a share of the time.

    Trials are kept in `path` (JSON, whole after each): the same call goes on from there, also with another
    `max_drop`; what `tune` does is not known to the file. `progress` gets each trial.

    Raises PruningError for arguments that are wrong, a metric that is not finite, a file of another search, and
    BudgetError where no cut holds, with the least drop that was seen.

    >>> from prune_dn.models import densenet
    >>> net = densenet([2], 8, bn_size=None, stem="cifar", num_classes=3)
    >>> found = prune_within(net, lambda net: net.classifier.in_features, max_drop=10, tolerance=0.2)
    >>> found.dense, found.best.drop <= 10, len(found.trials)
    (32.0, True, 3)
    """
    if "pruning_ratio" in fields or fields.get("settle"):
        raise PruningError("prune_within finds the ratio: leave pruning_ratio and settle out")
    budget = _positive("max_drop", max_drop)
    width = _positive("tolerance", tolerance)
    if width >= 1:
        raise PruningError(f"tolerance is {tolerance!r}; it is a share of the cost, below 1")
    # The ratio is found below.
    config, loss = request_of(TOLERANCE if request is None else request, fields, loss)
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)
    given = subject(model, config.input_size, example_inputs, calibration)
    config = with_defaults(config, given.model, calibration is not None)
    check_compensation(str(config.compensate), calibration is not None)
    search = _Search(given, config, evaluate, calibration, loss, tune, higher_is_better, timed)
    dense = _scores(evaluate(copy.deepcopy(given.model).eval()), "the dense net")
    search.dense = dense
    value = mean(dense)
    if higher_is_better and 0 < value <= budget:
        raise PruningError(
            f"max_drop is {max_drop!r} and the dense net has {value:.4g}: every cut would hold; give "
            "max_drop in the metric's own units, such as 0.01 for one point of an accuracy in [0, 1]"
        )
    if certain and len(dense) < 2:
        raise PruningError(
            "certain=True needs a score per image from evaluate: of one number nobody knows how sure it is"
        )
    trials = [] if path is None else read_trials(path, search.digest, dense)
    reach, low, high = None, 0.0, 1.0
    nets: dict[float, tuple[nn.Module, Plan | None]] = {}
    while high - low > width:
        ratio = (low + high) / 2
        trial = next((t for t in trials if t.pruning_ratio == ratio), None)
        if trial is None:
            try:
                trial, cut = search.trial(ratio)
            except BudgetError:
                reach = high = ratio
                continue
            nets[ratio] = cut
            trials.append(trial)
        trial = replace(trial, holds=_within(trial, budget, certain))
        trials[[t.pruning_ratio for t in trials].index(ratio)] = trial
        if path is not None:
            write_trials(path, search.digest, dense, trials)
        if progress is not None:
            progress(trial)
        low, high = (ratio, high) if trial.holds else (low, ratio)
        nets = {r: net for r, net in nets.items() if r == low}
    trials = [replace(t, holds=_within(t, budget, certain)) for t in trials]
    best = next((t for t in trials if t.pruning_ratio == low), None)
    if best is None:
        raise BudgetError(_nothing_holds(trials, max_drop, certain, low, high))
    small, plan = nets[low] if low in nets else search.cut(low)
    images = len(dense) if len(dense) > 1 else None
    return Found(small, plan, best, tuple(trials), value, images, reach)


class _Search:
    """The net, the request but for its ratio, and what all trials share."""

    dense: list[float]

    def __init__(
        self,
        given: Subject,
        config: PruneConfig,
        evaluate: Evaluate,
        calibration: Any,
        loss: str | LossFunction | None,
        tune: Callable[[nn.Module], object] | None,
        higher_is_better: bool,
        timed: bool | None,
    ) -> None:
        self.given, self.config, self.evaluate, self.tune = given, config, evaluate, tune
        self.timed = config.unit == LATENCY if timed is None else timed
        self.calibration, self.loss, self.sign = calibration, loss, 1 if higher_is_better else -1
        self.scores: Any = None
        self.latency: Any = None
        asked = {**asdict(config), "pruning_ratio": None}
        told = json.dumps([asked, higher_is_better, tune is not None], sort_keys=True, default=str)
        tensors = [*given.model.state_dict().values(), *tree_leaves(calibration)]
        self.digest = digest(told, tensors)

    def cut(self, ratio: float) -> tuple[nn.Module, Plan | None]:
        """The net of one ratio, and its plan. Raises BudgetError where no cut reaches it."""
        if self.scores is None:
            self.scores = scores_of(self.given, self.config, self.calibration, self.loss)
        if self.config.unit == LATENCY and self.latency is None:
            self.latency = fit_latency_model(
                self.given.model,
                **self.config.timed._asdict(),
                **self._inputs(),
                seed=self.config.seed,
            )
        small, (net, table, keep, told) = cut_in_rounds(
            self.given,
            replace(self.config, pruning_ratio=ratio),
            calibration=self.calibration,
            loss=self.loss,
            latency_model=self.latency,
            scores=self.scores,
        )
        if self.tune is not None:
            tuned = self.tune(small)
            small = tuned if isinstance(tuned, nn.Module) else small
        return small, plan_of(net, table, keep, *told) if self.config.rounds == 1 else None

    def trial(self, ratio: float) -> tuple[Trial, tuple[nn.Module, Plan | None]]:
        start = time.perf_counter()
        small, plan = self.cut(ratio)
        scores = _scores(self.evaluate(copy.deepcopy(small).eval()), f"pruning_ratio {ratio:.4g}")
        if len(scores) != len(self.dense):
            raise PruningError(
                f"evaluate gave {len(self.dense)} scores for the dense net and {len(scores)} at "
                f"pruning_ratio {ratio:.4g}; it must see the same images each time"
            )
        value, dense = mean(scores), mean(self.dense)
        before, after = (self.dense, scores) if self.sign > 0 else (scores, self.dense)
        interval = paired_drop(before, after) if len(scores) > 1 else None
        shape = self._inputs()
        cost = count(small, **shape)
        times = self._times(small, shape) if self.timed else (None, None)
        drop, seconds = self.sign * (dense - value), round(time.perf_counter() - start, 2)
        trial = Trial(ratio, value, drop, interval, False, cost.params, cost.macs, *times, seconds)
        return trial, (small, plan)

    def _inputs(self) -> dict[str, Any]:
        config = self.given.config
        if isinstance(config, NetShape):
            return {"example_inputs": self.given.inputs}
        return {"image_size": self.config.input_size or default_image_size(config)}

    def _times(self, small: nn.Module, shape: dict[str, Any]) -> tuple[float | None, float | None]:
        """Medians of the small and the dense net on the request's runtime."""
        try:
            found = compare_latency(
                {"small": small, "dense": self.given.model},
                **self.config.timed._asdict(),
                **shape,
            )
        except ExportError:
            return None, None
        return found["small"].median_ms, found["dense"].median_ms


def _within(trial: Trial, budget: float, certain: bool) -> bool:
    if certain and trial.interval is not None:
        return trial.interval[1] <= budget
    return trial.drop <= budget


def _nothing_holds(
    trials: list[Trial], max_drop: float, certain: bool, low: float, high: float
) -> str:
    if not trials:
        return f"no cut is possible: not even a share of {high:.3g} of the cost can go"
    least = min(trials, key=lambda t: t.drop)
    sure = (
        ""
        if not certain or least.interval is None
        else f", at most {least.interval[1]:.4g} for sure"
    )
    return (
        f"no cut holds max_drop={max_drop}: the least drop, {least.drop:.4g}{sure}, was at pruning_ratio "
        f"{least.pruning_ratio:.3g}; allow a larger drop, give calibration images (or more of them), or fine-tune "
        "each trial (tune)"
    )


def _positive(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise PruningError(f"{name} is {value!r}; it must be a number above 0")
    return number


def _scores(value: Any, what: str) -> list[float]:
    """What `evaluate` gave as a list: a score per image, or one number."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim > 1 or not found.numel():
        raise PruningError(
            f"evaluate gave {value!r:.200} for {what}; it must return one number, or one score per image"
        )
    if not found.isfinite().all():
        raise PruningError(f"evaluate gave {value!r:.200} for {what}; every number must be finite")
    return [float(x) for x in found.reshape(-1)]
