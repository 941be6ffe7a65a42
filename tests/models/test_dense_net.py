"""The net against a slow forward and torchvision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import randomise_
from strategies import pruned_configs
from torch import Tensor

from prune_dn.models import DenseNet, DenseNetConfig, LayerConfig, TransitionConfig, densenet
from prune_dn.models.dense_net import ReadStream
from prune_dn.models.families import empty_net


def images(config: DenseNetConfig, batch: int = 2, seed: int = 1) -> Tensor:
    side = 32 if config.stem == "imagenet" else 8
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_channels, side, side, generator=generator).double()


def slow_forward(config: DenseNetConfig, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Read the config channel by channel; norms by their formula; no module of ours."""

    def norm_relu(name: str, x: Tensor) -> Tensor:
        w, b, mean, var = (
            weights[f"{name}.{part}"].reshape(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + config.norm_eps).sqrt() * w + b).clamp(min=0)

    def read(
        stream: list[Tensor], indices: tuple[int, ...] | None, rivals: tuple[int, ...] | None
    ) -> Tensor:
        chosen = tuple(range(len(stream))) if indices is None else indices
        against = chosen if rivals is None else rivals
        pairs = [torch.stack([stream[i], stream[j]]) for i, j in zip(chosen, against, strict=True)]
        return torch.stack([pair.amax(0) for pair in pairs], 1)

    def compete(x: Tensor, part: LayerConfig | TransitionConfig) -> list[Tensor]:
        maps, kind = list(x.unbind(1)), part.mfm
        if kind is None:
            return maps
        if part.mfm_alone:
            firsts, seconds = maps[: part.out_channels], iter(maps[part.out_channels :])
            return [
                first if unit in part.mfm_alone else torch.stack([first, next(seconds)]).amax(0)
                for unit, first in enumerate(firsts)
            ]
        siblings, survivors = (2, 1) if kind == "2/1" else (3, 2)
        n = len(maps) // siblings
        units = [torch.stack(maps[c::n]).sort(0, descending=True).values for c in range(n)]
        return [unit[place] for place in range(survivors) for unit in units]

    x = F.conv2d(x, weights["features.conv0.weight"], None, *(
        (1, 1) if config.stem == "cifar" else (2, 3)
    ))  # fmt: skip
    if config.stem == "imagenet":
        x = F.max_pool2d(norm_relu("features.norm0", x), 3, 2, 1)
    stream = list(x.unbind(1))
    for b, block in enumerate(config.blocks, start=1):
        for layer in block:
            name = f"features.denseblock{b}.{layer.name}"
            x = norm_relu(f"{name}.norm1", read(stream, layer.input_indices, layer.rival_indices))
            if layer.bottleneck is None:
                x = F.conv2d(x, weights[f"{name}.conv1.weight"], padding=1)
            else:
                x = torch.einsum("nchw,oc->nohw", x, weights[f"{name}.conv1.weight"][:, :, 0, 0])
                x = norm_relu(f"{name}.norm2", x)
                x = F.conv2d(x, weights[f"{name}.conv2.weight"], padding=1)
            stream += compete(x, layer)
        if b <= len(config.transitions):
            t, name = config.transitions[b - 1], f"features.transition{b}"
            x = norm_relu(f"{name}.norm", read(stream, t.input_indices, t.rival_indices))
            x = torch.einsum("nchw,oc->nohw", x, weights[f"{name}.conv.weight"][:, :, 0, 0])
            stream = [F.avg_pool2d(m, 2) for m in compete(x, t)]
    x = read(stream, config.classifier_indices, config.classifier_rivals)
    x = norm_relu("features.norm5", x).mean((2, 3))
    return x @ weights["classifier.weight"].T + weights["classifier.bias"]


@given(pruned_configs(), st.integers(0, 99))
def test_forward_does_what_the_config_says(config: DenseNetConfig, seed: int) -> None:
    net = randomise_(DenseNet(config).double().eval(), seed)
    x = images(config)
    with torch.no_grad():
        torch.testing.assert_close(net(x), slow_forward(config, net.state_dict(), x))


def test_equals_torchvision() -> None:
    theirs = torchvision.models.DenseNet(8, (2, 3, 1), 12, bn_size=3, num_classes=5).double().eval()
    randomise_(theirs, 0)
    ours = densenet((2, 3, 1), 8, num_init_features=12, bn_size=3, num_classes=5).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_keys_and_shapes_are_torchvisions(name: str) -> None:
    from prune_dn.models import BUILDERS

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        ours = BUILDERS[name]().state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


def test_every_parameter_gets_a_gradient() -> None:
    net = densenet([2, 2], 6, stem="cifar", num_classes=4,
                   mfm={"denseblock1.*": "2/1", "transition1": "3/2"})  # fmt: skip
    F.cross_entropy(net(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_reading_everything_is_no_gather() -> None:
    stream = torch.randn(2, 4, 3, 3)
    assert ReadStream(None)(stream) is stream
    some = ReadStream((0, 3))
    assert torch.equal(some(stream), stream[:, [0, 3]])
    assert not some.state_dict()  # the config keeps the indices
    assert some.double().input_indices.dtype == torch.int64


def test_what_is_read_competes_before_the_norm() -> None:
    stream = torch.randn(2, 5, 3, 3)
    read = ReadStream((0, 1, 4), (3, 2, 4))(stream)
    sides = (stream[:, [0, 1, 4]], stream[:, [3, 2, 4]])
    assert torch.equal(read, torch.where(sides[0] > sides[1], *sides))


# -- empty_net -----------------------------------------------------------------------------------


@settings(max_examples=10)
@given(pruned_configs())
def test_an_empty_net_takes_any_weights(config: DenseNetConfig) -> None:
    full = randomise_(DenseNet(config).eval(), 3)
    before = torch.get_rng_state()
    empty = empty_net(config)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.is_meta for p in empty.parameters())
    for name, buffer in empty.named_buffers():
        assert buffer.is_meta != name.endswith(("_indices", "rivals")), name
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert all(p.requires_grad for p in empty.parameters())
    x = images(config).float()
    with torch.no_grad():
        assert torch.equal(empty.eval()(x), full(x))
