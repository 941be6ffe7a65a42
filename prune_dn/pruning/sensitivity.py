"""What each module bears: its least important units go, alone, and the cut net is evaluated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction
from prune_dn.models.sizes import ImageSize
from prune_dn.pruning import budget as budgets
from prune_dn.pruning.config import KINDS, USUAL_UNITS, PruneConfig, names_in, units_in
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.parts import Group, Mask, Positions, Scores
from prune_dn.pruning.planning import allowed, paired
from prune_dn.pruning.rates import COUNTED, Costing
from prune_dn.pruning.ratios import SensitivityRow
from prune_dn.pruning.request import groups_of
from prune_dn.pruning.subject import subject
from prune_dn.pruning.surgery import carried_out
from prune_dn.pruning.units import Units


class _Cut(NamedTuple):
    """A group, the units of it that go, and the ratios that ask for so many."""

    group: Group
    gone: Positions
    ratios: tuple[float, ...]


@usual_defaults()
@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[Any], float],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    criterion: str = "l2",
    units: Iterable[str] = USUAL_UNITS,
    protect: Iterable[str] = (),
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
    seed: int = 0,
    input_size: ImageSize | None = None,
    example_inputs: Any = None,
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
    called with (evaluations done, in all). `calibration`, `loss`, `seed` and `example_inputs` are those of
    `make_plan`. The
    rows come in the order of the net, then by ratio (after arXiv:1608.08710, section 3.2).

    Raises PruningError for arguments that are wrong, or when nothing can be cut.

    >>> from prune_dn.models import densenet
    >>> net = densenet([2], 8, bn_size=None, stem="cifar", num_classes=3)
    >>> rows = sensitivity(net, lambda net: net.classifier.in_features, ratios=[0.5])
    >>> [(row.name.removeprefix("features."), row.units_cut, row.drop) for row in rows]
    [('conv0', 8, 8.0), ('denseblock1.denselayer1.conv1', 4, 4.0), ('denseblock1.denselayer2.conv1', 4, 4.0)]
    """
    wanted, kinds = _ratios(ratios), units_in(units, KINDS)
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)
    asked = PruneConfig(
        0.5, criterion=criterion, units=kinds, protect=names_in(protect, "protect"), seed=seed
    )
    given = subject(model, input_size, example_inputs, calibration)
    batches = calibration_for(calibration, criterion, loss)
    single = Units(given.graph)
    groups_of(single, kinds)
    may_go, _ = allowed(given, single, asked)
    found = importance(given.model, single, criterion, calibration=batches, seed=asked.seed)
    table, place, scores, may_go = paired(single, found, may_go)
    groups = groups_of(table, kinds)
    cuts = [cut for group in groups for cut in _cuts(table, group, scores, may_go, wanted)]
    if not cuts:
        raise PruningError(
            f"ratios={list(wanted)} cut nothing: every group is protected or too small for them; "
            "give larger ratios, or protect less"
        )
    costing, total = Costing(table), len(cuts) + 1
    whole = np.ones(table.size, dtype=bool)
    dense = _number(evaluate(copy.deepcopy(given.model).eval()), "the dense net")
    if not math.isfinite(dense):
        raise PruningError(f"evaluate gave {dense} for the dense net; it must be a finite number")
    rows = []
    for done, cut in enumerate(cuts, start=1):
        if progress is not None:
            progress(done, total)
        keep = np.ones(table.size, dtype=bool)
        keep[cut.gone] = False
        keep = table.close(keep)
        small = carried_out(given, single, keep[place])
        value = _number(evaluate(small.eval()), cut.group.name)
        drop = dense - value if higher_is_better else value - dense
        saved = [
            int(costing.total(whole, rates) - costing.total(keep, rates))
            for rates in (COUNTED["params"], COUNTED["macs"])
        ]
        rows += [_row(cut, ratio, (value, dense, drop), saved) for ratio in cut.ratios]
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
    cut: _Cut, ratio: float, values: tuple[float, float, float], saved: Sequence[int]
) -> SensitivityRow:
    return SensitivityRow(
        cut.group.name,
        cut.group.kind,
        ratio,
        cut.group.size,
        len(cut.gone),
        *values,
        *saved,
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
