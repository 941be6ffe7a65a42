"""The decision: which units stay. A plan is data; `surgery` carries it out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_dn.defaults import usual_defaults
from prune_dn.errors import PruneDNError, PruningError, PruningWarning
from prune_dn.files import parse_json, write_text
from prune_dn.losses import LossFunction, loss_name
from prune_dn.models import DenseNet, DenseNetConfig
from prune_dn.models.convert import convert
from prune_dn.profiling import ImageSize, count, default_image_size, sides
from prune_dn.pruning import budget as budgets
from prune_dn.pruning.config import LATENCY, PruneConfig
from prune_dn.pruning.criteria import CRITERIA, follows_loss
from prune_dn.pruning.importance import calibration_for, importance
from prune_dn.pruning.kept import Kept, consistent, indices_of
from prune_dn.pruning.latency_model import (
    RUNTIME,
    LatencyModel,
    doubts,
    fit_latency_model,
    meet_latency,
)
from prune_dn.pruning.parts import Mask
from prune_dn.pruning.protect import protected_units
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.ratios import Ratios, measured_drops, read_ratios
from prune_dn.pruning.request import check_ratios, check_rounding, request_of, with_defaults
from prune_dn.pruning.siblings import keep_to_competing
from prune_dn.pruning.units import Units
from prune_dn.sound import check_sound

FORMAT = "prune_dn.plan/1"


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decided, JSON-able.

    `keep_indices` maps each module that loses channels to those that stay, in their new order: a
    conv's filters, a reader's norm's channels, or what an MFM or a competing reader lets compete
    (present numbering; empty = the whole layer goes). `requested` holds
    the arguments, `achieved` what they gave, `protected` why units could not be cut, all as JSON
    would hold them: lists, no tuples.

    Raises PruningError for parts that do not belong together.
    """

    config_before: DenseNetConfig
    config_after: DenseNetConfig
    keep_indices: Kept
    requested: dict[str, Any]
    achieved: dict[str, Any]
    protected: dict[str, str]

    def __post_init__(self) -> None:
        checked = consistent(self.config_before, self.config_after, self.keep_indices)
        object.__setattr__(self, "keep_indices", checked)
        for name in ("requested", "achieved", "protected"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        _check_records(self.achieved, self.protected)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row per group of units: name, kind, and how many channels before and after."""
        rows = []
        for group in Units(self.config_before.graph()).groups:
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
        """The plan as indented JSON, with a digest of the rest; `from_json` gives back an equal plan."""
        data = {
            "format": FORMAT,
            "requested": self.requested,
            "achieved": self.achieved,
            "protected": self.protected,
            "keep_indices": self.keep_indices,
            "config_before": json.loads(self.config_before.to_json()),
            "config_after": json.loads(self.config_after.to_json()),
        }
        return json.dumps({**data, "digest": _digest(data)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote. Raises PruningError for anything else, and where it was changed.

        A plan that was written by hand, or edited, has no `digest`: its parts must belong together.
        """
        try:
            data = parse_json(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            digest = data.pop("digest", None)
            if digest is not None and digest != _digest(data):
                raise ValueError(
                    "it is not what was written: its digest differs (leave out 'digest' where you "
                    "edited it yourself)"
                )
            del data["format"]
            wrong = sorted(data.keys() ^ {field.name for field in dataclasses.fields(Plan)})
            if wrong:
                raise ValueError(
                    f"it has {'no' if wrong[0] not in data else 'an unknown'} {wrong[0]!r}"
                )
            for side in ("config_before", "config_after"):
                data[side] = DenseNetConfig.from_json(json.dumps(data[side]))
            return Plan(**data)
        except (ValueError, PruneDNError) as error:
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


@usual_defaults()
def make_plan(
    model: nn.Module,
    pruning_ratio: float | PruneConfig,
    *,
    calibration: Iterable[object] | None = None,
    loss: str | LossFunction | None = None,
    ratios: Ratios | None = None,
    baseline: DenseNetConfig | None = None,
    latency_model: LatencyModel | Callable[[], LatencyModel] | None = None,
    **fields: Any,
) -> Plan:
    """Decide what to cut from a DenseNet (ours, torchvision's or timm's); nothing is changed.

    The request is a `PruneConfig`, or its `pruning_ratio` and other fields by name. The ratio is measured
    against `baseline`, or the model itself. `compensate` is only noted here: `prune` and
    `compensate_plan` carry it out.

    `ratios`, a `sensitivity.json` or the rows of `sensitivity`, replaces prices by what was measured:
    each group of units gives up its least important ones as far as one drop allows, the same for all
    groups and the smallest that meets the budget. Between measured ratios the drop is taken to rise
    linearly; beyond the largest, and in groups that were not measured, nothing goes.

    Some criteria need `calibration`: batches of images (N, C, H, W), or (images, labels) batches for
    `taylor` and `fisher`; any iterable, normalised as in training. `prune-dn criteria` lists them. With
    `calibration` the default criterion is `reconstruction`.
    These three follow the `loss` that the net was trained with: `softmax` (one class
    of several), `sigmoid` (yes or no for each output), `mse` (numbers), or a callable (outputs,
    labels) -> the mean over the batch, which always needs labels. None is `softmax` where labels are
    class numbers; nothing else is guessed.
    `mfm_win_rate` judges only what competes; the rest stays, as `protected` says.

    `latency` is priced by `latency_model`, or a function that fits one once nothing else is wrong; by
    default `fit_latency_model(model)`, with the request's `runtime` (onnxruntime) and `batch_size` (1) on
    this machine. Widths above the block
    of channels that the runtime computes in (`rates.step`) are cut to multiples of it too, where that
    can meet the budget: others would lose channels and save no time. The net is then timed
    beside the baseline and the plan corrected until the measured time meets the request; the times,
    in milliseconds of the model's runtime, are in `achieved`. A busy machine, a model that fits badly
    and a result far from the request are a PruningWarning, and stand there as `warnings`.

    Raises PruningError for a request that is wrong, cannot be met, or would change nothing.

    >>> from prune_dn.models import densenet40
    >>> plan = make_plan(densenet40(), 0.5, unit="macs")
    >>> round(plan.achieved["ratio"], 2)
    0.5
    """
    check_sound(model)
    net = convert(model, share=True)
    config, loss = request_of(pruning_ratio, fields, loss)
    criterion = with_defaults(config, net, calibration is not None).criterion
    size = default_image_size(net.config) if config.input_size is None else config.input_size
    asked = dataclasses.replace(config, criterion=criterion, input_size=size)
    assert criterion is not None
    check_ratios(ratios, asked.scope, asked.units)
    follows = follows_loss(criterion) or asked.compensate in (None, "none")
    batches = calibration_for(calibration, criterion, loss if follows else None)
    table = Units(net.config.graph(size))
    rows = None if ratios is None else read_ratios(ratios, table, asked.units)
    check_rounding(table, asked.units, asked.round_to)
    kept_back, protected = protected_units(table, asked.protect)
    may_go = ~kept_back
    for group in table.groups:
        if group.kind not in asked.units:
            may_go[group.units] = False
    if CRITERIA[criterion].need == "wins":
        may_go, why = keep_to_competing(table, may_go, asked.units, criterion)
        protected = {**why, **protected}
    latency, unit = _latency_model(latency_model, net, asked), asked.unit
    whole = net.config if baseline is None else baseline
    if not isinstance(whole, DenseNetConfig):
        raise PruningError(f"baseline is a {type(whole).__name__}; give the config of a DenseNet")
    measure = _measure(unit, size, latency)
    target = (1.0 - asked.pruning_ratio) * measure(whole)
    if measure(net.config) <= target:
        raise PruningError(
            f"pruning_ratio={asked.pruning_ratio} of {unit} is reached already: the net has "
            f"{round(measure(net.config), 3):,} of {round(measure(whole), 3):,}; nothing would be cut"
        )
    scores = importance(net, table, criterion, calibration=batches, seed=asked.seed)
    ranks = budgets.quantiles(table, scores) if asked.scope == "local" else None
    if rows is not None:
        ranks = measured_drops(table, scores, may_go, rows)
    rates = COUNTED[unit] if latency is None else latency.rates
    least, multiple, layers = asked.min_channels, asked.round_to, "layer" in asked.units
    budget = budgets.Budget(target, unit, rates, ranks, least, multiple, layers)
    times: dict[str, float] = {}
    if latency is None:
        keep = budgets.choose(table, scores, may_go, budget)
    else:
        keep, times = meet_latency(table, net.config, scores, may_go, budget, latency, whole)
    told = {
        "calibration_images": None if batches is None else len(batches),
        "loss": loss_name(loss),
    }
    requested = {**dataclasses.asdict(asked), **told}
    if ratios is not None:
        is_path = isinstance(ratios, str | os.PathLike)
        requested["ratios"] = str(ratios) if is_path else "rows of sensitivity"
    if latency is not None:
        requested["latency_model"] = dataclasses.asdict(latency)
    costs = {
        "baseline": whole,
        "before": net.config,
        "after": net.config.after(indices_of(table, keep)),
    }
    achieved: dict[str, Any] = {"unit": unit}
    for when, shape in costs.items():
        achieved[when] = dataclasses.asdict(count(shape, size))
        if times:
            achieved[when]["latency"] = times[when]
    achieved["ratio"] = 1.0 - achieved["after"][unit] / achieved["baseline"][unit]
    if latency is not None:
        achieved["runtime"] = latency.runtime
        achieved["warnings"] = doubts(latency, asked.pruning_ratio, times)
        for doubt in achieved["warnings"]:
            warnings.warn(doubt, PruningWarning, stacklevel=3)
    return plan_of(net.config, table, keep, requested, achieved, protected)


def _latency_model(
    given: LatencyModel | Callable[[], LatencyModel] | None, net: DenseNet, asked: PruneConfig
) -> LatencyModel | None:
    """The model of latency that the plan goes by, fitted here and now if need be."""
    size = asked.input_size
    assert size is not None
    if given is not None and asked.unit != LATENCY:
        raise PruningError(
            f"latency_model has no effect with unit {asked.unit!r}; use unit='latency'"
        )
    if asked.unit != LATENCY:
        return None
    if given is None:
        return fit_latency_model(
            net,
            runtime=asked.runtime or RUNTIME,
            batch_size=asked.batch_size or 1,
            image_size=size,
            seed=asked.seed,
        )
    found = given if isinstance(given, LatencyModel) else given()
    if sides(found.image_size) != sides(size):
        raise PruningError(
            f"latency_model was fitted on images of {found.image_size} pixels, and input_size is "
            f"{size}; fit it with image_size={size}"
        )
    for name in ("runtime", "batch_size"):
        if getattr(asked, name) not in (None, getattr(found, name)):
            raise PruningError(
                f"latency_model was fitted with {name} {getattr(found, name)!r}, and "
                f"{getattr(asked, name)!r} is asked for; leave one of the two out"
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
    config: DenseNetConfig,
    table: Units,
    keep: Mask,
    requested: dict[str, Any] | None = None,
    achieved: dict[str, Any] | None = None,
    protected: dict[str, str] | None = None,
) -> Plan:
    """The plan of a closed `keep`; one that was chosen by hand has nothing else to say."""
    kept = indices_of(table, keep)
    return Plan(
        config,
        config.after(kept),
        kept,
        requested or {},
        achieved or {},
        protected or {},
    )


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _as_json(name: str, record: Any) -> dict[str, Any]:
    """A record of a plan as it comes back from its file."""
    try:
        found = json.loads(json.dumps(record))
    except (TypeError, ValueError) as error:
        raise PruningError(f"{name} of a plan must fit into JSON: {error}") from error
    if not isinstance(found, dict):
        raise PruningError(f"{name} of a plan is {record!r}; it must be a mapping")
    return found


def _check_records(achieved: Mapping[str, Any], protected: Mapping[str, Any]) -> None:
    """Raise PruningError for figures and reasons that nobody could read."""
    for name, why in protected.items():
        if not isinstance(why, str):
            raise PruningError(f"protected[{name!r}] of a plan is {why!r}; it must be a text")
    if not achieved:  # chosen by hand
        return
    unit = achieved.get("unit")
    if unit not in (*COUNTED, LATENCY):
        raise PruningError(f"achieved['unit'] of a plan is {unit!r}; it must be what was counted")
    figures = {"ratio": achieved.get("ratio")}
    for when in ("baseline", "before", "after"):
        counted = achieved.get(when)
        if not isinstance(counted, dict):
            raise PruningError(f"achieved[{when!r}] of a plan is {counted!r}; it must be a mapping")
        figures |= {f"{when}.{key}": counted.get(key) for key in {**counted, **COUNTED, unit: 0}}
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PruningError(f"achieved {name} of a plan is {value!r}; it must be a number")
