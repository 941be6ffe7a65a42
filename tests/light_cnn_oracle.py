"""A Light CNN as the paper draws it: plain functions, one unit at a time, from weights and config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from prune_dn.models import (
    LightCNN,
    LightCNNConfig,
    MFMConfig,
    light_cnn_9,
    light_cnn_29,
    light_cnn_29_v2,
)

BUILDERS = [light_cnn_9, light_cnn_29, light_cnn_29_v2]
SMALL = {"image_size": 32, "widths": (6, 8, 10, 8, 8), "embedding": 12}
SHALLOW = {**SMALL, "block_config": (1, 0, 2, 1)}
GROUPS = {"9": ["features.2", "features.4", "features.6", "features.7"]}
LINEAR = {"9": "fc1.filter", "29": "fc.filter", "29_v2": "fc"}


def slow(
    net: LightCNN,
    x: Tensor,
    kept: Mapping[str, set[int]] | None = None,
    gone: Mapping[str, set[int]] | None = None,
) -> Tensor:
    """The logits in eval mode. Whoever reads a layer gets zero for its units that are not `kept`; its
    filters that are `gone` are minus infinity in their maximum.
    """
    config, state = net.config, net.state_dict()
    alone = {name: set(layer.alone) for name, layer in config.named().items()}
    variant = config.variant

    def pool(x: Tensor) -> Tensor:
        rows = []
        last = x.shape[2] - x.shape[2] % 2 if variant == "29_v2" else x.shape[2]
        for i in range(0, last, 2):
            row = []
            for j in range(0, last, 2):
                window = x[:, :, i : i + 2, j : j + 2]
                value = window.amax((2, 3))
                row.append(value + window.mean((2, 3)) if variant == "29_v2" else value)
            rows.append(torch.stack(row, 2))
        return torch.stack(rows, 2)

    def read(x: Tensor, maker: str) -> Tensor:
        if kept is None or maker not in kept:
            return x
        mask = torch.tensor([unit in kept[maker] for unit in range(x.shape[1])])
        return x * mask.reshape(1, -1, *([1] * (x.ndim - 2)))

    def competed(name: str, filters: Tensor, units: int) -> Tensor:
        filters = filters.clone()
        filters[:, sorted((gone or {}).get(name, ()))] = -torch.inf
        seconds, out = iter(range(units, filters.shape[1])), []
        for unit in range(units):
            first = filters[:, unit]
            out.append(
                first if unit in alone[name] else torch.maximum(first, filters[:, next(seconds)])
            )
        assert next(seconds, None) is None
        return torch.stack(out, 1)

    def conv(name: str, x: Tensor, maker: str | None) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        x = x if maker is None else read(x, maker)
        units = (weight.shape[0] + len(alone[name])) // 2
        return competed(name, F.conv2d(x, weight, bias, padding=weight.shape[2] // 2), units)

    trunk = "features.0.filter" if variant == "9" else "conv1.filter"
    x = pool(conv(trunk, x, None))
    for stage in range(4):
        for i in range(config.blocks[stage]):
            first, second = (f"block{stage + 1}.{i}.conv{n}.filter" for n in (1, 2))
            x = x + conv(second, conv(first, x, trunk), first)
        group = GROUPS["9"][stage] if variant == "9" else f"group{stage + 1}"
        x = conv(f"{group}.conv_a.filter", x, trunk)
        trunk = f"{group}.conv.filter"
        x = conv(trunk, x, f"{group}.conv_a.filter")
        if stage != 2:  # the third and the fourth stage work at one size
            x = pool(x)
    linear = LINEAR[variant]
    x = F.linear(read(x, trunk).flatten(1), state[f"{linear}.weight"], state[f"{linear}.bias"])
    if variant != "29_v2":
        x = competed(linear, x, (x.shape[1] + len(alone[linear])) // 2)
    return F.linear(read(x, linear), state["fc2.weight"], state.get("fc2.bias"))


@st.composite
def light_cnn_configs(draw: st.DrawFn, *, ragged: bool = True) -> LightCNNConfig:
    """Small Light CNNs as pruning leaves them; `ragged`: some units have one filter left."""
    variant = draw(st.sampled_from(["9", "29", "29_v2"]))
    blocks = tuple(0 if variant == "9" else draw(st.integers(0, 2)) for _ in range(4))

    def layer(units: int) -> MFMConfig:
        some = draw(st.sets(st.integers(0, units - 1))) if ragged and draw(st.booleans()) else ()
        return MFMConfig(units, tuple(sorted(some)))

    trunk = draw(st.integers(1, 5))
    layers = [layer(trunk)]
    for depth in blocks:
        for _ in range(depth):
            layers += [layer(draw(st.integers(1, 5))), layer(trunk)]
        layers.append(layer(draw(st.integers(1, 5))))
        trunk = draw(st.integers(1, 5))
        layers.append(layer(trunk))
    embedding = draw(st.integers(1, 6))
    plain = MFMConfig(embedding, tuple(range(embedding)))
    return LightCNNConfig(
        variant,
        blocks,
        (*layers, plain if variant == "29_v2" else layer(embedding)),
        num_classes=draw(st.integers(1, 4)),
        in_channels=draw(st.sampled_from([1, 3])),
        image_size=draw(st.sampled_from([16, 20, 33])),
        drop_rate=draw(st.sampled_from([0.0, 0.5])),
    )


def distinct(net: LightCNN, seed: int = 0) -> LightCNN:
    """Biases that all differ, by which a filter is known again, and weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(noise * spread)
    return net.double().eval()


def kept_units(net: LightCNN, small: LightCNN) -> dict[str, set[int]]:
    """Which units of `net` are in `small`, known by the biases of all their filters."""
    state, left, found = net.state_dict(), small.state_dict(), {}
    for name, layer in net.config.named().items():
        bias = state[f"{name}.bias"].tolist()
        stays = set(left[f"{name}.bias"].tolist())
        assert len(set(bias)) == len(bias)
        paired = [unit for unit in range(layer.units) if unit not in layer.alone]
        filters = {unit: [bias[unit]] for unit in range(layer.units)}
        for place, unit in enumerate(paired):
            filters[unit].append(bias[layer.units + place])
        found[name] = {unit for unit, values in filters.items() if values[0] in stays}
        for unit, values in filters.items():
            assert all((value in stays) == (unit in found[name]) for value in values)
    return found


def check_contract(net: LightCNN, small: LightCNN) -> None:
    config = net.config
    x = torch.randn(2, config.in_channels, config.image_size, config.image_size).double()
    with torch.no_grad():
        found, wanted = small(x), slow(net, x, kept_units(net, small))
        plain = slow(small, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * (1 + wanted.abs().max().item()))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-10 * (1 + wanted.abs().max().item()))
