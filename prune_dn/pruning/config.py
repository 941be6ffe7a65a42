"""The request: what may be asked of a cut, its defaults and choices, checked before anything is done.

Loads no torch, so that the command line takes its defaults and choices from here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

from prune_dn.base import limits
from prune_dn.base.runtimes import PRECISIONS, RUNTIMES, Precision, Runtime, why_not_offered
from prune_dn.errors import PruningError

Unit = Literal["channels", "params", "macs", "latency"]
Scope = Literal["global", "local"]
Kind = Literal["stream", "bottleneck", "edge", "sibling"]
UnitKind = Literal["stream", "bottleneck", "edge", "connection", "sibling", "layer"]
Compensation = Literal["none", "mean", "least_squares"]
LATENCY = "latency"
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)
KINDS: tuple[Kind, ...] = get_args(Kind)
UNITS: tuple[UnitKind, ...] = get_args(UnitKind)
USUAL_UNITS: tuple[UnitKind, ...] = ("stream", "bottleneck")
SIBLINGS: tuple[UnitKind, ...] = ("sibling",)
# The best that is known with calibration images: criterion and compensation.
CALIBRATED: tuple[str, Compensation] = ("reconstruction", "least_squares")
# What may stand beside `settle`.
SETTLING = {"settle", "criterion", "loss", "compensate", "input_size", "seed"}


class Timing(NamedTuple):
    """What a latency is of: who runs the net, on how many images at once, in which precision."""

    runtime: Runtime
    batch_size: int
    precision: Precision


TIMED = Timing("onnxruntime", 1, "fp32")  # by default
# The least and the most of each whole number in a request.
BOUNDS: dict[str, tuple[int, int]] = {
    "min_channels": (1, limits.CHANNELS),
    "round_to": (1, limits.CHANNELS),
    "batch_size": (1, limits.BATCH_SIZE),
    "seed": (0, limits.SEED),
    "rounds": (1, limits.ROUNDS),
}


@dataclass(frozen=True)
class PruneConfig:
    """One request, used by `prune`, `make_plan`, recipes, the command line and `Plan.requested`.

    `pruning_ratio` in (0, 1) is the share of `unit` that goes: `channels` of norms, `params`, `macs`
    or `latency`, at `input_size` (pixels, or (height, width)). `units` are the kinds that may be cut:
    `stream`, `bottleneck`, `edge`, `connection` (all edges from one layer's outputs to one reader, which
    go together; not beside `edge`), `sibling` (of each pair in an MFM 2/1 the one that loses, so that
    the other stands alone), and `layer` beside `stream` in a `global` plan: dense layers may also
    go whole, which pays in latency. `scope` ranks over the whole net, by importance per cost saved, priced anew as
    the net shrinks (`global`), or cuts the same share of each module (`local`). A width that is cut
    becomes a multiple of `round_to` (connections go whole all the same; the kept count is rounded up; a channel that nobody reads goes
    all the same), and no width falls below `min_channels`. Modules whose names, or whose parents'
    names, match a pattern in `protect` keep all weights: neither what they make nor what they read
    is cut. `loss` is the name of what the net's outputs mean (`softmax`, `sigmoid`, `mse`).
    `rounds` above 1 are for `prune`, which then scores, cuts and refits in as many equal steps, without training.
    `settle` takes the place of the ratio, which is None: every loser of an MFM goes, nothing else
    (`settling_plan`). `runtime`, `precision` and `batch_size` are those of the unit `latency` (None: as `TIMED`).

    `criterion` and `compensate` None stand for the best that is known (`with_defaults`): with
    calibration images `reconstruction` and `least_squares`; without, `bn_scale` where norms have
    scales, else `l2`, and no compensation.

    Units are held each once and in one order, numbers as plain ones. Raises PruningError for a
    number out of its range, an unknown choice, and fields that do not go together.

    >>> PruneConfig(0.5, unit="macs", units=["edge", "stream"]).units
    ('stream', 'edge')
    >>> PruneConfig(0.5, batch_size=8)
    Traceback (most recent call last):
    ...
    prune_dn.errors.PruningError: batch_size has no effect with unit 'channels'; use unit 'latency'
    """

    pruning_ratio: float | None
    unit: Unit = "channels"
    criterion: str | None = None
    loss: str | None = None
    scope: Scope = "global"
    units: tuple[UnitKind, ...] = USUAL_UNITS
    protect: tuple[str, ...] = ()
    min_channels: int = 1
    round_to: int = 1
    compensate: Compensation | None = None
    runtime: Runtime | None = None
    precision: Precision | None = None
    batch_size: int | None = None
    input_size: int | tuple[int, int] | None = None
    seed: int = 0
    settle: bool = False
    rounds: int = 1

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "pruning_ratio": self.pruning_ratio if self.settle else check_ratio(self.pruning_ratio),
            "units": units_in(self.units),
            "protect": names_in(self.protect, "protect"),
        }
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            is_open = name == "batch_size" and value is None
            plain[name] = None if is_open else whole_number(name, value, *bounds)
        if self.input_size is not None:
            from prune_dn.models.sizes import sides

            height, width = sides(self.input_size)
            plain["input_size"] = height if height == width else (height, width)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.settle:
            self._check_settling()
        check_choice("unit", self.unit, get_args(Unit))
        check_choice("scope", self.scope, get_args(Scope))
        if self.criterion is not None:
            check_criterion(self.criterion)
        if self.compensate is not None:
            check_choice("compensate", self.compensate, COMPENSATIONS)
        if self.loss is not None:
            from prune_dn.models.losses import check_loss

            check_loss(self.loss)
        if self.runtime is not None:
            check_choice("runtime", self.runtime, RUNTIMES)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
            if why := why_not_offered(self.timed.runtime, self.precision):
                raise PruningError(f"precision {self.precision!r} cannot be had: {why}")
        if "layer" in self.units and ("stream" not in self.units or self.scope != "global"):
            raise PruningError("units 'layer' needs 'stream' among the units, and scope 'global'")
        if {"edge", "connection"} <= set(self.units):
            raise PruningError(
                "units 'edge' and 'connection' do not go together: a connection is all edges from one "
                "layer to one reader; leave one of the two out"
            )
        for name in ("runtime", "precision", "batch_size"):
            if self.unit != LATENCY and getattr(self, name) is not None:
                raise PruningError(
                    f"{name} has no effect with unit {self.unit!r}; use unit {LATENCY!r}"
                )

    def _check_settling(self) -> None:
        usual = {field.name: field.default for field in fields(self)} | {"pruning_ratio": None}
        beside = [n for n in usual if n not in SETTLING and getattr(self, n) != usual[n]]
        if beside:
            raise PruningError(
                f"settle cuts every loser of an MFM and nothing else; remove {', '.join(beside)}"
            )

    @property
    def timed(self) -> Timing:
        """What the unit `latency` is of."""
        runtime, batch_size, precision = TIMED
        return Timing(
            self.runtime or runtime, self.batch_size or batch_size, self.precision or precision
        )

    def counting(self, images: int | None) -> PruneConfig:
        """The request of a recipe or a command that gives so many calibration images (None: unsaid).

        Where images are given and neither criterion nor compensation, these are the best that is known, as
        in Python. Else nothing is compensated unless it is said.

        >>> PruneConfig(0.5).counting(512).criterion, PruneConfig(0.5).counting(None).compensate
        ('reconstruction', 'none')
        >>> PruneConfig(0.5, criterion="taylor").counting(512).compensate
        'none'
        """
        if images is not None and self.criterion is None and self.compensate is None:
            return replace(self, criterion=CALIBRATED[0], compensate=CALIBRATED[1])
        return self if self.compensate is not None else replace(self, compensate="none")

    @staticmethod
    def of(request: float | PruneConfig, given: Mapping[str, Any]) -> PruneConfig:
        """A ready request, or one of a ratio and the other fields by name.

        Raises PruningError for an unknown field, with those that there are, and for fields beside
        a ready request.
        """
        if not isinstance(request, PruneConfig):
            check_names(given)
            return PruneConfig(request, **given)
        if given:
            raise PruningError(
                f"{', '.join(given)} beside a PruneConfig: two requests; put it into the one, with "
                f"dataclasses.replace(config, {next(iter(given))}=...)"
            )
        return request


def check_names(given: Iterable[str]) -> None:
    """Raise PruningError for what is no field of a request, with the fields that there are."""
    known = [field.name for field in fields(PruneConfig)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise PruningError(
                f"{name!r} is no field of a request{guess}; the fields are {', '.join(known)}"
            )


def check_criterion(criterion: Any) -> None:
    """Raise PruningError for an unknown criterion."""
    from prune_dn.pruning.criteria import CRITERIA

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


def units_in(values: Iterable[str], allowed: tuple[str, ...] = UNITS) -> tuple[Any, ...]:
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
