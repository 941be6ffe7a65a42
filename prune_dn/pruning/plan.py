"""The decision: which units stay. A plan is data; `surgery` carries it out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.files import write_text
from prune_dn.losses import LossFunction, loss_name
from prune_dn.models import DenseNet, DenseNetConfig
from prune_dn.models.convert import convert
from prune_dn.profiling import ImageSize, count, default_image_size
from prune_dn.pruning import budget as budgets
from prune_dn.pruning.importance import CRITERIA, calibration_for, importance
from prune_dn.pruning.latency_model import (
    LATENCY,
    LatencyModel,
    fit_latency_model,
    meet_latency,
)
from prune_dn.pruning.parts import KINDS, Group, Mask
from prune_dn.pruning.protect import protected_units
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.ratios import Ratios, measured_drops, read_ratios
from prune_dn.pruning.siblings import keep_to_competing
from prune_dn.pruning.units import Units, kept_channels
from prune_dn.sound import check_sound

FORMAT = "prune_dn.plan/1"
SCOPES = ("global", "local")


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decided, JSON-able.

    `keep_indices` maps each module that loses channels to those that stay, in their new order: a
    conv's filters, a reader's norm's channels, or what an MFM or a competing reader lets compete
    (present numbering; empty = the whole layer goes). `requested` holds
    the arguments, `achieved` what they gave, `protected` why units could not be cut.
    """

    config_before: DenseNetConfig
    config_after: DenseNetConfig
    keep_indices: dict[str, tuple[int, ...]]
    requested: dict[str, Any]
    achieved: dict[str, Any]
    protected: dict[str, str]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row per group of units: name, kind, and how many channels before and after."""
        rows = []
        for group in Units(self.config_before).groups:
            size, kept = group.channels, self.keep_indices.get(group.name)
            rows.append(
                {
                    "name": group.name,
                    "kind": group.kind,
                    "before": size,
                    "after": size if kept is None else len(kept),
                }
            )
        return rows

    def to_json(self) -> str:
        """The plan as indented JSON; `from_json` gives back an equal plan."""
        data = {
            "format": FORMAT,
            "requested": self.requested,
            "achieved": self.achieved,
            "protected": self.protected,
            "keep_indices": self.keep_indices,
            "config_before": json.loads(self.config_before.to_json()),
            "config_after": json.loads(self.config_after.to_json()),
        }
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote. Raises PruningError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            for side in ("config_before", "config_after"):
                data[side] = DenseNetConfig.from_json(json.dumps(data[side]))
            data["keep_indices"] = {k: tuple(v) for k, v in data["keep_indices"].items()}
            return Plan(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PruningError(f"not a plan of prune_dn: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_text(path, self.to_json() + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises PruningError with the path when it is missing or no plan."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PruningError) as error:
            raise PruningError(f"cannot read the plan {os.fspath(path)}: {error}") from error


def make_plan(
    model: nn.Module,
    pruning_ratio: float,
    *,
    unit: str = "channels",
    criterion: str = "bn_scale",
    scope: str = "global",
    ratios: Ratios | None = None,
    units: Iterable[str] = ("stream", "bottleneck"),
    protect: Iterable[str] = (),
    min_channels: int = 1,
    round_to: int = 1,
    input_size: ImageSize | None = None,
    seed: int = 0,
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
    baseline: DenseNetConfig | None = None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None = None,
) -> Plan:
    """Decide what to cut from a DenseNet (ours, torchvision's or timm's); nothing is changed.

    `pruning_ratio` in (0, 1) is the share of `unit` (`channels` of norms, `params`, `macs` or
    `latency` at `input_size`) that goes, measured against `baseline`, or the model itself. `units`
    are the kinds that may be cut: `stream`, `bottleneck`, `edge`, and `sibling`: of each pair in an MFM
    2/1 the one that loses, so that the other stands alone. `scope` ranks over the whole net,
    by importance per cost saved, priced anew as the net shrinks (`global`), or cuts the same share
    of each module (`local`). A width that is cut becomes a multiple of `round_to` (the kept count is
    rounded up; a channel that nobody reads goes all the same), and no width falls below
    `min_channels`; but with `layer` beside `stream` among the units of a `global` plan dense layers
    may also go whole, which pays in latency. Modules whose names, or whose parents' names, match a
    pattern in `protect` keep all weights: neither what they make nor what they read is cut.

    `ratios`, a `sensitivity.json` or the rows of `sensitivity`, replaces prices by what was measured:
    each group of units gives up its least important ones as far as one drop allows, the same for all
    groups and the smallest that meets the budget. Between measured ratios the drop is taken to rise
    linearly; beyond the largest, and in groups that were not measured, nothing goes.

    Some criteria need `calibration`: batches of images (N, C, H, W), or (images, labels) batches for
    `taylor` and `fisher`; any iterable, normalised as in training. `prune-dn criteria` lists them.
    These two and `reconstruction` follow the `loss` that the net was trained with: `softmax` (one class
    of several), `sigmoid` (yes or no for each output), `mse` (numbers), or a callable (outputs,
    labels) -> the mean over the batch, which always needs labels. None is `softmax` where labels are
    class numbers; nothing else is guessed.
    `mfm_win_rate` judges only what competes; the rest stays, as `protected` says.

    `latency` is priced by `latency_model`, or a function that fits one once nothing else is wrong; by
    default `fit_latency_model(model)`: onnxruntime at batch 1 on this machine. Widths above the block
    of channels that the runtime computes in (`rates.step`) are cut to multiples of it too, where that
    can meet the budget: others would lose channels and save no time. The net is then timed
    beside the baseline and the plan corrected until the measured time meets the request; the times
    are in `achieved`.

    Raises PruningError for a request that is wrong, cannot be met, or would change nothing.

    >>> from prune_dn.models import densenet40
    >>> plan = make_plan(densenet40(), 0.5, unit="macs")
    >>> round(plan.achieved["ratio"], 2)
    0.5
    """
    check_sound(model)
    net = convert(model, share=True)
    kinds, patterns = names_in(units, "units"), names_in(protect, "protect")
    check_request(pruning_ratio, unit, criterion, scope, kinds, min_channels, round_to)
    check_ratios(ratios, scope, kinds)
    batches = calibration_for(calibration, criterion, loss)
    table = Units(net.config)
    rows = None if ratios is None else read_ratios(ratios, table, kinds)
    _check_rounding(table, kinds, round_to)
    kept_back, protected = protected_units(table, patterns)
    may_go = ~kept_back
    for group in table.groups:
        if group.kind not in kinds:
            may_go[group.units] = False
    if CRITERIA[criterion].need == "wins":
        may_go, why = keep_to_competing(table, may_go, kinds, criterion)
        protected = {**why, **protected}
    size = default_image_size(net.config) if input_size is None else input_size
    latency = _latency_model(latency_model, net, unit, size, seed)
    whole = net.config if baseline is None else baseline
    measure = _measure(unit, size, latency)
    target = (1.0 - pruning_ratio) * measure(whole)
    if measure(net.config) <= target:
        raise PruningError(
            f"pruning_ratio={pruning_ratio} of {unit} is reached already: the net has "
            f"{round(measure(net.config), 3):,} of {round(measure(whole), 3):,}; nothing would be cut"
        )
    scores = importance(net, table, criterion, calibration=batches, seed=seed)
    ranks = budgets.quantiles(table, scores) if scope == "local" else None
    if rows is not None:
        ranks = measured_drops(table, scores, may_go, rows)
    rates = COUNTED[unit] if latency is None else latency.rates
    budget = budgets.Budget(
        target, unit, rates, ranks, min_channels, round_to, size, "layer" in kinds
    )
    times: dict[str, float] = {}
    if latency is None:
        keep = budgets.choose(table, scores, may_go, budget)
    else:
        keep, times = meet_latency(table, scores, may_go, budget, latency, whole)
    requested = {
        "pruning_ratio": pruning_ratio,
        "unit": unit,
        "criterion": criterion,
        "scope": scope,
        "units": list(kinds),
        "protect": list(patterns),
        "min_channels": min_channels,
        "round_to": round_to,
        "input_size": size,
        "seed": seed,
        "calibration_images": None if batches is None else len(batches),
        "loss": loss_name(loss),
    }
    if ratios is not None:
        is_path = isinstance(ratios, str | os.PathLike)
        requested["ratios"] = str(ratios) if is_path else "rows of sensitivity"
    if latency is not None:
        requested["latency_model"] = dataclasses.asdict(latency)
    costs = {"baseline": whole, "before": net.config, "after": table.after(keep)}
    achieved: dict[str, Any] = {"unit": unit}
    for when, config in costs.items():
        achieved[when] = dataclasses.asdict(count(config, size))
        if times:
            achieved[when]["latency"] = times[when]
    achieved["ratio"] = 1.0 - achieved["after"][unit] / achieved["baseline"][unit]
    return plan_of(table, keep, requested, achieved, protected)


def _latency_model(
    given: LatencyModel | Callable[[], LatencyModel] | None,
    net: DenseNet,
    unit: str,
    size: ImageSize,
    seed: int,
) -> LatencyModel | None:
    """The model of latency that the plan goes by, fitted here and now if need be."""
    if given is not None and unit != LATENCY:
        raise PruningError(f"latency_model has no effect with unit {unit!r}; use unit='latency'")
    if unit != LATENCY:
        return None
    if given is None:
        return fit_latency_model(net, image_size=size, seed=seed)
    found = given if isinstance(given, LatencyModel) else given()
    if found.image_size != size:
        raise PruningError(
            f"latency_model was fitted on images of {found.image_size} pixels, and input_size is "
            f"{size}; fit it with image_size={size}"
        )
    return found


def _measure(
    unit: str, size: ImageSize, latency_model: LatencyModel | None
) -> Callable[[DenseNetConfig], float]:
    """What a net of a given shape has of `unit`."""
    if latency_model is not None:
        return latency_model.predict
    return lambda config: getattr(count(config, size), unit)


def plan_of(
    table: Units,
    keep: Mask,
    requested: dict[str, Any] | None = None,
    achieved: dict[str, Any] | None = None,
    protected: dict[str, str] | None = None,
) -> Plan:
    """The plan of a closed `keep`; one that was chosen by hand has nothing else to say."""
    return Plan(
        table.config,
        table.after(keep),
        dict(_keep_indices(table, keep)),
        requested or {},
        achieved or {},
        protected or {},
    )


def names_in(values: Iterable[str], argument: str) -> tuple[str, ...]:
    if isinstance(values, str):
        raise PruningError(f"{argument}={values!r} is one string; give a list, [{values!r}]")
    return tuple(values)


def check_request(
    ratio: Any, unit: str, criterion: str, scope: str, kinds: tuple[str, ...], least: Any, step: Any
) -> None:
    """Raise PruningError for a ratio outside (0, 1), an unknown choice, or a size below 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or math.isnan(ratio):
        raise PruningError(f"pruning_ratio is {ratio!r}; it must be a number in (0, 1)")
    if ratio == 0:
        raise PruningError("pruning_ratio is 0: nothing would be cut; give the share to remove")
    if not 0 < ratio < 1:
        hint = f"; did you mean {ratio / 100}?" if 1 < ratio < 100 else ""
        raise PruningError(f"pruning_ratio is {ratio!r}; it must lie in (0, 1){hint}")
    choices: list[tuple[str, str, Iterable[str]]] = [
        ("unit", unit, (*COUNTED, LATENCY)),
        ("scope", scope, SCOPES),
    ]
    for name, value, allowed in choices:
        _check_choice(name, value, allowed)
    check_what(criterion, kinds, (*KINDS, "layer"))
    if "layer" in kinds and ("stream" not in kinds or scope != "global"):
        raise PruningError("units 'layer' needs 'stream' among the units, and scope 'global'")
    for name, value in (("min_channels", least), ("round_to", step)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PruningError(f"{name} is {value!r}; it must be an integer of at least 1")


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


def check_what(criterion: str, kinds: tuple[str, ...], allowed: tuple[str, ...] = KINDS) -> None:
    """Raise PruningError for an unknown criterion, an unknown kind of unit, or no kinds."""
    _check_choice("criterion", criterion, sorted(CRITERIA))
    for kind in kinds:
        _check_choice("units", kind, allowed)
    if not kinds:
        raise PruningError(f"units is empty: nothing may be cut; choose from {', '.join(allowed)}")


def groups_of(table: Units, kinds: tuple[str, ...]) -> list[Group]:
    """The groups of these kinds. Raises PruningError when there are none."""
    found = [group for group in table.groups if group.kind in kinds]
    if not found:
        raise PruningError(
            f"units={list(kinds)}: this net has none of them (a basic layer has no bottleneck, and "
            "siblings are those of an MFM 2/1)"
        )
    return found


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise PruningError(f"{name} {value!r} is unknown; choose from {', '.join(allowed)}")


def _check_rounding(table: Units, kinds: tuple[str, ...], round_to: int) -> None:
    widest = max(group.size for group in groups_of(table, kinds))
    if round_to > widest:
        raise PruningError(
            f"round_to={round_to} is larger than every width that may be cut (the widest is "
            f"{widest}): nothing could go; choose a smaller multiple"
        )


def _keep_indices(table: Units, keep: Mask) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in table.parts():
        for group, kept in kept_channels(part, keep):
            if not np.array_equal(kept, np.arange(group.channels)):
                yield group.name, tuple(kept.tolist())
