"""The part `sweep` of a recipe: what varies, what is sought, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from prune_dn.base import limits
from prune_dn.training.config import Strict

Sampler = Literal["grid", "random", "tpe", "nsga2"]
Objective = Literal["val_accuracy", "params", "macs", "file_bytes", "latency"]
# Whether more is better; latency is the median of the report's first batch size on its first runtime.
MAXIMISED: dict[Objective, bool] = {
    "val_accuracy": True,
    "params": False,
    "macs": False,
    "file_bytes": False,
    "latency": False,
}
Value = str | bool | int | float | None
SEED = "seed"  # the parameter over which a table gives mean and spread


class Range(Strict):
    """Numbers from `low` to `high`, both included; whole ones where both ends are."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; with log: true it must be above 0")
        return self


class SweepSection(Strict):
    """A sweep: `parameters` by the key of a recipe, such as `prune.pruning_ratio`, each a list of values or a range.

    `grid` tries every combination of the lists, the other samplers (Optuna's) `trials` of them. Several
    objectives are sought at once. `heartbeat` is after how many seconds without a sign of life a trial of another
    process counts as lost and is taken up again, times three.
    """

    parameters: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("val_accuracy",)
    sampler: Sampler = "grid"
    trials: Annotated[int, Field(ge=1, le=limits.STEPS)] | None = None
    stop_hopeless: bool = False
    heartbeat: Annotated[int, Field(ge=1, le=3600)] = 30

    @field_validator("objectives")
    @classmethod
    def _once(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(value)) < len(value):
            raise ValueError("an objective stands twice")
        return value

    @model_validator(mode="after")
    def _check(self) -> SweepSection:
        for key, values in self.parameters.items():
            if key.split(".")[0] in ("sweep", "output_dir"):
                raise ValueError(f"parameters: {key} cannot vary within a sweep")
            if isinstance(values, Range):
                if self.sampler == "grid":
                    raise ValueError(
                        f"parameters: {key} is a range, of which a grid has no end; give a list, or another sampler "
                        f"({', '.join(s for s in get_args(Sampler) if s != 'grid')})"
                    )
            elif not values or len({repr(v) for v in values}) < len(values):
                raise ValueError(f"parameters: {key} needs a list of different values")
        if (self.trials is None) != (self.sampler == "grid"):
            raise ValueError(
                "trials is missing: how many are tried"
                if self.trials is None
                else "trials has no effect on a grid, which tries every combination; leave it out"
            )
        if self.stop_hopeless and len(self.objectives) > 1:
            raise ValueError("stop_hopeless needs one objective: of several none decides alone")
        if self.stop_hopeless and self.objectives != ("val_accuracy",):
            raise ValueError("stop_hopeless goes by val_accuracy; make it the objective")
        return self

    def combinations(self) -> list[dict[str, Any]]:
        """Those of a grid, the last parameter varying fastest.

        >>> sweep = SweepSection(parameters={"seed": (0, 1), "prune.pruning_ratio": (0.3, 0.5)})
        >>> sweep.combinations()[1]
        {'seed': 0, 'prune.pruning_ratio': 0.5}
        """
        found: list[dict[str, Any]] = [{}]
        for key, values in self.parameters.items():
            assert not isinstance(values, Range)
            found = [{**one, key: value} for one in found for value in values]
        return found
