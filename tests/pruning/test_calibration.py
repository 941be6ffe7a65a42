"""Patches and Gram matrices against convolution itself."""

from __future__ import annotations

import torch
from oracle import randomise_

from prune_dn.data.batches import read_batches
from prune_dn.models import densenet
from prune_dn.pruning.calibration import PixelSampler, collect
from prune_dn.pruning.statistics import Activations, Gradients, Gram


def test_grams_predict_the_outputs_power() -> None:
    """tr(W^T G W) is the mean squared output, for every reader, when all pixels are used."""
    net = randomise_(densenet([2, 1], 4, bn_size=2, stem="cifar", num_classes=3), 1).eval()
    data = read_batches([torch.randn(3, 3, 8, 8), torch.randn(2, 3, 8, 8)], loss="mse")
    names = ["features.denseblock1.denselayer2.conv2", "features.transition1.conv", "classifier"]
    found = collect(net, names, data, Gram)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda module, _, out, name=name: outputs[name].append(
                out if module is not net.classifier else out - module.bias
            )
        )
    for x in data.inputs:
        net(x)
    for name in names:
        weight = net.get_submodule(name).weight.flatten(1)
        power = ((weight @ found[name].gram) * weight).sum(1)
        out = torch.cat(outputs[name])
        measured = out.square().transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(power, measured, rtol=1e-4, atol=1e-6)


def test_sensitivity_is_the_fisher_information_of_the_logits() -> None:
    """At the classifier it is p (1 - p) per class, in the mean over drawn labels."""
    net = densenet([1], 4, stem="cifar", num_classes=3).eval()
    x = torch.randn(1, 3, 8, 8).expand(4000, -1, -1, -1)
    p = net(x[:1]).softmax(1)[0].detach()
    found = collect(net, ["classifier"], read_batches(x.split(1000), loss="softmax"), Gram)
    expected = (p * (1 - p)).double()
    torch.testing.assert_close(found["classifier"].sensitivity, expected, rtol=0.1, atol=0.01)


def test_the_sampler_draws_enough_rows() -> None:
    sampler, conv = PixelSampler(100, 0), torch.nn.Conv2d(4, 5, 3)
    positions = sampler(conv, torch.zeros(10, 5, 32, 32))
    assert positions is not None and positions.shape == (10, 41)  # 4,096 rows of 100 images
    assert positions.min() >= 0 and positions.max() < 1024
    assert sampler(conv, torch.zeros(10, 5, 4, 4)) is None
    assert sampler(torch.nn.Linear(4, 5), torch.zeros(10, 5)) is None


class Forked(torch.nn.Module):
    """Two readers of the same maps, one of which has the channels last; gates where each reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, 2)
        self.right = torch.nn.Linear(8, 5)

    def forward(self, x, *gates):
        x = self.stem(x).relu()
        left, right = [x * gate for gate in gates] or (x, x)
        left, right = self.left(left), self.right(right.movedim(1, -1)).movedim(-1, 1)
        return left.mean((2, 3)) + right.square().mean((2, 3))


def test_statistics_are_of_one_reader_at_a_time() -> None:
    """Of any net, against the slope of the loss with a gate per image where the reader reads."""
    net = Forked()
    images, labels = torch.randn(6, 3, 5, 5), torch.arange(6) % 5
    data = read_batches(zip(images.split(2), labels.split(2), strict=True), needs_labels=True)
    gates = [torch.ones(6, 8, 1, 1, requires_grad=True) for _ in range(2)]
    loss = torch.nn.functional.cross_entropy(net(images, *gates), labels, reduction="sum")
    maps = net.stem(images).relu().mean((0, 2, 3))
    gradients = collect(net, ["left", "right"], data, Gradients)
    activations = collect(net, ["left", "right"], data, Activations)
    for name, slopes in zip(("left", "right"), torch.autograd.grad(loss, gates), strict=True):
        torch.testing.assert_close(
            gradients[name].taylor, slopes.abs().mean((0, 2, 3)), check_dtype=False
        )
        expected = slopes.square().mean((0, 2, 3)).double() / 2
        torch.testing.assert_close(gradients[name].fisher, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(activations[name].activation, maps, check_dtype=False)
    assert not images.requires_grad and all(p.grad is None for p in net.parameters())
