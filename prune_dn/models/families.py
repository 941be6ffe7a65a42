"""Families of nets that are built from a config: what each registers, and which a net or a config is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prune_dn.errors import ConfigError
from prune_dn.graph.types import Graph
from prune_dn.models.sizes import ImageSize

Modules = Mapping[str, nn.Module]
Shape = tuple[int, ...]


class NetConfig(Protocol):
    """The config of a net: a frozen dataclass that rebuilds it, whatever was cut.

    Its class has a static `from_json`, which gives back what `to_json` wrote.
    """

    @property
    def in_channels(self) -> int:
        """The channels of an image."""

    @property
    def num_classes(self) -> int:
        """The outputs of the net."""

    def graph(self, image_size: ImageSize | None = None) -> Graph:
        """The channels of the net; None: images of the usual size."""

    def after(self, kept: Mapping[str, Sequence[int]]) -> NetConfig:
        """The config of what is left: `kept` as `Plan.keep_indices`, absent = all."""

    def to_json(self) -> str:
        """One line of JSON."""


@dataclass(frozen=True)
class Family:
    """A kind of net: `module(config)` builds one, whose `config` attribute is that config.

    `image_size(config)` are the usual pixels a side, with `one_size` the only ones. The rest has its uses
    and may be left out. `shares_memory`: its `memory_efficient` trains in a shared buffer. `small(config)`: the shape of images on which two nets are quickly compared. `told(config, modules)`:
    fields of the config that a net's modules tell, where somebody changed them. `layers(config)`: how
    many there are at least, asked before they are built. `facts(config)`: what `prune-dn show` says of it;
    `assumed(config)`: what no tensor of a state dict tells. `firsts` are names of first weights, by which
    the keys of a state dict are known, and `infer(tensors)` is the config that they fit.
    """

    title: str
    module: type[Any]
    config: type[Any]
    image_size: Callable[[Any], int]
    one_size: bool = False
    shares_memory: bool = False
    small: Callable[[Any], Shape] | None = None
    told: Callable[[Any, Modules], Mapping[str, Any]] = lambda config, modules: {}
    layers: Callable[[Any], int] = lambda config: 0
    facts: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    assumed: Callable[[Any], str] = lambda config: "what its config says by default"
    firsts: tuple[str, ...] = ()
    infer: Callable[[Mapping[str, Tensor]], Any] | None = None

    @property
    def name(self) -> str:
        """The name of the class of nets, by which files know the family."""
        return self.module.__name__

    def side(self, config: Any, given: ImageSize | None) -> ImageSize:
        """The size of images: the given one, or the usual.

        Raises ConfigError for another than the one size that there is.
        """
        usual = self.image_size(config)
        if given in (None, usual, (usual, usual)):
            return usual
        if self.one_size:
            raise ConfigError(
                f"the size of images is {given}, and this {self.title} takes images of {usual} pixels; "
                "leave it out"
            )
        return given


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known to plans, checkpoints, exports and recipes.

    Raises ConfigError where its name or the fields of its config are those of another one, since files
    tell families apart by these.
    """
    for known in FAMILIES.values():
        if family.name == known.name or field_names(family.config) == field_names(known.config):
            raise ConfigError(
                f"the family {family.name!r} cannot be told from {known.name!r}, which is registered: its "
                "class needs another name, and its config other fields"
            )
    FAMILIES[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All that are registered."""
    return tuple(FAMILIES.values())


def family_named(name: str) -> Family:
    """The family of a class of nets. Raises ConfigError for an unknown name."""
    if name not in FAMILIES:
        raise ConfigError(f"its architecture is {name!r}, not {' or '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(thing: object) -> Family | None:
    """The family of a net or of a config; None for any other net."""
    for family in FAMILIES.values():
        if isinstance(thing, (family.module, family.config)):
            return family
    return None


def config_of(model: object) -> Any:
    """The config of a net of a family; None for any other net."""
    is_ours = isinstance(model, nn.Module) and family_of(model) is not None
    return getattr(model, "config", None) if is_ours else None


def shares_memory(model: object) -> bool:
    """Whether a net's `memory_efficient` is whether it trains in a shared buffer."""
    family = family_of(model)
    return family is not None and family.shares_memory


def known_family(config: NetConfig) -> Family:
    """The family of a config, which has one."""
    found = family_of(config)
    assert found is not None
    return found


def config_from(data: Mapping[str, Any]) -> type[Any]:
    """The class of configs whose fields are nearest to the keys of `data`."""
    return min(
        (family.config for family in FAMILIES.values()),
        key=lambda config: len(field_names(config) ^ set(data)),
    )


def field_names(config: type[Any]) -> set[str]:
    """The names of the fields of a config."""
    return {field.name for field in dataclasses.fields(config)}


def first_weights() -> tuple[str, ...]:
    """The names of first weights by which the nets of all families are known."""
    return tuple(first for family in FAMILIES.values() for first in family.firsts)


def default_image_size(config: NetConfig) -> int:
    """The pixels a side of images that a net of this config usually takes."""
    return known_family(config).image_size(config)


def built(config: NetConfig) -> Any:
    """A new net of this config."""
    return known_family(config).module(config)


def empty_net(config: NetConfig) -> Any:
    """A net without weights, to be filled by `load_state_dict(..., assign=True)`.

    Parameters and norm buffers are on the meta device: no memory, no initialisation, no random
    numbers used. The index buffers of readers are real, on the CPU.
    """
    with torch.device("meta"):
        return built(config)


def compared_on(config: NetConfig) -> Shape:
    """The shape of images on which two nets of this config are quickly compared."""
    family = known_family(config)
    if family.small is not None:
        return family.small(config)
    side = family.image_size(config)
    return 2, config.in_channels, side, side
