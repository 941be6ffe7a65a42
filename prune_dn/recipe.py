"""The schema of a recipe: one YAML file that describes a whole run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from prune_dn import limits
from prune_dn.augment import AUGMENTATIONS
from prune_dn.errors import ConfigError, PruningError
from prune_dn.files import wrong_name
from prune_dn.images import RESIZES
from prune_dn.latency import Runtime
from prune_dn.losses import LOSSES
from prune_dn.models import BUILDERS, LIGHT_CNNS, Net
from prune_dn.pruning import CRITERIA
from prune_dn.pruning.config import (
    Compensation,
    PruneConfig,
    Scope,
    Unit,
    UnitKind,
    units_in,
)
from prune_dn.pruning.criteria import follows_loss, reads_images
from prune_dn.pruning.request import check_ratios
from prune_dn.sources import DATASETS
from prune_dn.training import FitConfig
from prune_dn.training.config import Pixels, Share, Strict
from prune_dn.yaml_lines import dump

Channels = Annotated[int, Field(ge=1, le=limits.CHANNELS)]
Layers = Annotated[int, Field(ge=1, le=limits.LAYERS)]
Images = Annotated[int, Field(ge=1, le=limits.IMAGES)]
BatchSize = Annotated[int, Field(ge=1, le=limits.BATCH_SIZE)]
Seed = Annotated[int, Field(ge=0, le=limits.SEED)]
RECALIBRATE_BATCHES = 50
FROM_DATA = ("num_classes", "in_channels", "image_size")  # of a builder's arguments
# What prune.settle may stand beside.
SETTLING = {
    "settle",
    "criterion",
    "compensate",
    "calibration",
    "loss",
    "recalibrate_batches",
    "seed",
}


def _choice(kind: str, registry: Mapping[str, Any]) -> Any:
    """A string that must be in a registry; the JSON Schema lists what the registry holds."""

    def check(value: str) -> str:
        if value not in registry:
            raise ValueError(f"is no {kind}; choose {', '.join(sorted(registry))}")
        return value

    return Annotated[
        str, AfterValidator(check), WithJsonSchema({"type": "string", "enum": sorted(registry)})
    ]


def _check_path(value: str) -> str:
    if problem := wrong_name(value):
        raise ValueError(problem)
    return value


def _check_ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if math.isnan(value):
        raise ValueError("is not a number; give the fraction to remove, such as 0.5")
    if value == 0:
        raise ValueError("would remove nothing, a call with no effect; give a fraction such as 0.5")
    if not 0 < value < 1:
        raise ValueError("must lie between 0 and 1: it is the fraction to remove, such as 0.5")
    return value


def _check_mfm(kinds: tuple[str, ...], value: Any) -> Any:
    is_mapping = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if value is None or value == "middle_and_last" or is_mapping:
        return value
    raise ValueError(
        "must be null, middle_and_last, or a mapping of names or patterns to "
        f"{' or '.join(kinds)}, such as {{transition1: 2/1}}"
    )


def _mfm_schema(*kinds: str) -> WithJsonSchema:
    names = {"type": "object", "additionalProperties": {"enum": list(kinds)}}
    return WithJsonSchema({"anyOf": [{"type": "null"}, {"const": "middle_and_last"}, names]})


def _check_augment(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in list(AUGMENTATIONS):
        return value
    raise ValueError(f"is no augmentation; choose {', '.join(sorted(AUGMENTATIONS))}")


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
Ratio = Annotated[float, BeforeValidator(_check_ratio)]
Mfm = Annotated[
    Any, BeforeValidator(partial(_check_mfm, ("2/1", "3/2"))), _mfm_schema("2/1", "3/2")
]
MfmSkipped = Annotated[Any, BeforeValidator(partial(_check_mfm, ("2/1",))), _mfm_schema("2/1")]
Augment = Annotated[
    Any,
    BeforeValidator(_check_augment),
    WithJsonSchema({"enum": [None, True, False, *sorted(AUGMENTATIONS)]}),
]


class ModelSection(Strict):
    """A builder by its name and the builder's own arguments, or a checkpoint."""

    name: _choice("model", BUILDERS) | None = None  # type: ignore[valid-type]
    checkpoint: FilePath | None = None
    block_config: Annotated[tuple[Layers, ...], Field(min_length=1)] | None = None
    growth_rate: Channels | None = None
    num_init_features: Channels | None = None
    bn_size: Channels | None = None
    compression: float | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    drop_rate: float | None = None
    mfm: Mfm = None
    mfm_skipped: MfmSkipped = None
    widths: Annotated[tuple[Channels, ...], Field(min_length=1)] | None = None
    embedding: Channels | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if (self.name is None) == (self.checkpoint is None):
            raise ValueError("give either name (a builder) or checkpoint (a file)")
        if self.checkpoint is not None:
            extra = sorted(self.model_fields_set - {"checkpoint"})
            if extra:
                raise ValueError(f"a checkpoint brings its own shape; remove {', '.join(extra)}")
            return self
        known = inspect.signature(BUILDERS[self.name]).parameters  # type: ignore[index]
        foreign = sorted(set(self._arguments()) - set(known))
        if foreign:
            takes = ", ".join(k for k in known if k not in FROM_DATA)
            raise ValueError(f"{self.name} takes no {', '.join(foreign)}; it takes {takes}")
        try:
            with torch.device("meta"):
                params = sum(p.numel() for p in self.build().parameters())
        except (ConfigError, TypeError) as error:  # TypeError: null where a number must be
            raise ValueError(str(error)) from error
        if params > limits.PARAMS:
            raise ValueError(f"it has {params:,} params; nets have at most {limits.PARAMS:,}")
        return self

    def _arguments(self) -> dict[str, Any]:
        given = self.model_fields_set - {"name", "checkpoint"}
        return {key: getattr(self, key) for key in type(self).model_fields if key in given}

    def build(self, num_classes: int = 10) -> Net:
        """The net that `name` and the arguments describe, with new random weights."""
        assert self.name is not None
        return BUILDERS[self.name](num_classes=num_classes, **self._arguments())


