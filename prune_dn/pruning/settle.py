"""From a fixed competition to a settled one: every loser goes, and what is left are plain convs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from prune_dn.base.defaults import usual_defaults
from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction
from prune_dn.pruning.budget import losers
from prune_dn.pruning.config import PruneConfig
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.plan import Plan, plan_of
from prune_dn.pruning.siblings import Contest, contests
from prune_dn.pruning.subject import Subject, subject
from prune_dn.pruning.units import Units


@usual_defaults()
def settling_plan(
    model: nn.Module,
    calibration: Iterable[object] | None = None,
    *,
    criterion: str = "mfm_win_rate",
    loss: str | LossFunction | None = None,
    seed: int = 0,
) -> Plan:
    """The plan that settles every MFM of a DenseNet: of each pair the loser goes, nothing else.

    On new maps the net then has plain convs of half the filters, and as wide a stream as before. Of two
    stream channels that compete before a reader it reads the one that wins; a channel that loses
    before every reader is cut as well. `apply_plan`, `compensate_plan` and `Plan.save` take the plan.
    `calibration` are batches of images, (N, C, H, W), for criteria that read
    them, and `loss` what the outputs mean, for those that follow it (see `make_plan`).

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
    asked = PruneConfig(None, criterion=criterion, seed=seed, settle=True)
    given = subject(model)
    table = Units(given.graph)
    return plan_of(given, table, *settled(given, table, asked, calibration, loss))


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
