"""What may be asked of a cut, checked and put in order before anything else is done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from torch import nn

from prune_dn import limits
from prune_dn.errors import PruningError
from prune_dn.profiling import ImageSize, sides
from prune_dn.pruning.coupled import Norm
from prune_dn.pruning.criteria import CRITERIA
from prune_dn.pruning.latency_model import LATENCY
from prune_dn.pruning.parts import KINDS, Group, Kind
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.ratios import Ratios
from prune_dn.pruning.units import Units

SCOPES = ("global", "local")
UnitKind = Kind | Literal["layer"]
UNITS = (*KINDS, "layer")
USUAL_UNITS: tuple[UnitKind, ...] = ("stream", "bottleneck")


@dataclass(frozen=True)
class Request:
    """The arguments of `make_plan` that are data: plain numbers, units each once and in one order.

    `criterion` None stands for `usual_criterion`, until the model is known.

    Raises PruningError for a number out of its range, or an unknown choice.
    """

    pruning_ratio: float
    unit: str = "channels"
    criterion: str | None = None
    scope: str = "global"
    units: tuple[str, ...] = USUAL_UNITS
    protect: tuple[str, ...] = ()
    min_channels: int = 1
    round_to: int = 1
    input_size: ImageSize | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        plain = {
            "pruning_ratio": check_ratio(self.pruning_ratio),
            "units": units_in(self.units),
            "protect": names_in(self.protect, "protect"),
            "min_channels": whole_number("min_channels", self.min_channels),
            "round_to": whole_number("round_to", self.round_to),
            "seed": check_seed(self.seed),
        }
        if self.input_size is not None:
            height, width = sides(self.input_size)
            plain["input_size"] = height if height == width else (height, width)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        check_choice("unit", self.unit, (*COUNTED, LATENCY))
        check_choice("scope", self.scope, SCOPES)
        if self.criterion is not None:
            check_criterion(self.criterion)
        if "layer" in self.units and ("stream" not in self.units or self.scope != "global"):
            raise PruningError("units 'layer' needs 'stream' among the units, and scope 'global'")


def usual_criterion(model: nn.Module) -> str:
    """`bn_scale` where norms have scales, else `l2`."""
    scaled = any(getattr(m, "affine", False) for m in model.modules() if isinstance(m, Norm))
    return "bn_scale" if scaled else "l2"


def check_criterion(criterion: Any) -> None:
    """Raise PruningError for an unknown criterion."""
    check_choice("criterion", criterion, sorted(CRITERIA))


def check_ratio(ratio: Any) -> float:
    """The share to remove as a plain number, in (0, 1)."""
    value = math.nan if isinstance(ratio, bool) or not isinstance(ratio, Real) else float(ratio)
    if math.isnan(value):
        raise PruningError(f"pruning_ratio is {ratio!r}; it must be a number in (0, 1)")
    if value == 0:
        raise PruningError("pruning_ratio is 0: nothing would be cut; give the share to remove")
    if not 0 < value < 1:
        hint = f"; did you mean {value / 100}?" if 1 < value < 100 else ""
        raise PruningError(f"pruning_ratio is {ratio!r}; it must lie in (0, 1){hint}")
    return value


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An integer from `least` to `most`, as a plain one."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < least or (most is not None and int(value) > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise PruningError(f"{name} is {value!r}; it must be an integer {bounds}")
    return int(value)


def check_seed(seed: Any) -> int:
    """A seed as a plain integer."""
    return whole_number("seed", seed, 0, limits.SEED)


def units_in(values: Iterable[str], allowed: tuple[str, ...] = UNITS) -> tuple[str, ...]:
    """Kinds of units, each once, in the order of `allowed`."""
    kinds = names_in(values, "units")
    for kind in kinds:
        check_choice("units", kind, allowed)
    if not kinds:
        raise PruningError(f"units is empty: nothing may be cut; choose from {', '.join(allowed)}")
    return tuple(kind for kind in allowed if kind in kinds)


def names_in(values: Iterable[str], argument: str) -> tuple[str, ...]:
    """A list of names, as a tuple."""
    if isinstance(values, str):
        raise PruningError(f"{argument}={values!r} is one string; give a list, [{values!r}]")
    found = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(value, str) for value in found):
        raise PruningError(f"{argument} is {values!r}; give a list of names")
    return found


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise PruningError for a value that is none of those allowed."""
    choices = tuple(allowed)
    if not isinstance(value, str) or value not in choices:
        raise PruningError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")


def check_ratios(ratios: Ratios | None, scope: str, kinds: tuple[str, ...]) -> None:
    """Raise PruningError for what has no effect beside `ratios`, or was not measured by them."""
    if ratios is not None and scope != "global":
        raise PruningError(
            f"scope={scope!r} has no effect with ratios: these say how much of each module goes; "
            "leave one of the two out"
        )
    if ratios is not None and "layer" in kinds:
        raise PruningError(
            "units 'layer' and ratios do not go together: whole layers go by their price; leave one "
            "of the two out"
        )


def groups_of(table: Units, kinds: tuple[str, ...]) -> list[Group]:
    """The groups of these kinds. Raises PruningError when there are none."""
    found = [group for group in table.groups if group.kind in kinds]
    if not found:
        raise PruningError(
            f"units={list(kinds)}: this net has none of them (a basic layer has no bottleneck, and "
            "siblings are those of an MFM 2/1)"
        )
    return found


def check_rounding(table: Units, kinds: tuple[str, ...], round_to: int) -> None:
    """Raise PruningError where no width is as large as the multiple that is asked for."""
    widest = max(group.size for group in groups_of(table, kinds))
    if round_to > widest:
        raise PruningError(
            f"round_to={round_to} is larger than every width that may be cut (the widest is "
            f"{widest}): nothing could go; choose a smaller multiple"
        )
