"""Light CNN (arXiv:1511.02683) with the keys of its published PyTorch code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_dn.base import limits
from prune_dn.errors import ConfigError
from prune_dn.models.light_cnn_config import STAGES, LightCNNConfig, MFMConfig, Variant
from prune_dn.models.mfm import MaxFeatureMap

PUBLISHED = (48, 96, 192, 128, 128)
_POOLED = [
    f"{name}.filter.weight" for name in ("conv1", "group1.conv", "group2.conv", "group4.conv")
]


class MFMLayer(nn.Module):
    """A conv or linear layer, and MFM over its filters."""

    def __init__(self, layer: nn.Module, config: MFMConfig) -> None:
        super().__init__()
        self.filter = layer
        self.mfm = MaxFeatureMap("2/1", units=config.units, alone=config.alone)

    def forward(self, x: Tensor) -> Tensor:
        return self.mfm(self.filter(x))


class Residual(nn.Module):
    """Two 3x3 MFM layers whose maps are added to what they read; nothing follows the sum."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Group(nn.Module):
    """A 1x1 MFM layer, then a 3x3 one ("network in network")."""

    def __init__(self, conv_a: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.conv_a, self.conv = conv_a, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv_a(x))


class Pool(nn.Module):
    """2x2 pooling: the maximum, of a partial window too; or maximum plus mean of whole windows."""

    def __init__(self, *, plus_mean: bool) -> None:
        super().__init__()
        self.plus_mean = plus_mean

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_mean:
            return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
        return F.max_pool2d(x, 2, ceil_mode=True)


class LightCNN(nn.Module):
    """The network that a `LightCNNConfig` describes: (N, in_channels, S, S) -> (N, num_classes).

    A 5x5 MFM layer, then four stages (residual blocks and a `Group`) between four poolings, a linear
    MFM layer that makes the embedding, dropout, the classifier. Variant `9` keeps the maps in
    `features`; `29_v2` pools by maximum plus mean, its embedding is plain linear and its classifier
    has no bias. Published code returns (logits, embedding): here `embed` gives the second.

    New weights are normal with variance 1 / fan-in and biases 0: the larger of two such answers has
    the same mean square as what is read, so signals do not fade with depth. The last weights of a
    residual block are divided by the root of the number of blocks, which keeps their sum in bounds,
    and those before a pooling of `29_v2`, which about doubles what it reads, by 2.

    >>> import torch
    >>> from prune_dn.models import light_cnn_9
    >>> net = light_cnn_9(10, image_size=32).eval()
    >>> net(torch.zeros(2, 1, 32, 32)).shape, net.embed(torch.zeros(2, 1, 32, 32)).shape
    (torch.Size([2, 10]), torch.Size([2, 256]))
    """

    def __init__(self, config: LightCNNConfig) -> None:
        super().__init__()
        self.config = config
        layers = _layers(config)
        steps: dict[str, nn.Module] = {}
        made = iter(layers[:-1])
        steps["conv1"] = next(made)
        for stage, depth in enumerate(config.blocks, start=1):
            if stage < STAGES:
                steps[f"pool{stage}"] = self._pool()
            if depth:
                blocks = (Residual(next(made), next(made)) for _ in range(depth))
                steps[f"block{stage}"] = nn.Sequential(*blocks)
            steps[f"group{stage}"] = Group(next(made), next(made))
        steps[f"pool{STAGES}"] = self._pool()
        if config.variant == "9":
            self.features = nn.Sequential(*steps.values())
            self.fc1 = layers[-1]
        else:
            for name, module in steps.items():
                self.add_module(name, module)
            self.fc = layers[-1]
        bias = config.variant != "29_v2"
        self.fc2 = nn.Linear(config.layers[-1].units, config.num_classes, bias=bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("conv2.filter.weight"):
                    parameter.div_(math.sqrt(sum(config.blocks)))
                elif config.variant == "29_v2" and name in _POOLED:
                    parameter.div_(2)

    def _pool(self) -> Pool:
        return Pool(plus_mean=self.config.variant == "29_v2")

    def embed(self, x: Tensor) -> Tensor:
        """The embedding by which faces are compared: (N, in_channels, S, S) -> (N, embedding)."""
        size = self.config.image_size
        if x.shape[2:] != (size, size):
            raise ConfigError(
                f"this Light CNN takes images of {size}x{size} pixels, not "
                f"{'x'.join(map(str, x.shape[2:]))}: its linear layer fits that size; resize the "
                "images, or build it with another image_size"
            )
        *maps, linear, _ = self.children()
        for module in maps:
            x = module(x)
        embedding: Tensor = linear(x.flatten(1))
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.dropout(self.embed(x), self.config.drop_rate, self.training))
        return out

    def refit_(self, kept: Mapping[str, Tensor]) -> None:
        """After filters were cut: config and MFM as the layers are now.

        `kept` are masks of the filters that stayed, by the name of the layer that lost some. A unit
        that lost one filter stands alone; where it lost its first, the other takes that place.
        """
        old = self.config
        layers = []
        for place, layer in zip(old.places(), old.layers, strict=True):
            if place.name in kept:
                layer, order = _left(layer, kept[place.name].cpu())
                _reorder_(self.get_submodule(place.name), order)
            layers.append(layer)
        self.config = dataclasses.replace(old, layers=tuple(layers))
        for name, layer in self.config.named().items():
            module = self.get_submodule(name.removesuffix(".filter"))
            if isinstance(module, MFMLayer):
                device = next(module.parameters()).device
                mfm = MaxFeatureMap("2/1", units=layer.units, alone=layer.alone)
                module.mfm = mfm.to(device).train(module.mfm.training)


