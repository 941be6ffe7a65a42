"""From a fixed competition to a settled one: every loser goes, and what is left are plain convs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.budget import losers
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.siblings import Contest, contests
from prune_dn.pruning.subject import Subject
from prune_dn.pruning.units import Units


def settled(
    given: Subject,
    table: Units,
    asked: PruneConfig,
    calibration: Iterable[object] | None,
    loss: str | LossFunction | None,
) -> tuple[Mask, dict[str, Any]]:
    """The units that stay, and what a plan says of the request, which has a criterion."""
    found, criterion = settled_contests(table), str(asked.criterion)
    batches = calibration_for(calibration, criterion, loss)
    scores = importance(given.model, table, criterion, calibration=batches, seed=asked.seed)
    lose = np.zeros(table.size, dtype=bool)
    for contest in found:
        assert contest.group is not None
        lose[contest.group.units] = True
    keep = table.close(~losers(table, scores, lose))
    return keep, {"settle": True, "criterion": criterion, "seed": asked.seed}


def settled_contests(table: Units) -> list[Contest]:
    """What competes in a net. Raises PruningError where there is nothing, or some have no loser."""
    found = list(contests(table))
    endless = [contest.name for contest in found if contest.group is None]
    if not found or endless:
        what = (
            f"{endless[0]} is an MFM 3/2, where no sibling can go alone"
            if endless
            else ("this net has no MFM")
        )
        raise PruningError(f"nothing to settle: {what}; only an MFM 2/1 has a loser in each pair")
    return found
