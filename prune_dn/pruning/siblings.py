"""How the importance of what competes is shared out among the siblings, and who competes at all.

A reader cannot tell siblings apart: it sees their maximum. So, by every criterion but those that look
at the competition itself (`wins`), the score of an MFM unit is shared out in proportion to what its
filters weigh (|w| for `l1`, at random for `random`, their Euclidean norm for all others): they read the
same maps, so this is comparable. Of two stream channels that compete before a reader each has half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.pruning.parts import Group, Mask, Positions
from prune_dn.pruning.units import Units

Scores = npt.NDArray[np.float64]


class Contest(NamedTuple):
    """An MFM: who competes in which module, and what siblings make up.

    `owner` is the unit of `whole` (stream units, or the edges of a competing reader) that each sibling
    is of; `group` holds the siblings, None where none can go alone (3/2). `conv` makes what competes
    (`is_made`), or reads what wins.
    """

    name: str
    group: Group | None
    whole: Group
    owner: Positions
    conv: str
    is_made: bool

    @property
    def winners(self) -> int:
        """How many maps come out."""
        return self.whole.size * self.whole.survivors


def contests(units: Units) -> Iterator[Contest]:
    """Every MFM of the net, in the order in which they run."""
    pairs = {found.group.name: found for found in units.pairs}
    for competition in units.graph.competitions:
        name, reader, maker = competition.module, competition.reader, competition.maker
        if name in pairs:
            group, whole, owner = pairs[name].group, pairs[name].whole, pairs[name].owner
            yield Contest(name, group, whole, owner, reader or maker or "", reader is None)
        else:
            first = int(units.unit(competition.results[0])[0])
            whole = units.groups[units.group_of[first]]
            owner = np.tile(np.arange(whole.size), len(competition.operands))
            yield Contest(name, None, whole, owner, maker or "", True)


def share_out(
    model: nn.Module,
    units: Units,
    scores: Scores,
    criterion: str,
    generator: torch.Generator,
    *,
    is_made: bool,
) -> None:
    """Fill in the scores of siblings, of new maps or before readers, from those of their units."""
    for contest in contests(units):
        if contest.is_made != is_made or contest.group is None:
            continue
        layer = model.get_submodule(contest.conv) if is_made else None
        whole = scores[contest.whole.units]
        scores[contest.group.units] = shared(whole, contest.owner, layer, criterion, generator)


def shared(
    whole: Scores,
    owner: Positions,
    layer: nn.Module | None,
    criterion: str,
    generator: torch.Generator,
) -> Scores:
    """What each sibling has of the score of its unit; `layer` makes them, None = they are read."""
    weights = torch.ones(len(owner), dtype=torch.double)
    if criterion == "random":
        weights = torch.rand(len(weights), generator=generator).double()
    elif layer is not None:
        filters = layer.get_parameter("weight").detach().flatten(1).double().cpu()
        weights = filters.norm(p=1 if criterion == "l1" else 2, dim=1)
    total = np.bincount(owner, weights.numpy(), len(whole))[owner]
    share = 1.0 / np.bincount(owner, minlength=len(whole))[owner]  # where all weights are 0
    np.divide(weights.numpy(), total, out=share, where=total > 0)
    found: Scores = whole[owner] * share
    return found


def competing(units: Units) -> Mask:
    """What competes: siblings that have a rival, and the units and edges that they make up."""
    found = np.zeros(units.size, dtype=bool)
    for contest in contests(units):
        rivalled = np.bincount(contest.owner, minlength=contest.whole.size) > 1
        found[contest.whole.units] = rivalled
        if contest.group is not None:
            found[contest.group.units] = rivalled[contest.owner]
    return found


def keep_to_competing(
    units: Units, may_go: Mask, kinds: tuple[str, ...], criterion: str
) -> tuple[Mask, dict[str, str]]:
    """`may_go` for a criterion that judges only what competes; and per group why the rest stays.

    Raises PruningError when nothing that may go competes.
    """
    judged = competing(units)
    if not (judged & may_go).any():
        what = "no MFM" if not judged.any() else f"none among units={list(kinds)} that may go"
        raise PruningError(
            f"criterion {criterion!r} judges only what competes, and this net has {what}; choose "
            "another criterion, or other units"
        )
    reasons = {
        group.name: f"{count} of {group.size} {group.kind} units stay: they do not compete, and "
        f"{criterion} judges only what does"
        for group in units.groups
        if (count := int((may_go & ~judged)[group.units].sum()))
    }
    return may_go & judged, reasons