class DataSection(Strict):
    """What `prune_dn.data.load_datasets` takes; classes and channels come from the data."""

    name: _choice("data set", DATASETS)  # type: ignore[valid-type]
    root: FilePath = "data"
    image_size: Pixels | None = None
    resize: _choice("way to resize", RESIZES) | None = None  # type: ignore[valid-type]
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    augment: Augment = None
    download: bool = False
    limit: Images | None = None
    memory_budget_mb: Annotated[int, Field(ge=1, le=limits.MEGABYTES)] = 4096
    mean: tuple[Share, ...] | None = None
    std: tuple[Annotated[float, Field(ge=limits.STD[0], le=limits.STD[1])], ...] | None = None


def _usual_recalibration(data: dict[str, Any]) -> int:
    return RECALIBRATE_BATCHES if data.get("compensate") == "none" else 0


class PruneSection(Strict):
    """What `prune_dn.prune` takes, and how often to prune.

    `calibration` is how many training images the criterion and the compensation see (None = 512, see
    `data.calibration_batches`), drawn by `seed`; `loss` is what the outputs mean to both (None =
    `softmax`: the data have classes). `runtime` (None = onnxruntime) and `batch_size` (None = 1)
    are those of the unit `latency`. `criterion` None is `usual_criterion` of the net. `settle` takes
    the place of the ratio: every loser of an MFM goes, and nothing
    else (`settling_plan`). `ratios` is the path of a sensitivity.json of the net before the cut.
    After a cut `recalibrate_batches` refresh the norms, where there are any: 50, but none where
    the cut was compensated, which fits the norms too and would be undone in part.
    """

    pruning_ratio: Ratio | None = None
    settle: bool = False
    unit: Unit = PruneConfig.unit
    runtime: Runtime | None = PruneConfig.runtime
    batch_size: BatchSize | None = PruneConfig.batch_size
    criterion: _choice("criterion", CRITERIA) | None = PruneConfig.criterion  # type: ignore[valid-type]
    scope: Scope = PruneConfig.scope
    ratios: FilePath | None = None
    units: Annotated[tuple[UnitKind, ...], Field(min_length=1), AfterValidator(units_in)] = (
        PruneConfig.units
    )
    compensate: Compensation = "none"
    calibration: Images | None = None
    loss: _choice("loss", LOSSES) | None = PruneConfig.loss  # type: ignore[valid-type]
    protect: tuple[str, ...] = PruneConfig.protect
    min_channels: Channels = PruneConfig.min_channels
    round_to: Channels = PruneConfig.round_to
    rounds: Annotated[int, Field(ge=1, le=limits.ROUNDS)] = 1
    recalibrate_batches: Annotated[int, Field(ge=0, le=limits.STEPS)] = Field(
        default_factory=_usual_recalibration
    )
    seed: Seed | None = None

    @model_validator(mode="after")
    def _check(self) -> PruneSection:
        if not self.settle and self.pruning_ratio is None:
            raise ValueError("pruning_ratio is missing: give the fraction to remove, such as 0.5")
        fields = type(self).model_fields
        given = [name for name in fields if getattr(self, name) != fields[name].default]
        extra = sorted(set(given) - SETTLING)
        if self.settle and extra:
            raise ValueError(
                f"settle cuts every loser of an MFM and nothing else; remove {', '.join(extra)}"
            )
        return self

    @property
    def reads_images(self) -> bool:
        """Whether the criterion or the compensation needs calibration images."""
        return reads_images(self.criterion) or self.compensate != "none"

    @property
    def follows_loss(self) -> bool:
        """Whether what the outputs mean counts for the criterion or the compensation."""
        return follows_loss(self.criterion) or self.compensate != "none"


