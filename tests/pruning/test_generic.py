"""Other CNNs: the ratio is met, the pruned net equals the masked one, and refusals say why."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models as zoo
from oracle import randomise_
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning.generic import prune_cnn

X = torch.zeros(1, 3, 64, 64)


def vgg() -> nn.Module:
    """vgg16_bn, its 120 million parameters of linear layers left out."""
    net = zoo.vgg.make_layers(zoo.vgg.cfgs["D"], batch_norm=True)
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 5))


class Shuffled(nn.Module):
    """Reorders channels by a view, which torch-pruning cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(self.norm2(self.second(x)).mean((2, 3)))


class UNet(nn.Module):
    """A transposed conv, a concatenation, and one net's output that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.skip = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4))
        self.side, self.out = nn.Conv2d(10, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        side = self.side(torch.cat([self.up(self.down(x)), self.skip(x)], 1))
        return {"out": self.out(side.relu()), "side": side}


NETS = {
    "resnet18": lambda: zoo.resnet18(num_classes=5),
    "vgg16_bn": vgg,
    "mobilenet_v2": lambda: zoo.mobilenet_v2(num_classes=5),
}


def resnet(seed: int = 0) -> nn.Module:
    return randomise_(zoo.resnet18(num_classes=5), seed)


def counted(net: nn.Module, unit: str) -> float:
    """Parameters, or the multiply-adds that PyTorch counts."""
    if unit == "params":
        return sum(p.numel() for p in net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(net).eval()(X)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("name", NETS)
def test_half_goes_and_the_net_still_trains(name, unit, scope) -> None:
    net = randomise_(NETS[name](), 1)
    before = copy.deepcopy(net.state_dict())
    small = prune_cnn(net, 0.5, unit=unit, scope=scope, example_inputs=X)
    removed = 1 - counted(small, unit) / counted(net, unit)
    assert 0.5 <= removed < 0.53
    assert net.state_dict().keys() == small.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(m.training == small.get_submodule(n).training for n, m in net.named_modules())
    if scope == "local":
        return
    out = small.train()(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 5)
    out.square().mean().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("criterion", ["bn_scale", "l1", "l2", "random"])
def test_pruned_equals_masked_on_a_resnet(criterion) -> None:
    """The oracle knows resnets: which norm's channels each conv reads, recognised by their bias."""
    net = resnet().double().eval()
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64).double())
    small = prune_cnn(net, 0.5, criterion=criterion, example_inputs=X.double(), seed=3)
    dense, norms = copy.deepcopy(net), dict(net.named_modules())

    def mask(reader: str, norm: str) -> None:
        kept = torch.isin(norms[norm].bias, small.get_submodule(norm).bias).double()
        assert int(kept.sum()) == small.get_submodule(norm).num_features
        shape = (-1,) if reader == "fc" else (-1, 1, 1)
        dense.get_submodule(reader).register_forward_pre_hook(
            lambda _, args: args[0] * kept.reshape(shape)
        )

    stream = "bn1"
    for stage in range(1, 5):
        for block in (f"layer{stage}.0", f"layer{stage}.1"):
            mask(f"{block}.conv1", stream)
            mask(f"{block}.conv2", f"{block}.bn1")
            if f"{block}.downsample.0" in norms:
                mask(f"{block}.downsample.0", stream)
            stream = f"{block}.bn2"
    mask("fc", stream)
    x = torch.randn(2, 3, 64, 64).double()
    torch.testing.assert_close(small(x), dense(x))
    assert small(x).std() > 0


def test_bn_scale_cuts_the_smallest_scales() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
    gamma = torch.tensor([0.1, -5, 0.2, 3, 1, 0.3, -2, 0.4])
    net[1].weight.data = gamma.clone()
    small = prune_cnn(net, 0.5, example_inputs=torch.zeros(1, 3, 2, 2))
    assert small[1].weight.tolist() == gamma[[1, 3, 4, 6]].tolist()
    assert torch.equal(small[3].weight, net[3].weight.view(2, 8, 4)[:, [1, 3, 4, 6]].flatten(1))


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_are_of_what_makes_and_reads_a_channel(criterion) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    made, read = net[0].weight.flatten(1), net[2].weight.transpose(0, 1).flatten(1)
    norm = torch.linalg.vector_norm(torch.cat([made, read], 1), int(criterion[1]), dim=1)
    kept = norm.topk(3).indices.sort().values
    small = prune_cnn(net, 0.5, criterion=criterion, example_inputs=torch.zeros(1, 2, 4, 4))
    assert torch.equal(small[0].weight, net[0].weight[kept])


def test_taylor_keeps_what_the_loss_needs() -> None:
    """Against the definition: the loss's slope with a gate on each channel, at 1."""
    net = randomise_(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 4, 1),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        5,
    ).eval()
    data = [(torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(2)]
    want = torch.zeros(8)
    for x, y in data:
        gate = torch.ones(1, 8, 1, 1, requires_grad=True)
        loss = nn.functional.cross_entropy(net[4:](net[:4](x) * gate), y)
        want += torch.autograd.grad(loss, gate)[0].abs().flatten()
    small = prune_cnn(
        net, 0.3, criterion="taylor", calibration=data, example_inputs=data[0][0], scope="local"
    )
    kept = want.topk(small[0].out_channels).indices.sort().values
    assert torch.equal(small[0].weight, net[0].weight[kept])
    assert all(p.grad is None for p in net.parameters())


def test_grouped_convs_lose_equally_from_each_group() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 2, 1),
    )  # fmt: skip
    small = prune_cnn(randomise_(net, 0), 0.4, example_inputs=torch.zeros(1, 3, 8, 8))
    grouped = small[3]
    assert grouped.groups == 4
    assert grouped.in_channels % 4 == grouped.out_channels % 4 == 0
    assert grouped.in_channels + grouped.out_channels <= 24
    assert small(torch.zeros(1, 3, 8, 8)).shape == net(torch.zeros(1, 3, 8, 8)).shape