def _layers(config: LightCNNConfig) -> list[nn.Module]:
    """The layers of `config.places()`, with new weights."""
    named = config.named()
    made: list[nn.Module] = []
    for place in config.places():
        layer = named[place.name]
        read = config.in_channels if place.reads is None else named[place.reads].units
        if place.kernel:
            conv = nn.Conv2d(read, layer.filters, place.kernel, padding=place.kernel // 2)
            made.append(MFMLayer(conv, layer))
        else:
            linear = nn.Linear(read * config.side**2, layer.filters)
            made.append(MFMLayer(linear, layer) if place.name.endswith(".filter") else linear)
    return made


def _left(layer: MFMConfig, kept: Tensor) -> tuple[MFMConfig, Tensor]:
    """What is left of a layer whose filters stay where `kept` (filters,) is true, and their order.

    The order is in numbers of those that stay: one of each unit, then the others of the pairs.
    """
    paired = torch.ones(layer.units, dtype=torch.bool)
    paired[list(layer.alone)] = False
    number = (kept.cumsum(0) - 1).masked_fill(~kept, -1)
    first, second = number[: layer.units], torch.full((layer.units,), -1)
    second[paired] = number[layer.units :]
    stays = torch.maximum(first, second) >= 0
    lead = torch.where(first >= 0, first, second)[stays]
    other = torch.where(first >= 0, second, -1)[stays]
    alone = (other < 0).nonzero().flatten().tolist()
    return MFMConfig(len(lead), tuple(alone)), torch.cat([lead, other[other >= 0]])


def _reorder_(layer: nn.Module, order: Tensor) -> None:
    """Put the filters of a conv or linear layer in another order."""
    if not order.equal(torch.arange(len(order))):
        for parameter in layer.parameters():
            parameter.data = parameter.data[order.to(parameter.device)]


def light_cnn_config(
    variant: Variant,
    block_config: Sequence[int],
    widths: Sequence[int] = PUBLISHED,
    embedding: int = 256,
    *,
    num_classes: int = 79077,
    in_channels: int = 1,
    image_size: int = 128,
    drop_rate: float = 0.5,
) -> LightCNNConfig:
    """The config of a whole Light CNN: maps of the first layer and of the four stages' ends."""
    if len(widths) != STAGES + 1:
        raise ConfigError(
            f"widths is {tuple(widths)!r}; give {STAGES + 1}: of the first layer and of each stage"
        )
    blocks = tuple(block_config)
    if len(blocks) != STAGES:
        raise ConfigError(
            f"block_config is {blocks!r}; give the residual blocks of {STAGES} stages"
        )
    if sum(blocks) > limits.LAYERS:
        raise ConfigError(
            f"block_config asks for {sum(blocks):,} residual blocks; nets have at most {limits.LAYERS:,}"
        )
    if not isinstance(embedding, int) or not 1 <= embedding <= limits.CHANNELS:
        raise ConfigError(f"embedding is {embedding!r}; give 1 to {limits.CHANNELS:,}")
    units = [widths[0]]
    for depth, before, after in zip(blocks, widths[:-1], widths[1:], strict=True):
        units += [before] * (2 * depth + 1) + [after]
    plain = tuple(range(embedding)) if variant == "29_v2" else ()
    return LightCNNConfig(
        variant,
        blocks,
        (*map(MFMConfig, units), MFMConfig(embedding, plain)),
        num_classes,
        in_channels,
        image_size,
        drop_rate,
    )


def light_cnn_9(
    num_classes: int = 79077,
    *,
    in_channels: int = 1,
    image_size: int = 128,
    widths: Sequence[int] = PUBLISHED,
    embedding: int = 256,
    drop_rate: float = 0.5,
) -> LightCNN:
    """Light CNN-9: no residual blocks; 5.5 M parameters before the classifier."""
    config = light_cnn_config(
        "9",
        (0,) * STAGES,
        widths,
        embedding,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        drop_rate=drop_rate,
    )
    return LightCNN(config)


def light_cnn_29(
    num_classes: int = 79077,
    *,
    in_channels: int = 1,
    image_size: int = 128,
    block_config: Sequence[int] = (1, 2, 3, 4),
    widths: Sequence[int] = PUBLISHED,
    embedding: int = 256,
    drop_rate: float = 0.5,
) -> LightCNN:
    """Light CNN-29: ten residual blocks; 12.6 M parameters before the classifier."""
    config = light_cnn_config(
        "29",
        block_config,
        widths,
        embedding,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        drop_rate=drop_rate,
    )
    return LightCNN(config)


def light_cnn_29_v2(
    num_classes: int = 79077,
    *,
    in_channels: int = 1,
    image_size: int = 128,
    block_config: Sequence[int] = (1, 2, 3, 4),
    widths: Sequence[int] = PUBLISHED,
    embedding: int = 256,
    drop_rate: float = 0.5,
) -> LightCNN:
    """Light CNN-29 v2: pooling by maximum plus mean, a plain embedding, a classifier without bias."""
    config = light_cnn_config(
        "29_v2",
        block_config,
        widths,
        embedding,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        drop_rate=drop_rate,
    )
    return LightCNN(config)
