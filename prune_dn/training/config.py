"""How to train: the `train` and `finetune` parts of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prune_dn.base import limits

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=limits.IMAGE_SIZE)]


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no infinite numbers and none that are NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Sparsity(Strict):
    """Pull on the norms' scales, so that channels can go (Network Slimming, arXiv:1708.06519).

    `l1` adds strength * sign(gamma) to the gradient; `proximal` shrinks |gamma| by learning rate *
    strength after each step, down to exactly 0.
    """

    kind: Literal["l1", "proximal"] = "l1"
    strength: Annotated[float, Field(gt=0)] = 1e-4


class Distillation(Strict):
    """Learn from the dense net: (1-weight)*CE + weight*T^2*KL (arXiv:1503.02531)."""

    temperature: Annotated[float, Field(gt=0)] = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9


# Settings of FitConfig that make no difference to the result: a run goes on with others.
WITHOUT_EFFECT = frozenset({"num_workers", "tensorboard"})


class FitConfig(Strict):
    """One training run. Fractions are of the whole run; learning rates are per optimizer step."""

    epochs: Annotated[int, Field(ge=1, le=limits.EPOCHS)]
    batch_size: Annotated[int, Field(ge=2, le=limits.BATCH_SIZE)] = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["cosine", "one_cycle", "step", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[Share, ...] = (0.5, 0.75)
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation: Annotated[int, Field(ge=1, le=limits.STEPS)] = 1
    channels_last: bool = True
    memory_efficient: bool | Literal[1, 2] | None = None  # None: True for a DenseNet
    sparsity: Sparsity | None = None
    distillation: Distillation | None = None
    resolutions: tuple[tuple[Share, Pixels], ...] = ()
    num_workers: Annotated[int, Field(ge=0, le=limits.WORKERS)] = 0
    max_steps: Annotated[int, Field(ge=1, le=limits.STEPS)] | None = None
    tensorboard: bool = False

    @model_validator(mode="after")
    def _together(self) -> Any:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set nesterov: false")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} fill all {self.epochs} epochs")
        if self.schedule == "one_cycle" and self.warmup_epochs:
            raise ValueError("one_cycle has its own warm-up; remove warmup_epochs")
        starts = [start for start, _ in self.resolutions]
        if self.resolutions and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(
                "resolutions are [from, pixels] pairs with rising `from`, the first at 0"
            )
        return self
