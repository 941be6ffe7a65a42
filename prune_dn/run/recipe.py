"""The schema of a recipe: one YAML file that describes a whole run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_dn.base import limits
from prune_dn.base.runtimes import QUANTISED, Precision, Runtime
from prune_dn.base.yaml_lines import dump
from prune_dn.data.augment import AUGMENTATIONS
from prune_dn.data.datasets import CALIBRATION_IMAGES
from prune_dn.data.images import RESIZES
from prune_dn.data.sources import DATASETS
from prune_dn.errors import PruningError
from prune_dn.models import BUILDERS
from prune_dn.models.losses import LOSSES
from prune_dn.pruning import CRITERIA
from prune_dn.pruning.config import (
    BOUNDS,
    Compensation,
    PruneConfig,
    Scope,
    Unit,
    UnitKind,
    check_ratio,
    units_in,
)
from prune_dn.pruning.criteria import follows_loss, reads_images
from prune_dn.pruning.request import check_ratios
from prune_dn.run.recipe_model import FilePath, ModelSection
from prune_dn.run.sweep_section import SweepSection
from prune_dn.run.trials import TOLERANCE
from prune_dn.run.unfit import unfit
from prune_dn.training import FitConfig
from prune_dn.training.config import Pixels, Share, Strict

Images = Annotated[int, Field(ge=1, le=limits.IMAGES)]
BatchSize = Annotated[int, Field(ge=1, le=limits.BATCH_SIZE)]
Seed = Annotated[int, Field(ge=0, le=limits.SEED)]
RECALIBRATE_BATCHES = 50
# A recipe's own rounds fine-tune in between.
REQUEST = {field.name for field in dataclasses.fields(PruneConfig)} - {"rounds"}


def _choice(kind: str, registry: Mapping[str, Any]) -> Any:
    """A string that must be in a registry; the JSON Schema lists what the registry holds."""

    def check(value: str) -> str:
        if value not in registry:
            raise ValueError(f"is no {kind}; choose {', '.join(sorted(registry))}")
        return value

    return Annotated[
        str, AfterValidator(check), WithJsonSchema({"type": "string", "enum": sorted(registry)})
    ]


def _check_augment(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in list(AUGMENTATIONS):
        return value
    raise ValueError(f"is no augmentation; choose {', '.join(sorted(AUGMENTATIONS))}")


Augment = Annotated[
    Any,
    BeforeValidator(_check_augment),
    WithJsonSchema({"enum": [None, True, False, *sorted(AUGMENTATIONS)]}),
]


class DataSection(Strict):
    """What `prune_dn.data.datasets.load_datasets` takes; classes and channels come from the data."""

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


def _limited(name: str) -> Any:
    """A whole number within the bounds that a request has for it."""
    least, most = BOUNDS[name]
    return Annotated[int, Field(ge=least, le=most)]


def _checked(check: Callable[[Any], Any]) -> AfterValidator:
    """A check of a request's field, as pydantic calls it."""

    def checked(value: Any) -> Any:
        try:
            return check(value)
        except PruningError as error:
            raise ValueError(str(error)) from error

    return AfterValidator(checked)


