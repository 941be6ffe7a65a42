"""The figures of a run as its metrics.json holds them, checked when a run goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prune_dn.base.files import parse_json, read_text
from prune_dn.errors import RecipeError

FORMAT = "prune_dn.metrics/1"
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Figure = float | None  # None: it was not finite


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Stage(_Part):
    test_accuracy: Share
    test_loss: Figure
    n_test: Some
    val_accuracy: Share
    n_val: Some
    params: Some
    macs: Some
    file_bytes: Some


class _Latency(_Part):
    median_ms: Milliseconds
    p10_ms: Milliseconds
    p90_ms: Milliseconds
    n: Some
    batch_size: Some
    runtime: str
    machine: str
    precision: str = "fp32"


class _File(_Part):
    test_accuracy: Share
    n_test: Some
    file_bytes: Some
    float_layers: list[str]
    latency: list[_Latency]


class _Round(_Part):
    unit: Literal["channels", "params", "macs", "latency"]
    requested: Figure
    achieved: Figure
    runtime: str = ""
    precision: str = "fp32"
    batch_size: Count = 0


class _Notice(_Part):
    name: str
    text: str


class _Epoch(_Part):
    epoch: Some
    loss: Figure
    accuracy: Share
    val_loss: Figure
    val_accuracy: Share
    learning_rate: Figure


class _Phase(_Part):
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Metrics(_Part):
    format: Literal["prune_dn.metrics/1"]
    phases: dict[str, _Phase]
    stages: dict[str, _Stage] = {}
    history: dict[str, list[_Epoch]] = {}
    latency: dict[str, list[_Latency]] = {}
    files: dict[str, _File] = {}
    rounds: list[_Round] = []
    notices: list[_Notice] = []

    @model_validator(mode="after")
    def _phases_left_their_figures(self) -> _Metrics:
        needs = {"train": "dense", "prune-1": "pruned"}
        for phase, stage in needs.items():
            if phase in self.phases and stage not in self.stages:
                raise ValueError(f"the phase {phase} is done, but its stage {stage} is missing")
        lengths = {len(rows) for rows in self.latency.values()}
        if len(lengths) > 1:
            raise ValueError("latency has other rows for one net than for another")
        return self


def read_metrics(path: Path) -> dict[str, Any]:
    """What a run's metrics.json holds. Raises RecipeError when it is damaged, FileNotFoundError when it
    is not there."""
    try:
        found = parse_json(read_text(path))
        _Metrics.model_validate(found)
    except FileNotFoundError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise _damaged(path, f"{place}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return dict(found)


def _damaged(path: Path, reason: str) -> RecipeError:
    return RecipeError(
        f"{path}, the figures of the run so far, is damaged ({reason}); restore it, delete it to do "
        "all phases again, or start anew with --overwrite"
    )
