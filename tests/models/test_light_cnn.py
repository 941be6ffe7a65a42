"""Light CNNs against plain functions written from the paper, published sizes and keys."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from light_cnn_oracle import light_cnn_configs, slow
from torch import nn

from prune_dn.errors import ConfigError, ConversionError
from prune_dn.models import (
    LightCNN,
    LightCNNConfig,
    MFMConfig,
    light_cnn_9,
    light_cnn_29,
    light_cnn_29_v2,
)
from prune_dn.models.light_cnn import light_cnn_config
from prune_dn.models.state_dicts import from_state_dict

BUILDERS = [light_cnn_9, light_cnn_29, light_cnn_29_v2]
SMALL = {"image_size": 32, "widths": (3, 4, 5, 6, 4), "embedding": 7}


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def with_shifts(net: LightCNN, seed: int = 0) -> LightCNN:
    """Biases that all differ and matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@given(light_cnn_configs())
def test_equals_plain_functions(config: LightCNNConfig) -> None:
    net = with_shifts(LightCNN(config)).double().eval()
    x = torch.randn(2, config.in_channels, config.image_size, config.image_size).double()
    with torch.no_grad():
        torch.testing.assert_close(net(x), slow(net, x), rtol=0, atol=1e-10)
    assert LightCNNConfig.from_json(config.to_json()) == config


def published(trunks: list[int], blocks: list[int], *, mfm_head: bool) -> int:
    """Parameters before the classifier, from the tables of the paper: k * k * in * 2 out + 2 out."""

    def conv(k: int, inputs: int, outputs: int) -> int:
        return k * k * inputs * 2 * outputs + 2 * outputs

    total = conv(5, 1, trunks[0])
    for depth, before, after in zip(blocks, trunks, trunks[1:], strict=False):
        total += depth * 2 * conv(3, before, before) + conv(1, before, before)
        total += conv(3, before, after)
    outputs = 512 if mfm_head else 256
    return total + 8 * 8 * 128 * outputs + outputs


@pytest.mark.parametrize(
    ("builder", "blocks", "mfm_head"),
    [
        (light_cnn_9, [0] * 4, True),
        (light_cnn_29, [1, 2, 3, 4], True),
        (light_cnn_29_v2, [1, 2, 3, 4], False),
    ],
)
def test_published_sizes(builder, blocks, mfm_head) -> None:
    with torch.device("meta"):
        net = builder()
    head = params(net.fc2)
    assert head == 256 * 79077 + (79077 if mfm_head else 0)
    assert params(net) - head == published([48, 96, 192, 128, 128], blocks, mfm_head=mfm_head)


def test_published_keys() -> None:
    """As in the published code: written here by hand."""
    with torch.device("meta"):
        nine, deep, v2 = (set(builder(10).state_dict()) for builder in BUILDERS)
    layers = ["0", "2.conv_a", "2.conv", "4.conv_a", "4.conv", "6.conv_a", "6.conv"]
    layers += ["7.conv_a", "7.conv"]
    names = [f"features.{layer}.filter" for layer in layers] + ["fc1.filter", "fc2"]
    assert nine == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    names = ["conv1.filter"]
    for stage, depth in ((1, 1), (2, 2), (3, 3), (4, 4)):
        names += [f"block{stage}.{i}.conv{n}.filter" for i in range(depth) for n in (1, 2)]
        names += [f"group{stage}.conv_a.filter", f"group{stage}.conv.filter"]
    both = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    ends = ("fc.filter.weight", "fc.filter.bias", "fc2.weight", "fc2.bias")
    assert deep == both | set(ends)
    assert v2 == both | {"fc.weight", "fc.bias", "fc2.weight"}


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_wrapped_state_dict_loads(builder) -> None:
    net = with_shifts(builder(10, **SMALL)).eval()
    wrapped = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    again = from_state_dict({"epoch": 3, "arch": "LightCNN", "state_dict": wrapped}).eval()
    assert again.config == net.config
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(x), net(x))