class PruneSection(Strict):
    """A `PruneConfig`, how often to prune, and what goes with it.

    The fields of `PruneConfig` are its own, with its defaults. `calibration` is how many training images
    criterion and compensation see (None = 512, see `data.calibration_batches`), drawn by `seed`; where it
    is given and neither criterion nor compensation is, both are those of `PruneConfig.counting`. `loss`
    None is `softmax`: the data have classes. `ratios` is the path of a sensitivity.json of the net before
    the cut. `max_drop` takes the place of the ratio: points of validation accuracy, for which the largest cut
    is found (`prune_within`). After a cut `recalibrate_batches` refresh the norms, where there are any: 50, but none where
    the cut was compensated, which fits the norms too and would be undone in part.
    """

    pruning_ratio: Annotated[float, _checked(check_ratio)] | None = None
    max_drop: Annotated[float, Field(gt=0, lt=100)] | None = None
    settle: bool = PruneConfig.settle
    unit: Unit = PruneConfig.unit
    runtime: Runtime | None = PruneConfig.runtime
    precision: Precision | None = PruneConfig.precision
    batch_size: _limited("batch_size") | None = PruneConfig.batch_size  # type: ignore[valid-type]
    criterion: _choice("criterion", CRITERIA) | None = PruneConfig.criterion  # type: ignore[valid-type]
    scope: Scope = PruneConfig.scope
    ratios: FilePath | None = None
    units: Annotated[tuple[UnitKind, ...], Field(min_length=1), _checked(units_in)] = (
        PruneConfig.units
    )
    compensate: Compensation | None = PruneConfig.compensate
    calibration: Images | None = None
    loss: _choice("loss", LOSSES) | None = PruneConfig.loss  # type: ignore[valid-type]
    protect: tuple[str, ...] = PruneConfig.protect
    min_channels: _limited("min_channels") = PruneConfig.min_channels  # type: ignore[valid-type]
    round_to: _limited("round_to") = PruneConfig.round_to  # type: ignore[valid-type]
    rounds: Annotated[int, Field(ge=1, le=limits.ROUNDS)] = 1
    recalibrate_batches: Annotated[int, Field(ge=0, le=limits.STEPS)] | None = None
    seed: Seed | None = None

    @model_validator(mode="after")
    def _check(self) -> PruneSection:
        if not self.settle and self.pruning_ratio is None and self.max_drop is None:
            raise ValueError(
                "pruning_ratio is missing: give the fraction to remove, such as 0.5, or max_drop, the points of "
                "validation accuracy that may be lost"
            )
        for key, other in (
            ("pruning_ratio", "finds the ratio"),
            ("settle", "finds a ratio, and settle has none"),
            ("ratios", "measures whole cuts, and ratios are of single modules"),
        ):
            if self.max_drop is not None and getattr(self, key):
                raise ValueError(f"{key} and max_drop do not go together: max_drop {other}")
        if self.max_drop is not None and self.rounds > 1:
            raise ValueError(
                "rounds above 1 and max_drop do not go together: give the ratio of rounds"
            )
        try:
            images = self.calibration
            if images is None and self.max_drop is not None:
                images = CALIBRATION_IMAGES
            asked = self.request().counting(images)
            check_ratios(self.ratios, self.scope, self.units)
        except PruningError as error:
            raise ValueError(str(error)) from error
        for key in ("rounds", "ratios"):
            if self.settle and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} has no effect beside settle, which has no ratio; leave it out"
                )
        if self.ratios is not None and self.rounds > 1:
            raise ValueError(
                "rounds above 1 and ratios do not go together: these were measured on the net before "
                "the first round"
            )
        usual = RECALIBRATE_BATCHES if asked.compensate == "none" else 0
        batches = usual if self.recalibrate_batches is None else self.recalibrate_batches
        for key, value in (
            ("criterion", asked.criterion),
            ("compensate", asked.compensate),
            ("recalibrate_batches", batches),
        ):
            object.__setattr__(self, key, value)  # as it is when all is said
        for key, reads in (("calibration", self.reads_images), ("loss", self.follows_loss)):
            if getattr(self, key) is not None and not reads:
                what = (
                    "reads only the weights"
                    if key == "calibration"
                    else ("does not depend on what the outputs mean")
                )
                raise ValueError(
                    f"{key} has no effect: the criterion {what} and compensate is none; leave it out"
                )
        return self

    def request(self, **others: Any) -> PruneConfig:
        """The request, with `others` in place of its own fields. Raises PruningError."""
        mine = {key: getattr(self, key) for key in type(self).model_fields if key in REQUEST}
        if self.max_drop is not None:
            mine["pruning_ratio"] = TOLERANCE  # until it is found
        return PruneConfig(**{**mine, "seed": self.seed or 0, **others})

    @property
    def reads_images(self) -> bool:
        """Whether the criterion or the compensation needs calibration images."""
        return reads_images(self.criterion) or self.compensate != "none"

    @property
    def follows_loss(self) -> bool:
        """Whether what the outputs mean counts for the criterion or the compensation."""
        return follows_loss(self.criterion) or self.compensate != "none"


class ExportSection(Strict):
    """Which files to leave beside the checkpoints; `int8` are the runtimes to quantise for."""

    onnx: bool = True
    openvino: bool = False
    torch_export: bool = False
    state_dict: bool = True
    int8: tuple[_choice("int8", QUANTISED), ...] = ()  # type: ignore[valid-type]


class ReportSection(Strict):
    """How the report measures latency: each of `runtimes` with each of `batch_sizes`."""

    runtimes: Annotated[tuple[Runtime, ...], Field(min_length=1)] = ("eager",)
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
    sweep: SweepSection | None = None
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
        if self.prune is not None and self.prune.rounds > 1 and self.finetune is None:
            raise ValueError("prune.rounds above 1 fine-tunes between the rounds; add finetune")
        if self.model.name in BUILDERS and self.model.checkpoint is None:
            with torch.device("meta"):
                shape = self.model.build()
            for norm in (m for m in shape.modules() if isinstance(m, _NormBase)):
                norm.to_empty(device="cpu").reset_parameters()  # their scales are looked at
            self.check_net(shape)
        return self

    def request(self, image_size: int | None = None, number: int | None = None) -> PruneConfig:
        """The request of one round (None: the last): `number`/`rounds` of the ratio in all."""
        cut = self.prune
        assert cut is not None
        asked: dict[str, Any] = {"input_size": image_size}
        if cut.seed is None:
            asked["seed"] = self.seed
        if cut.pruning_ratio is not None and number is not None:
            asked["pruning_ratio"] = cut.pruning_ratio * number / cut.rounds
        return cut.request(**asked)

    def check_net(self, model: nn.Module, image_size: int | None = None) -> None:
        """Raise ValueError for all that this net has no use for or cannot do, with what to do instead."""
        fits = {"train": self.train, "finetune": self.finetune}
        request = None if self.prune is None else self.request(image_size)
        # No file is read before the data are known, on which params depend too.
        ratios = None if self.prune is None or image_size is None else self.prune.ratios
        if wrong := list(unfit(model, fits, request, ratios, image_size)):
            raise ValueError(f"{'; '.join(wrong)} (the net is {self.model.title})")


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
