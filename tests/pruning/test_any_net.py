"""Reconstruction and refit on nets of every kind: residual, depthwise, U-shaped, 3-D, flattened, MFM."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models as zoo
from oracle import randomise_
from other_nets import Layer
from torch import nn

import prune_dn
from prune_dn import prune
from prune_dn.errors import PruningError
from prune_dn.graph.selecting import SelectingBatchNorm2d
from prune_dn.models import densenet, light_cnn_9
from prune_dn.pruning import apply_plan, make_plan


class UNet(nn.Module):
    """Skip connections out of the encoder, a transposed conv, a prediction per pixel."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        conv, norm, up = (
            (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d)
            if dimensions == 2
            else (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d)
        )
        self.first = nn.Sequential(conv(3, 12, 3, padding=1), norm(12), nn.ReLU())
        self.down = nn.Sequential(conv(12, 16, 3, 2, 1), norm(16), nn.ReLU())
        self.up = up(16, 12, 2, 2)
        self.last = nn.Sequential(conv(24, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())
        self.out = conv(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.out(self.last(torch.cat([x, self.up(self.down(x))], 1)))


class Residual(nn.Module):
    """Two stages of residual blocks; a strided 1x1 conv leads from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.Sequential(
            zoo.resnet.BasicBlock(16, 16),
            zoo.resnet.BasicBlock(
                16, 24, 2, nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
            ),
            zoo.resnet.BasicBlock(24, 24),
        )
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


def flat() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 12, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def maps_first() -> nn.Module:
    layers = [Layer(12 + 8 * i) for i in range(3)]
    between = nn.BatchNorm2d(36), nn.Conv2d(36, 18, 1, bias=False), nn.AvgPool2d(2)  # no ReLU
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), *layers, *between, Layer(18), Layer(26),
        nn.BatchNorm2d(34), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(34, 4),
    )  # fmt: skip


def group_normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1),
        nn.GroupNorm(6, 24), nn.ReLU(), nn.Conv2d(24, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


NETS = {
    "maps first": maps_first,
    "group norm": group_normed,
    "resnet": Residual,
    "mobilenet": lambda: zoo.mobilenet_v2(num_classes=4, width_mult=0.25),
    "unet": UNet,
    "volumes": lambda: UNet(3),
    "flat": flat,
    "grouped": grouped,
    "wrapped densenet": lambda: nn.Sequential(densenet([2, 2], 8, stem="cifar", num_classes=4)),
    "light cnn": lambda: light_cnn_9(num_classes=4, image_size=32, widths=(16, 16, 24, 16, 16), embedding=16),
}  # fmt: skip


def images(name: str, seed: int) -> list[torch.Tensor]:
    """Smooth images, in float64 as the nets: neighbouring pixels, and so channels, say nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    if name == "volumes":
        coarse = torch.randn(4, 16, 3, 4, 4, 4, generator=generator)
        return [
            nn.functional.interpolate(x, size=(8, 8, 8), mode="trilinear") for x in coarse.double()
        ]
    coarse = torch.randn(4, 16, 1 if name == "light cnn" else 3, 8, 8, generator=generator)
    return [nn.functional.interpolate(x, size=(32, 32), mode="bilinear") for x in coarse.double()]


def settled(name: str) -> nn.Module:
    """A random net whose norms have the statistics of its images."""
    net = randomise_(NETS[name](), 0).double()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        prune_dn.recalibrate_batch_norm_(net, images(name, 1))
    return net.eval()


def distance(small: nn.Module, net: nn.Module, name: str) -> float:
    with torch.no_grad():
        pairs = [(small(x), net(x)) for x in images(name, 2)]
    return float(sum((a - b).square().sum() for a, b in pairs))


@pytest.mark.parametrize("name", NETS)
def test_a_refit_brings_the_answers_closer_on_images_it_did_not_see(name) -> None:
    net = settled(name)
    before = copy.deepcopy(net.state_dict())
    options = {
        "criterion": "reconstruction", "unit": "macs", "calibration": images(name, 1), "loss": "mse",
    }  # fmt: skip
    if name == "light cnn":
        options["protect"] = ["fc2"]
    cut = prune(net, 0.35, compensate="none", **options)
    small = prune(net, 0.35, compensate="least_squares", **options)
    assert {k: v.shape for k, v in cut.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in small.modules())
    assert distance(small, net, name) < 0.9 * distance(cut, net, name)


@pytest.mark.parametrize("name", ["resnet", "grouped", "flat"])
def test_reconstruction_loses_less_than_random_channels(name) -> None:
    net = settled(name)
    options = {"unit": "macs", "compensate": "least_squares", "calibration": images(name, 1)}
    ours = prune(net, 0.35, criterion="reconstruction", loss="mse", **options)
    random = [prune(net, 0.35, criterion="random", seed=s, **options) for s in range(3)]
    assert distance(ours, net, name) < min(distance(small, net, name) for small in random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_follow_the_nets_dtype(dtype) -> None:
    net = settled("grouped").to(dtype)
    options = {"unit": "macs", "calibration": images("grouped", 1), "loss": "mse"}
    cut, small = (
        prune(net, 0.35, criterion="reconstruction", compensate=how, **options)
        for how in ("none", "least_squares")
    )
    assert {p.dtype for p in small.parameters()} == {dtype}
    x = images("grouped", 2)[0].to(dtype)
    with torch.no_grad():
        off = [float((y(x) - net(x)).double().square().sum()) for y in (cut, small)]
    assert off[1] < off[0]


def test_means_alone_help_too() -> None:
    net = settled("resnet")
    options = {"criterion": "l2", "unit": "macs", "calibration": images("resnet", 1)}
    moved = prune(net, 0.3, compensate="mean", **options)
    cut = prune(net, 0.3, criterion="l2", unit="macs", input_size=32)
    assert distance(moved, net, "resnet") < distance(cut, net, "resnet")
    changed = {
        key
        for key, value in moved.state_dict().items()
        if not torch.equal(value, cut.state_dict()[key])
    }
    assert changed and all(k.endswith(("running_mean", "bias")) for k in changed)


def variant(change) -> nn.Module:
    net = zoo.DenseNet(8, (2, 2), 16, 2, num_classes=5)
    change(net)
    return randomise_(net, 0).double().eval()


def other_head(net: nn.Module) -> None:
    net.classifier = nn.Sequential(
        nn.Linear(32, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3), nn.Sigmoid()
    )


def no_head(net: nn.Module) -> None:
    net.classifier = nn.Identity()


def no_bias(net: nn.Module) -> None:
    net.classifier = nn.Linear(32, 1, bias=False)


def silu_and_two_pools(net: nn.Module) -> None:
    class Pools(nn.Module):
        def forward(self, x):
            return torch.cat([x.amax((2, 3), True), x.mean((2, 3), True)], 1)

    for name, module in list(net.features.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, key = name.rpartition(".")
            setattr(net.features.get_submodule(parent), key, nn.SiLU())
    net.features.add_module("pools", Pools())
    net.classifier = nn.Linear(64, 3)


def deep_stem(net: nn.Module) -> None:
    net.features.conv0 = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1, bias=False)
    )  # fmt: skip


def synchronised(net: nn.Module) -> None:
    net.features = nn.SyncBatchNorm.convert_sync_batchnorm(net.features)
    net.classifier = nn.Sequential(net.classifier, nn.Sigmoid())


def small_stem(net: nn.Module) -> None:
    net.features.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    net.features.pool0 = nn.Identity()


def no_pool(net: nn.Module) -> None:
    del net.features.pool0


VARIANTS = [
    *(
        other_head,
        no_head,
        no_bias,
        small_stem,
        no_pool,
        deep_stem,
        silu_and_two_pools,
        synchronised,
    )
]


@pytest.mark.parametrize("change", VARIANTS)
def test_variants_of_densenets_keep_their_class(change) -> None:
    net = variant(change)
    options = {"unit": "macs", "calibration": images("resnet", 1), "loss": "mse"}
    small = prune(net, 0.4, criterion="reconstruction", compensate="least_squares", **options)
    assert type(small) is zoo.DenseNet
    x = images("resnet", 2)[0]
    assert small(x).shape == net(x).shape
    assert prune_dn.count(small, 32).macs <= 0.6 * prune_dn.count(net, 32).macs
    cut = prune(net, 0.4, criterion="reconstruction", compensate="none", **options)
    assert distance(small, net, "resnet") < distance(cut, net, "resnet")
    plan = make_plan(net, 0.4, criterion="reconstruction", compensate="none", **options)
    planned, expected = apply_plan(net, plan).state_dict(), cut.state_dict()
    assert all(torch.equal(tensor, planned[name]) for name, tensor in expected.items())
    with pytest.raises(PruningError, match="this plan was made for a DenseNet of another shape"):
        apply_plan(zoo.DenseNet(8, (2, 2), 16, 2, num_classes=4), plan)


def test_a_variant_of_a_densenet_has_edges_too() -> None:
    model = randomise_(variant(other_head), 0)
    small = prune(model, 0.4, unit="macs", units=["edge"], criterion="l2", input_size=64)
    assert type(small) is type(model)
    assert sum(isinstance(m, SelectingBatchNorm2d) for m in small.modules()) > 2
    with pytest.raises(PruningError, match="size of images is needed"):
        prune(model, 0.4)


class Halves(nn.Module):
    """A conv whose first channels are added to those of one conv, the others to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.few, self.many = (nn.Conv2d(3, n, 3, padding=1) for n in (12, 4, 8))
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.head((self.whole(x) + torch.cat([self.few(x), self.many(x)], 1)).relu())


def test_parts_of_one_layer_are_cut_each_by_itself() -> None:
    net = randomise_(Halves(), 0)
    with torch.no_grad():
        for i, conv in enumerate((net.whole, net.few, net.many)):
            conv.bias.copy_(torch.arange(len(conv.bias)) + 100 * i)
    small = prune(net, 0.4, criterion="l2", unit="params", scope="local", input_size=16)
    left = torch.isin(net.whole.bias, small.whole.bias)
    assert left[:4].sum() == small.few.out_channels < 4
    assert left[4:].sum() == small.many.out_channels < 8
    assert torch.equal(small.few.bias, net.few.bias[left[:4]])
    assert torch.equal(small.many.bias, net.many.bias[left[4:]])
    assert prune_dn.count(small, 16).params <= 0.6 * prune_dn.count(net, 16).params
