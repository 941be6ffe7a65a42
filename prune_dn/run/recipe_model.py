"""The part of a recipe that says what net it is for."""

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
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from torch import nn

from prune_dn.base import limits
from prune_dn.base.files import wrong_name
from prune_dn.errors import ConfigError, ConversionError
from prune_dn.models import BUILDERS
from prune_dn.models.factory import PATH, Factory
from prune_dn.models.named import LIBRARIES, Named
from prune_dn.training.config import Strict

Channels = Annotated[int, Field(ge=1, le=limits.CHANNELS)]
Layers = Annotated[int, Field(ge=1, le=limits.LAYERS)]
FROM_DATA = ("num_classes", "in_channels", "in_chans", "image_size")
SOURCES = (
    "name (a builder, torchvision/NAME or timm/NAME), factory (package.module:function) or "
    "checkpoint (a file)"
)


def check_path(value: str) -> str:
    """A path that a disk can have."""
    if problem := wrong_name(value):
        raise ValueError(problem)
    return value


FilePath = Annotated[str, Field(min_length=1), AfterValidator(check_path)]


def _check_name(value: str) -> str:
    if value.partition("/")[0] in LIBRARIES:
        try:
            Named(value)
        except ConversionError as error:
            raise ValueError(f"cannot be built: {error}") from error
    elif value not in BUILDERS:
        listed = ", ".join(sorted(BUILDERS))
        raise ValueError(f"is no model; choose {listed}, torchvision/NAME or timm/NAME")
    return value


def _check_factory(value: str) -> str:
    try:
        Factory(value)
    except ConfigError:
        raise ValueError(
            "is not written package.module:function, such as my_nets.small:make_net"
        ) from None
    return value


def _check_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not a finite number")
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _check_finite(inner)
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


Name = Annotated[
    str,
    AfterValidator(_check_name),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": sorted(BUILDERS)},
                {"type": "string", "pattern": f"^({'|'.join(LIBRARIES)})/"},
            ]
        }
    ),
]
FactoryPath = Annotated[
    str, AfterValidator(_check_factory), WithJsonSchema({"type": "string", "pattern": PATH})
]
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_check_finite)]
Mfm = Annotated[
    Any, BeforeValidator(partial(_check_mfm, ("2/1", "3/2"))), _mfm_schema("2/1", "3/2")
]
MfmSkipped = Annotated[Any, BeforeValidator(partial(_check_mfm, ("2/1",))), _mfm_schema("2/1")]


class ModelSection(Strict):
    """A builder of ours and its arguments, a net of torchvision or timm, one's own, or a checkpoint.

    `name` is a builder's, or torchvision/NAME or timm/NAME; `factory` is a function of one's own,
    package.module:function. `arguments` are what the latter two take besides classes and channels, which
    a named net has from the data. A `checkpoint` brings its own shape; beside it `name` says what net of
    torchvision or timm a training script's weights are of, and `factory` makes the dense net of a class
    of one's own.
    """

    name: Name | None = None
    factory: FactoryPath | None = None
    arguments: Arguments | None = None
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
        if self.name is None and self.factory is None and self.checkpoint is None:
            raise ValueError(f"give {SOURCES}")
        if self.name is not None and self.factory is not None:
            raise ValueError(f"name and factory are two nets; give one of {SOURCES}")
        if self.checkpoint is not None:
            beside = {"name"} if self.is_of_a_library else set()
            beside |= {"factory", "arguments"} if self.factory is not None else set()
            extra = sorted(self.model_fields_set - {"checkpoint"} - beside)
            if extra == ["name"]:
                raise ValueError(
                    f"give either name (a builder) or checkpoint (a file): a {self.name} is read whole"
                )
            if extra:
                raise ValueError(f"a checkpoint brings its own shape; remove {', '.join(extra)}")
        if self.factory is None and not self.is_of_a_library:
            if self.arguments is not None:
                raise ValueError(
                    "arguments are those of a factory, or of a net of torchvision or timm; write those "
                    "of a builder beside its name, such as growth_rate: 12"
                )
            if self.name is not None:
                self._check_builder()
        elif extra := sorted(set(self._shape()) - {"arguments"}):
            takes = self.name or self.factory
            raise ValueError(
                f"{takes} takes no {', '.join(extra)}; write arguments: {{KEY: VALUE}}"
            )
        elif self.name is not None:
            self._check_options()
        return self

    @property
    def is_of_a_library(self) -> bool:
        """Whether `name` is that of a net of torchvision or timm."""
        return self.name is not None and self.name not in BUILDERS

    def from_checkpoint(self, path: str) -> ModelSection:
        """The same net with the weights of a file."""
        kept = {"name"} if self.is_of_a_library else set()
        kept |= {"factory", "arguments"} if self.factory is not None else set()
        return type(self)(checkpoint=path, **self.model_dump(include=kept, exclude_unset=True))

    @property
    def title(self) -> str:
        """The net, as messages name it."""
        return str(self.checkpoint or self.name or self.factory)

    def named(self, num_classes: int, in_channels: int) -> Named | None:
        """The constructor in a library; None of any other net, and where a file brings the shape."""
        if not self.is_of_a_library or self.checkpoint is not None:
            return None
        assert self.name is not None
        options: dict[str, Any] = {**(self.arguments or {}), "num_classes": num_classes}
        if self.name.startswith("timm/"):
            options["in_chans"] = in_channels
        return Named(self.name, options)

    def build(self, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
        """The net that all but a checkpoint describes, with new random weights.

        A builder's has the usual input channels. Raises ConversionError or ConfigError where a library or
        the user's own function cannot build it.
        """
        if (named := self.named(num_classes, in_channels)) is not None:
            return named.build(filled=True)
        if self.factory is not None:
            return Factory(self.factory, self.arguments or {}).build()
        assert self.name is not None
        return BUILDERS[self.name](num_classes=num_classes, **self._shape())

    def _shape(self) -> dict[str, Any]:
        given = self.model_fields_set - {"name", "factory", "checkpoint"}
        return {key: getattr(self, key) for key in type(self).model_fields if key in given}

    def _check_builder(self) -> None:
        assert self.name is not None
        known = inspect.signature(BUILDERS[self.name]).parameters
        foreign = sorted(set(self._shape()) - set(known))
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

    def _check_options(self) -> None:
        options: Mapping[str, Any] = self.arguments or {}
        if known := [key for key in options if key in FROM_DATA]:
            raise ValueError(f"arguments: {known[0]} comes from the data; leave it out")
        try:
            Named(str(self.name), options)
        except ConversionError as error:
            raise ValueError(f"arguments: {error}") from error