def test_transposed_convs_and_outputs_that_are_read_again() -> None:
    x = torch.zeros(1, 3, 8, 8)
    net = randomise_(UNet(), 0)
    small = prune_cnn(net, 0.5, criterion="l2", example_inputs=x)
    assert {k: v.shape for k, v in small(x).items()} == {k: v.shape for k, v in net(x).items()}
    assert small.up[0].in_channels < 8 or small.up[0].out_channels < 6


def test_what_is_protected_stays() -> None:
    net = resnet()
    small = prune_cnn(net, 0.3, protect=["layer1.0", "fc", "layer2.?.conv1"], example_inputs=X)
    for name in ("conv1", "layer1.0.conv1", "layer1.1.conv2", "layer4.1.conv2", "layer2.0.conv1"):
        assert small.get_submodule(name).out_channels == net.get_submodule(name).out_channels
    assert small.fc.weight.shape == net.fc.weight.shape
    assert small.layer1[1].conv1.out_channels < 64


def test_widths_are_multiples_and_no_smaller_than_asked() -> None:
    small = prune_cnn(
        resnet(), 0.6, unit="macs", round_to=8, min_channels=20, example_inputs=X, criterion="l1"
    )
    widths = {m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(w % 8 == 0 and w >= 24 for w in widths)
    assert min(widths) < 64


def test_flags_and_memory_format_stay() -> None:
    net = resnet().to(memory_format=torch.channels_last)
    net.layer1.requires_grad_(False)
    net.layer2.eval()
    with torch.no_grad():
        small = prune_cnn(net, 0.5, example_inputs=X)
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert not small.layer2[0].bn1.training and small.layer3[0].bn1.training
    assert small.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is not b for a, b in zip(small.parameters(), net.parameters(), strict=True))


def test_the_seed_decides_what_is_random() -> None:
    net, options = resnet(), {"criterion": "random", "scope": "local", "example_inputs": X}
    one, same, other = (prune_cnn(net, 0.5, seed=s, **options).conv1.weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape == other.shape and not torch.equal(one, other)


LABELLED = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 9]))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0.0}, r"pruning_ratio is 0.0; it must lie in \(0, 1\)"),
        ({"pruning_ratio": 50}, r"did you mean 0.5\?"),
        ({"pruning_ratio": float("nan")}, "pruning_ratio is nan"),
        ({"criterion": "l3"}, "criterion 'l3' is unknown; choose from bn_scale, l1, l2"),
        ({"unit": "flops"}, "unit 'flops' is unknown; choose from channels, params, macs"),
        ({"scope": "here"}, "scope 'here' is unknown; choose from global, local"),
        ({"min_channels": 0}, "min_channels is 0; it must be an integer of at least 1"),
        ({"protect": ["layer9"]}, "'layer9' matches no layer; names look like conv1, bn1"),
        ({"protect": "fc"}, r"is one string; give a list, \['fc'\]"),
        ({"protect": ["*"]}, r"cannot bring channels from .* allow is .* \(0.0% fewer\)"),
        ({"pruning_ratio": 0.9, "min_channels": 60}, "cannot bring channels .* ask for less"),
        ({"example_inputs": None}, "example_inputs is missing: give a batch"),
        ({"example_inputs": torch.zeros(1, 5, 64, 64)}, "cannot trace the model .* 5 channels"),
        ({"criterion": "taylor"}, "'taylor' needs labels: give calibration="),
        ({"criterion": "taylor", "calibration": [X]}, "needs labels: give calibration batches"),
        ({"criterion": "taylor", "calibration": LABELLED}, "labels below the number of classes"),
        ({"calibration": [X]}, "calibration has no effect: criterion 'bn_scale'"),
    ],
)
def test_requests_that_cannot_be_met(options, message) -> None:
    net = resnet()
    ratio = options.pop("pruning_ratio", 0.5)
    with pytest.raises(PruningError, match=message):
        prune_cnn(net, ratio, **{"example_inputs": X, **options})


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))


def broken() -> nn.Module:
    net = resnet()
    net.layer1[0].bn1.weight.data[3] = torch.nan
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.VisionTransformer(64, 16, 1, 2, 8, 16), "is attention .* CNNs only"),
        (lambda: zoo.swin_t(), r"is attention \(ShiftedWindowAttention\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "Sequential has no convolution"),
        (lambda: densenet([1], 4), "DenseNet of prune_dn; use prune"),
        (lambda: nn.Conv2d(3, 4, 1), "no channels .* reaches an output of the net"),
        (plain, "no batch norm with a scale on the channels of .* choose l1, l2"),
        (Shuffled, r"outputs of first depends on their number or order .* protect=\['first'\]"),
        (broken, "scores of layer1.0.conv. are not finite"),
    ],
)
def test_models_that_are_refused(make, message) -> None:
    with pytest.raises(PruningError, match=message):
        prune_cnn(make(), 0.3, example_inputs=X)


def test_a_shuffled_net_prunes_around_the_protected_layer() -> None:
    small = prune_cnn(Shuffled(), 0.2, protect=["first"], example_inputs=X)
    assert small.first.out_channels == 8 and small.second.out_channels < 6
