"""Behind a flattened map: the scores and cuts of the conv that a linear layer equals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import randomise_
from torch import nn

from prune_dn import prune
from prune_dn.data.batches import Batches, read_batches
from prune_dn.models import light_cnn_9, light_cnn_29_v2
from prune_dn.pruning.importance import importance
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units

DATA_DRIVEN = ("activation", "taylor", "fisher")
Size = tuple[int, int]


def pair(size: Size, seed: int) -> tuple[nn.Module, nn.Module]:
    """The same net twice: a linear layer on a flattened map, and a conv with a kernel of its size."""
    conv = nn.Conv2d(12, 5, size)
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    randomise_(nn.Sequential(stem, conv), seed)
    flat = nn.Linear(12 * size[0] * size[1], 5)
    flat.weight.data, flat.bias.data = conv.weight.data.flatten(1), conv.bias.data
    return (
        nn.Sequential(*stem, nn.Flatten(), flat).eval(),
        nn.Sequential(*stem, conv, nn.Flatten()).eval(),
    )


def labelled(size: Size, seed: int, classes: int = 5, channels: int = 3):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, channels, *size, generator=g),
            torch.randint(classes, (n,), generator=g),
        )
        for n in (9, 7)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 5)])
@pytest.mark.parametrize("criterion", DATA_DRIVEN)
def test_a_linear_layer_chooses_what_its_conv_does(criterion: str, size: Size, seed: int) -> None:
    data = labelled(size, seed)
    flat, conv = pair(size, seed)
    torch.testing.assert_close(flat(data[0][0]), conv(data[0][0]))
    scores = [scored(net, criterion, size, read_batches(data)) for net in (flat, conv)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-9)
    kept = [
        prune(net, 0.5, criterion=criterion, compensate="none", calibration=data)[0].bias
        for net in (flat, conv)
    ]
    assert 0 < len(kept[0]) < 12 and torch.equal(*kept)


def scored(net: nn.Module, criterion: str, size: Size, batches: Batches | None) -> np.ndarray:
    given = subject(net, size)
    return importance(given.model, Units(given.graph), criterion, calibration=batches)


class Read(nn.Module):
    """A map that a linear layer reads flattened, and a conv reads twice over; a gate at each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 5, 2, 2)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x, gates=(1, 1)):
        x = self.stem(x).relu()
        flat, twice = x * gates[0], x * gates[1]
        twice = torch.cat([twice, twice], 1)
        return self.head(flat.flatten(1)) + self.side(twice).mean((2, 3))


@pytest.mark.parametrize("criterion", DATA_DRIVEN)
def test_a_map_that_two_layers_read(criterion: str) -> None:
    """Against the definition: slopes of the loss with a gate at each reader, image by image."""
    net, data = randomise_(Read(), 2).eval(), labelled((4, 4), 0)
    expected = torch.zeros(6)
    for x, y in [(x[None], y[None]) for xs, ys in data for x, y in zip(xs, ys, strict=True)]:
        gates = [torch.ones(1, 6, 1, 1, requires_grad=True) for _ in range(2)]
        loss = nn.functional.cross_entropy(net(x, gates), y)
        seen = net.stem(x).relu().mean((0, 2, 3)).detach()
        for gradient in torch.autograd.grad(loss, gates):
            slope = gradient.flatten()
            value = {"activation": seen, "taylor": slope.abs(), "fisher": slope.square() / 2}
            expected += value[criterion] / 16
    found = scored(net, criterion, (4, 4), read_batches(data))
    np.testing.assert_allclose(found, expected.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("criterion", DATA_DRIVEN)
@pytest.mark.parametrize("build", [light_cnn_9, light_cnn_29_v2])
def test_the_linear_layer_of_a_light_cnn(build, criterion: str) -> None:
    net = build(3, image_size=32, widths=[4, 6, 8, 6, 6], embedding=8).eval()
    data = labelled((32, 32), 0, 3, 1)
    linear = net.fc1.filter if build is light_cnn_9 else net.fc
    slopes, means = [], []
    for images, labels in data:
        seen: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        loss = nn.functional.cross_entropy(net(images), labels, reduction="sum")
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, seen)
        units = (len(images), -1, net.config.side**2)
        slopes.append((seen[0] * gradient).reshape(units).sum(2))
        means.append(seen[0].detach().abs().reshape(units).mean(2))
    slope, mean = torch.cat(slopes), torch.cat(means)
    expected = {"activation": mean, "taylor": slope.abs(), "fisher": slope.square() / 2}[criterion]
    units = Units(net.config.graph())
    name = "fc1.filter" if build is light_cnn_9 else "fc"
    reader = next(r for r in units.graph.readers if r.layer == name)
    read = units.unit(reader.channels)[:: net.config.side**2]
    scores = importance(net, units, criterion, calibration=read_batches(data))
    np.testing.assert_allclose(
        scores[read], expected.double().mean(0).detach(), rtol=1e-4, atol=1e-9
    )


def test_a_norm_on_a_flattened_map_counts_like_one_on_the_map() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*stem, nn.BatchNorm1d(24), nn.Linear(24, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(6.0))
        net[4].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 6.0]).repeat(6))
    scores = scored(net, "bn_scale", (2, 2), None)
    np.testing.assert_allclose(scores, np.arange(6.0) + 3)
