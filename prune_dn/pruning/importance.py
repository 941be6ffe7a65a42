"""How much each unit matters: the sum of what all that read it lose with it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from prune_dn.data.batches import Batches, read_batches
from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.criteria import (
    CRITERIA,
    Reading,
    Scores,
    follows_loss,
    judge,
    needs_images,
    needs_labels,
)
from prune_dn.pruning.parts import STAYS
from prune_dn.pruning.readings import kernels, observe, of_readers
from prune_dn.pruning.siblings import contests, share_out
from prune_dn.pruning.statistics import Wins
from prune_dn.pruning.units import Units


def importance(
    model: nn.Module,
    units: Units,
    criterion: str,
    *,
    calibration: Batches | None = None,
    seed: int = 0,
) -> Scores:
    """The importance of every unit, (units.size,), in the order of `units`.

    Raises PruningError for an unknown criterion, one that needs calibration images and has none,
    and for scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise PruningError(
            f"criterion {criterion!r} is unknown; choose one of {', '.join(sorted(CRITERIA))}"
        )
    generator = torch.Generator().manual_seed(seed)
    competes = CRITERIA[criterion].need is Wins
    if competes:
        scores = _of_competition(model, units, criterion, calibration, generator, seed)
    else:
        scores = of_readers(model, units, criterion, calibration, generator)
        share_out(model, units, scores, criterion, generator, is_made=False)
    goes = units.source != STAYS
    lost = np.bincount(units.source[goes], scores[units.reads[goes]], units.size)
    scores[units.is_channel] += lost[units.is_channel]
    if not competes:
        share_out(model, units, scores, criterion, generator, is_made=True)
    return scores


def _of_competition(
    model: nn.Module,
    units: Units,
    criterion: str,
    calibration: Batches | None,
    generator: torch.Generator,
    seed: int,
) -> Scores:
    """What each sibling is worth; a unit or edge has their sum, and all else 0.

    Edges share the worth of a unit of new maps equally, so that it is again the sum over them.
    """
    everyone = list(contests(units))
    found = observe(model, [contest.name for contest in everyone], criterion, calibration, seed)
    scores, made = np.zeros(units.size), np.zeros(units.size)
    for contest in everyone:
        layer = model.get_submodule(contest.conv)
        weight = kernels(layer)
        weight = weight.transpose(0, 1) if contest.is_made else weight[:, contest.owner]
        reading = Reading(contest.name, None, weight, generator, found.pop(contest.name))
        losses = judge(reading, criterion)
        if contest.group is not None:
            scores[contest.group.units] = losses
        whole = np.bincount(contest.owner, losses, contest.whole.size)
        (made if contest.is_made else scores)[contest.whole.units] += whole
    plain = [s for s in units.selections if s.sides is None]
    sources = [s.sources[s.sources != STAYS] for s in plain]
    count = np.bincount(np.concatenate([*sources, units.source[:0]]), minlength=units.size)
    for selection in plain:
        source = selection.sources
        share = made[source] / np.maximum(count[source], 1)
        scores[selection.edges.units] = np.where(source == STAYS, 0.0, share)
    others = units.is_channel & (count == 0) & units.is_read
    scores[others] = made[others]
    return scores


def calibration_for(
    calibration: Iterable[object] | None, criterion: str, loss: str | LossFunction | None
) -> Batches | None:
    """The batches that the criterion reads; None when it reads none."""
    need = CRITERIA[criterion].need
    if need is None and calibration is not None:
        raise PruningError(
            f"calibration has no effect: criterion {criterion!r} reads only the weights; leave it "
            "out, or choose a criterion that reads images (`prune-dn criteria`)"
        )
    if loss is not None and not follows_loss(criterion):
        raise PruningError(
            f"loss has no effect: criterion {criterion!r} does not depend on what the outputs mean; "
            "leave it out"
        )
    if need is None:
        return None
    if calibration is None:
        raise needs_images(criterion)
    labelled = needs_labels(criterion) or (follows_loss(criterion) and callable(loss))
    return read_batches(calibration, needs_labels=labelled, loss=loss)
