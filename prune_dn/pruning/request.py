"""A request beside a model: its defaults, and what needs the net's units to be checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_dn.errors import PruningError
from prune_dn.models.losses import LossFunction, check_loss
from prune_dn.pruning.config import CALIBRATED, PruneConfig
from prune_dn.pruning.parts import Group
from prune_dn.pruning.ratios import Ratios
from prune_dn.pruning.units import Units


def request_of(
    request: float | PruneConfig, fields: Mapping[str, Any], loss: str | LossFunction | None
) -> tuple[PruneConfig, str | LossFunction | None]:
    """The request with the name of `loss` in it, and the loss itself, a name or a callable."""
    config = PruneConfig.of(request, fields)
    if loss is None or loss == config.loss:
        return config, config.loss
    if config.loss is not None:
        raise PruningError(
            f"loss={loss!r:.60} beside a PruneConfig with loss={config.loss!r}: give one of the two"
        )
    check_loss(loss)
    return (dataclasses.replace(config, loss=loss) if isinstance(loss, str) else config), loss


def with_defaults(config: PruneConfig, model: nn.Module, calibrated: bool) -> PruneConfig:
    """The request with `criterion` and `compensate` as they are by default for this model.

    With calibration images these are `reconstruction` and `least_squares`, each for itself. Without,
    `usual_criterion` and `none`.

    >>> from prune_dn.models import densenet40
    >>> found = with_defaults(PruneConfig(0.5, criterion="l2"), densenet40(), calibrated=True)
    >>> found.criterion, found.compensate
    ('l2', 'least_squares')
    """
    criterion, compensate = config.criterion, config.compensate
    if criterion is None:
        criterion = CALIBRATED[0] if calibrated else usual_criterion(model)
    if compensate is None:
        compensate = CALIBRATED[1] if calibrated else "none"
    return dataclasses.replace(config, criterion=criterion, compensate=compensate)


def usual_criterion(model: nn.Module) -> str:
    """`bn_scale` where norms have scales, else `l2`."""
    scaled = any(m.affine for m in model.modules() if isinstance(m, _NormBase))
    return "bn_scale" if scaled else "l2"


def check_ratios(ratios: Ratios | None, scope: str, kinds: tuple[str, ...]) -> None:
    """Raise PruningError for what has no effect beside `ratios`, or was not measured by them."""
    if ratios is not None and scope != "global":
        raise PruningError(
            f"scope={scope!r} has no effect with ratios: these say how much of each module goes; "
            "leave one of the two out"
        )
    for kind, whole in (("layer", "whole layers"), ("connection", "connections")):
        if ratios is not None and kind in kinds:
            raise PruningError(
                f"units {kind!r} and ratios do not go together: {whole} go by their price; leave one "
                "of the two out"
            )


def groups_of(table: Units, kinds: tuple[str, ...]) -> list[Group]:
    """The groups of these kinds. Raises PruningError when there are none."""
    found = [group for group in table.groups if table.of_kinds(kinds)[group.units].any()]
    if not found:
        raise PruningError(
            f"units={list(kinds)}: this net has none of them (a basic layer has no bottleneck, edges and "
            "connections need a batch norm in front of a layer that reads what others read too, and "
            "siblings are those of an MFM 2/1)"
        )
    return found


def check_rounding(table: Units, kinds: tuple[str, ...], round_to: int) -> None:
    """Raise PruningError where no width is as large as the multiple that is asked for."""
    found = [group for group in groups_of(table, kinds) if group.kind in kinds]
    if not found and round_to > 1:
        raise PruningError(
            f"round_to={round_to} has no effect on connections, which go whole; leave it out, or cut "
            "other units too"
        )
    widest = max((group.size for group in found), default=1)
    if round_to > widest:
        raise PruningError(
            f"round_to={round_to} is larger than every width that may be cut (the widest is "
            f"{widest}): nothing could go; choose a smaller multiple"
        )