def test_what_a_state_dict_cannot_tell() -> None:
    config = light_cnn_9(10, **SMALL).config
    ragged = (MFMConfig(3, (1,)), *config.layers[1:])
    net = LightCNN(dataclasses.replace(config, layers=ragged))
    with pytest.raises(ConversionError, match=r"features.0.filter.weight has 5 filters, which are"):
        from_state_dict(net.state_dict())
    state = light_cnn_29(10, **SMALL).state_dict()
    del state["group2.conv_a.filter.weight"]
    with pytest.raises(ConversionError, match=r"group2.conv_a.filter.weight is missing"):
        from_state_dict(state)
    state = light_cnn_29(10, **SMALL).state_dict()
    state["fc.filter.weight"] = state["fc.filter.weight"][:, :-1]
    with pytest.raises(ConversionError, match=r"reads 15 numbers, which are not 4 square maps"):
        from_state_dict(state)
    state = light_cnn_29(10, **SMALL).state_dict()
    state["block2.0.conv2.filter.weight"] = state["block2.0.conv2.filter.weight"][:6]
    with pytest.raises(ConversionError, match=r"its 3 maps cannot be added to the 4 of group1"):
        from_state_dict(state)


@pytest.mark.parametrize("builder", BUILDERS)
def test_dropout_stands_between_embedding_and_classifier(builder) -> None:
    net = builder(5, **SMALL)
    x = torch.randn(3, 1, 32, 32)
    torch.manual_seed(3)
    out = net.train()(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(net.embed(x), 0.5)
    assert (kept == 0).any()
    torch.testing.assert_close(out, net.fc2(kept))
    net.eval()
    torch.testing.assert_close(net(x), net.fc2(net.embed(x)))


def test_new_weights_keep_signals_alive() -> None:
    """Root mean square of the embedding of noise; MFM layers alone keep it, poolings raise it."""
    x = torch.randn(8, 1, 32, 32)
    for builder in BUILDERS:
        net = builder(10, image_size=32).eval()
        assert all((p == 0).all() for n, p in net.named_parameters() if n.endswith("bias"))
        with torch.no_grad():
            strength = net.embed(x).square().mean().sqrt().item()
        assert 0.5 < strength < 12, builder.__name__
    layer = light_cnn_29(10, image_size=32).group1.conv
    with torch.no_grad():
        maps = torch.rand(4, 48, 40, 40)
        inside = layer(maps)[:, :, 1:-1, 1:-1].square().mean() / maps.square().mean()
    assert 0.8 < inside < 1.25


def test_another_image_size_is_refused() -> None:
    net = light_cnn_9(10, **SMALL)
    with pytest.raises(ConfigError, match=r"takes images of 32x32 pixels, not 64x32"):
        net(torch.zeros(1, 1, 64, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "4"}, "variant is '4'; choose"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"image_size": True}, "image_size is True"),
        ({"variant": "29_v2", "image_size": 15}, "need at least 16"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"blocks": (1, 1, 1)}, "it must be 4 integers"),
        ({"variant": "9"}, "variant 9 has no residual blocks"),
        ({"layers": ()}, "there are 0 layers; these blocks need 18"),
    ],
)
def test_impossible_configs(changes, message) -> None:
    config = light_cnn_config("29", (1, 1, 1, 1), image_size=32)
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("index", "layer", "message"),
    [
        (0, MFMConfig(0), "conv1.filter: units is 0"),
        (1, MFMConfig(3, (1, 1)), "alone must be rising numbers of its 3 units"),
        (1, MFMConfig(3, (3,)), "alone must be rising numbers of its 3 units"),
        (2, MFMConfig(5), "its 5 maps cannot be added to the 48 of conv1.filter"),
        (-1, MFMConfig(4, (0,)), "fc: in variant 29_v2 it is a plain linear layer"),
    ],
)
def test_impossible_layers(index, layer, message) -> None:
    config = light_cnn_config("29_v2", (1, 0, 0, 0), image_size=32)
    layers = list(config.layers)
    layers[index] = layer
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(config, layers=tuple(layers))


def test_builders_say_what_they_need() -> None:
    with pytest.raises(ConfigError, match=r"widths is \(8, 8\); give 5"):
        light_cnn_9(10, widths=(8, 8))
    with pytest.raises(
        ConfigError, match=r"block_config is \(1, 2\); give the residual blocks of 4"
    ):
        light_cnn_29(10, block_config=(1, 2))
    for text in ("{}", "[1]", "no"):
        with pytest.raises(ConfigError, match="not a LightCNNConfig in JSON"):
            LightCNNConfig.from_json(text)