class ExportSection(Strict):
    """Which files to leave beside the checkpoints."""

    onnx: bool = True
    torch_export: bool = False
    state_dict: bool = True


class ReportSection(Strict):
    """How the report measures latency."""

    batch_sizes: tuple[BatchSize, ...] = (1, 32)
    repeats: Annotated[int, Field(ge=1, le=limits.REPEATS)] = 30
    max_seconds: Annotated[float, Field(gt=0)] | None = 60.0


class Recipe(Strict):
    """A whole run: data, model, training, pruning, fine-tuning, export, report."""

    model: ModelSection
    data: DataSection
    train: FitConfig | None = None
    prune: PruneSection | None = None
    finetune: FitConfig | None = None
    export: ExportSection = ExportSection()
    report: ReportSection = ReportSection()
    seed: Seed = 0
    output_dir: FilePath = "runs/recipe"

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.model.checkpoint is None and self.train is None:
            raise ValueError(
                "train is missing: a new model has random weights; add train, or start from "
                "model.checkpoint"
            )
        if self.prune is None and self.train is None:
            raise ValueError("there is nothing to do: add train or prune")
        if self.prune is None and self.finetune is not None:
            raise ValueError("finetune without prune: move its settings to train, or add prune")
        if self.prune is not None and self.prune.calibration and not self.prune.reads_images:
            raise ValueError(
                "prune.calibration has no effect: the criterion reads only the weights and "
                "compensate is none; leave it out"
            )
        if self.prune is not None and self.prune.loss and not self.prune.follows_loss:
            raise ValueError(
                "prune.loss has no effect: the criterion does not depend on what the outputs mean and "
                "compensate is none; leave it out"
            )
        if self.prune is not None and self.prune.unit != "latency":
            for key in ("runtime", "batch_size"):
                if getattr(self.prune, key) is not None:
                    raise ValueError(f"prune.{key} has no effect: prune.unit is not latency")
        if self.prune is not None and self.prune.ratios is not None:
            if self.prune.rounds > 1:
                raise ValueError(
                    "prune.rounds above 1 and prune.ratios do not go together: they were measured on "
                    "the net before the first round"
                )
            try:
                check_ratios(self.prune.ratios, self.prune.scope, self.prune.units)
            except PruningError as error:
                raise ValueError(f"prune: {error}") from error
        if self.model.name in LIGHT_CNNS and (foreign := self.foreign_to_light_cnns()):
            raise ValueError(f"{self.model.name} cannot be trained or cut with {foreign}")
        if self.prune is not None and self.prune.rounds > 1 and self.finetune is None:
            raise ValueError("prune.rounds above 1 fine-tunes between the rounds; add finetune")
        return self

    def foreign_to_light_cnns(self) -> str:
        """What a Light CNN has no use for, with what to do instead; empty = nothing."""
        wrong = []
        for name, fit in (("train", self.train), ("finetune", self.finetune)):
            if fit is not None and fit.resolutions:
                wrong.append(f"{name}.resolutions (its linear layer fits one size; leave them out)")
            if fit is not None and fit.sparsity is not None:
                wrong.append(f"{name}.sparsity (it has no norms; leave it out)")
        if (cut := self.prune) is not None:
            if cut.criterion == "bn_scale":
                wrong.append("prune.criterion bn_scale (it has no norms; choose l2, or taylor)")
            none = [unit for unit in ("edge", "layer") if unit in cut.units]
            wrong += [f"prune.units {unit} (it has none; leave it out)" for unit in none]
        return ", ".join(wrong)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out; `parse_recipe` reads it back equal."""
    data = recipe.model_dump(mode="json")
    given = recipe.model.model_fields_set
    data["model"] = {key: value for key, value in data["model"].items() if key in given}
    return dump(data)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
