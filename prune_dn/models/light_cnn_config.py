"""`LightCNNConfig`: a frozen, JSON-able description that rebuilds any (pruned) Light CNN exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any, Literal, NamedTuple

from prune_dn.base import limits
from prune_dn.base.files import parse_json
from prune_dn.errors import ConfigError, listed
from prune_dn.graph.types import Graph

Variant = Literal["9", "29", "29_v2"]
STAGES = 4
_GROUPS_OF_9 = ("features.2", "features.4", "features.6", "features.7")


@dataclass(frozen=True)
class MFMConfig:
    """A conv or linear layer under MFM 2/1, from which `units` maps come.

    Each unit has two filters, but those in `alone` (rising) have one left. A layer whose units are
    all alone is a plain one.
    """

    units: int
    alone: tuple[int, ...] = ()

    @property
    def filters(self) -> int:
        """How many filters the layer has, before MFM."""
        return 2 * self.units - len(self.alone)


class Place(NamedTuple):
    """A layer of the net by the name of its weights: what it reads, and what its maps are added to.

    `reads` and `joins` name the layer that makes those maps first; `kernel` 0 is a linear layer.
    """

    name: str
    kernel: int
    reads: str | None = None
    joins: str | None = None


@dataclass(frozen=True)
class LightCNNConfig:
    """Everything that a Light CNN is, but its weights.

    `variant` settles keys, pooling and head (see `LightCNN`); `blocks` is the number of residual
    blocks in each of the four stages; `layers` belong to `places()`, one by one. The last is the
    linear layer that makes the embedding, a plain one in `29_v2`. Images are `image_size` pixels
    wide and high.

    >>> from prune_dn.models import light_cnn_9
    >>> config = light_cnn_9(10, image_size=32).config
    >>> config == LightCNNConfig.from_json(config.to_json())
    True
    """

    variant: Variant
    blocks: tuple[int, ...]
    layers: tuple[MFMConfig, ...]
    num_classes: int = 79077
    in_channels: int = 1
    image_size: int = 128
    drop_rate: float = 0.5

    def __post_init__(self) -> None:
        problems = listed(_problems(self))
        if problems:
            raise ConfigError(f"this LightCNNConfig cannot be built:\n{indent(problems, '  ')}")

    @property
    def side(self) -> int:
        """Height and width of the last maps: four poolings; of those in 29_v2 the rest falls off."""
        return self.image_size // 16 if self.variant == "29_v2" else -(-self.image_size // 16)

    def places(self) -> list[Place]:
        """Every layer but the classifier, in the order in which they run."""
        return places(self.variant, self.blocks)

    def named(self) -> dict[str, MFMConfig]:
        """The layers by the names of their weights."""
        return {place.name: layer for place, layer in zip(self.places(), self.layers, strict=True)}

    def graph(self, image_size: object = None) -> Graph:
        """The channels of the net, who makes and who reads them, for images of its own size."""
        from prune_dn.models.light_cnn_graph import light_cnn_graph

        return light_cnn_graph(self)

    def after(self, kept: Mapping[str, Sequence[int]]) -> LightCNNConfig:
        """The config of what is left: `kept` as `Plan.keep_indices`, absent = all."""
        from prune_dn.models.light_cnn_graph import light_cnn_after

        return light_cnn_after(self, kept)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives back an equal config."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LightCNNConfig:
        """Rebuild a config. Raises ConfigError for anything that `to_json` did not write."""
        try:
            data = parse_json(text)
            layers = tuple(
                MFMConfig(layer.pop("units"), tuple(layer.pop("alone")), **layer)
                for layer in data.pop("layers")
            )
            return LightCNNConfig(blocks=tuple(data.pop("blocks")), layers=layers, **data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"not a LightCNNConfig in JSON: {error}") from error


def places(variant: Variant, blocks: tuple[int, ...]) -> list[Place]:
    """Every layer of such a net but the classifier, in the order in which they run."""
    nine = variant == "9"
    trunk = "features.0.filter" if nine else "conv1.filter"
    found = [Place(trunk, 5)]
    for stage, depth in enumerate(blocks, start=1):
        for i in range(depth):
            first, second = (f"block{stage}.{i}.conv{n}.filter" for n in (1, 2))
            found += [Place(first, 3, trunk), Place(second, 3, first, trunk)]
        group = _GROUPS_OF_9[stage - 1] if nine else f"group{stage}"
        inner = f"{group}.conv_a.filter"
        found.append(Place(inner, 1, trunk))
        trunk = f"{group}.conv.filter"
        found.append(Place(trunk, 3, inner))
    linear = {"9": "fc1.filter", "29": "fc.filter", "29_v2": "fc"}[variant]
    return [*found, Place(linear, 0, trunk)]


def _problems(config: LightCNNConfig) -> Iterator[str]:
    if config.variant not in ("9", "29", "29_v2"):
        yield f"variant is {config.variant!r}; choose '9', '29' or '29_v2'"
        return
    for field in ("num_classes", "in_channels", "image_size"):
        if not _is_count(getattr(config, field), 1):
            yield f"{field} is {getattr(config, field)!r}; it must be an integer of at least 1"
            return
    rate = config.drop_rate
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0.0 <= rate < 1.0:
        yield f"drop_rate is {rate!r}; it must lie in [0, 1)"
    if config.side < 1:
        yield f"image_size is {config.image_size}; the four poolings of 29_v2 need at least 16"
    if len(config.blocks) != STAGES or not all(_is_count(n, 0) for n in config.blocks):
        yield f"blocks is {config.blocks!r}; it must be {STAGES} integers of at least 0"
        return
    if config.variant == "9" and any(config.blocks):
        yield f"blocks is {config.blocks!r}; variant 9 has no residual blocks"
        return
    channels = sum(layer.units for layer in config.layers if _is_count(layer.units, 1))
    channels += config.num_classes + config.in_channels
    for what, found, most in (
        ("residual blocks", sum(config.blocks), limits.LAYERS),
        ("channels", channels, limits.CHANNELS),
        ("pixels a side", config.image_size, limits.IMAGE_SIZE),
    ):
        if found > most:
            yield f"it has {found:,} {what}; nets have at most {most:,}"
            return
    if len(config.layers) != len(config.places()):
        yield f"there are {len(config.layers)} layers; these blocks need {len(config.places())}"
        return
    named = config.named()
    for place in config.places():
        layer = named[place.name]
        if not _is_count(layer.units, 1):
            yield f"{place.name}: units is {layer.units!r}; it must be an integer of at least 1"
            continue
        alone = layer.alone
        rising = all(_is_count(u, 0) and u < layer.units for u in alone) and all(
            a < b for a, b in itertools.pairwise(alone)
        )
        if not rising:
            yield f"{place.name}: alone must be rising numbers of its {layer.units} units"
        elif place.name == "fc" and len(alone) < layer.units:
            yield "fc: in variant 29_v2 it is a plain linear layer: all its units are alone"
        if place.joins is not None and layer.units != named[place.joins].units:
            yield (
                f"{place.name}: its {layer.units} maps cannot be added to the "
                f"{named[place.joins].units} of {place.joins}"
            )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
