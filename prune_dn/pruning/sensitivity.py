"""What each module bears: its least important units go, alone, and the cut net is evaluated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from prune_dn.defaults import usual_defaults
from prune_dn.errors import PruningError
from prune_dn.losses import LossFunction
from prune_dn.models import DenseNet
from prune_dn.models.convert import convert
from prune_dn.profiling import Cost, ImageSize, count
from prune_dn.pruning import budget as budgets
from prune_dn.pruning.config import (
    KINDS,
    USUAL_UNITS,
    check_criterion,
    check_seed,
    names_in,
    units_in,
)
from prune_dn.pruning.criteria import CRITERIA, Scores
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.parts import Group, Mask, Positions
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.protect import protected_units
from prune_dn.pruning.ratios import SensitivityRow
from prune_dn.pruning.request import groups_of
from prune_dn.pruning.siblings import keep_to_competing
from prune_dn.pruning.surgery import apply_plan
from prune_dn.pruning.units import Units
from prune_dn.sound import check_sound


class _Cut(NamedTuple):
    """A group, the units of it that go, and the ratios that ask for so many."""

    group: Group
    gone: Positions
    ratios: tuple[float, ...]


@usual_defaults()
@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[DenseNet], float],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    criterion: str = "l2",
    units: Iterable[str] = USUAL_UNITS,
    protect: Iterable[str] = (),
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
    seed: int = 0,
    input_size: ImageSize | None = None,
    higher_is_better: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> list[SensitivityRow]:
    """Cut each group of units alone by each ratio, with the real surgery, and evaluate the result.

    A group is a module's units of one kind in `units`: what a stem, dense layer or transition makes
    (`stream`), a bottleneck, what a reader reads (`edge`), or what an MFM 2/1 lets compete (`sibling`:
    the loser of each pair). Its round(ratio * size) least
    important units by `criterion` go, with the exact consequences; everything else stays. As in
    `make_plan`, `protect`ed units stay, and so does the last unit of a group and the last channel
    that a reader reads; `units_cut` says what went. A ratio too small to cut anything has no row.

    `evaluate` gets a new net in eval mode and returns a number: accuracy, or with
    `higher_is_better=False` a loss. It may change the net, so it can recalibrate it; ratios that
    cut the same units share an evaluation. MACs are for images of `input_size`; `progress` is
    called with (evaluations done, in all). `calibration`, `loss` and `seed` are those of `make_plan`. The
    rows come in the order of the net, then by ratio (after arXiv:1608.08710, section 3.2).

    Raises PruningError for arguments that are wrong, or when nothing can be cut.

    >>> from prune_dn.models import densenet
    >>> net = densenet([2], 8, bn_size=None, stem="cifar", num_classes=3)
    >>> rows = sensitivity(net, lambda net: net.classifier.in_features, ratios=[0.5])
    >>> [(row.name.removeprefix("features."), row.units_cut, row.drop) for row in rows]
    [('conv0', 8, 8.0), ('denseblock1.denselayer1.conv1', 4, 4.0), ('denseblock1.denselayer2.conv1', 4, 4.0)]
    """
    check_sound(model)
    net = convert(model, share=True)
    wanted, kinds = _ratios(ratios), units_in(units, KINDS)
    check_criterion(criterion)
    seed = check_seed(seed)
    batches = calibration_for(calibration, criterion, loss)
    table = Units(net.config.graph())
    kept_back, _ = protected_units(table, names_in(protect, "protect"))
    groups = groups_of(table, kinds)
    may_go = ~kept_back
    if CRITERIA[criterion].need == "wins":
        may_go, _ = keep_to_competing(table, may_go, kinds, criterion)
    scores = importance(net, table, criterion, calibration=batches, seed=seed)
    cuts = [cut for group in groups for cut in _cuts(table, group, scores, may_go, wanted)]
    if not cuts:
        raise PruningError(
            f"ratios={list(wanted)} cut nothing: every group is protected or too small for them; "
            "give larger ratios, or protect less"
        )
    whole, total = count(net, input_size), len(cuts) + 1
    dense = _number(evaluate(copy.deepcopy(net).eval()), "the dense net")
    if not math.isfinite(dense):
        raise PruningError(f"evaluate gave {dense} for the dense net; it must be a finite number")
    rows = []
    for done, cut in enumerate(cuts, start=1):
        if progress is not None:
            progress(done, total)
        keep = np.ones(table.size, dtype=bool)
        keep[cut.gone] = False
        plan = plan_of(net.config, table, table.close(keep))
        small = apply_plan(net, plan)
        value = _number(evaluate(small.eval()), cut.group.name)
        drop = dense - value if higher_is_better else value - dense
        left = count(plan.config_after, input_size)
        rows += [_row(cut, ratio, (value, dense, drop), whole, left) for ratio in cut.ratios]
    if progress is not None:
        progress(total, total)
    return rows


def _cuts(
    table: Units, group: Group, scores: Scores, may_go: Mask, ratios: tuple[float, ...]
) -> Iterator[_Cut]:
    """The different cuts of one group, smallest first."""
    only = np.zeros(table.size, dtype=bool)
    only[group.units] = may_go[group.units]
    only = budgets.losers(table, scores, only)
    fixed, spare = budgets.floor(table, scores, only, 1)
    only &= ~(fixed | spare)
    candidates = np.flatnonzero(only)
    ranking = candidates[np.argsort(scores[candidates], kind="stable")]
    asked: dict[int, list[float]] = {}
    for ratio in ratios:
        asked.setdefault(min(round(ratio * group.size), len(ranking)), []).append(ratio)
    for number, same in asked.items():
        if number:
            yield _Cut(group, ranking[:number], tuple(same))


def _row(
    cut: _Cut, ratio: float, values: tuple[float, float, float], whole: Cost, left: Cost
) -> SensitivityRow:
    return SensitivityRow(
        cut.group.name,
        cut.group.kind,
        ratio,
        cut.group.size,
        len(cut.gone),
        *values,
        whole.params - left.params,
        whole.macs - left.macs,
    )


def _ratios(ratios: Any) -> tuple[float, ...]:
    """Ascending, each once."""
    given = ratios if isinstance(ratios, list | tuple | np.ndarray) else None
    if given is None or not len(given):
        raise PruningError(f"ratios is {ratios!r}; give a list of fractions, such as [0.25, 0.5]")
    for ratio in given:
        number = isinstance(ratio, int | float | np.floating) and not isinstance(ratio, bool)
        if not number or not 0 < ratio < 1:
            hint = f"; did you mean {ratio / 100}?" if number and 1 < ratio < 100 else ""
            raise PruningError(f"ratios: {ratio!r} must be a number in (0, 1){hint}")
    return tuple(sorted({float(ratio) for ratio in given}))


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PruningError(
            f"evaluate gave {value!r} for {name}; it must return one number"
        ) from None
