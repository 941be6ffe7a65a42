"""Other CNNs: the ratio is met, the pruned net equals the masked one, and refusals say why."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torchvision.models as zoo
from oracle import randomise_
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prune_dn
from prune_dn import prune
from prune_dn.errors import ConversionError, PruneDNError, PruningError
from prune_dn.pruning import CRITERIA

X = torch.zeros(1, 3, 64, 64)


def vgg() -> nn.Module:
    """vgg16_bn, its 120 million parameters of linear layers left out."""
    net = zoo.vgg.make_layers(zoo.vgg.cfgs["D"], batch_norm=True)
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 5))


class Shuffled(nn.Module):
    """Reorders channels by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(self.norm2(self.second(x)).mean((2, 3)))


class Forked(nn.Module):
    """Two convs read the same maps; gates stand where each reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, stride=2)
        self.head = nn.Linear(64 + 16, 3)

    def forward(self, x, *gates):
        x = self.stem(x).relu()
        read = [x * gate for gate in gates] or [x, x]
        maps = [self.left(read[0]), self.right(read[1])]
        return self.head(torch.cat([m.flatten(1) for m in maps], 1))


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
    """Norm channels, parameters, or the multiply-adds that PyTorch counts."""
    if unit == "channels":
        return sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    if unit == "params":
        return sum(p.numel() for p in net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(net).eval()(X)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("unit", "scope"),
    [("channels", "global"), ("params", "global"), ("macs", "global"), ("macs", "local")],
)
@pytest.mark.parametrize("name", NETS)
def test_half_goes_and_the_net_still_trains(name, unit, scope) -> None:
    net = randomise_(NETS[name](), 1)
    before = copy.deepcopy(net.state_dict())
    small = prune(net, 0.5, unit=unit, scope=scope, input_size=64)
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


def read_by(name: str, net: nn.Module) -> dict[str, str]:
    """Of each conv and linear layer a norm whose channels it reads, from the papers' figures."""
    names, found = dict(net.named_modules()), {}
    if name == "vgg16_bn":
        convs = [n for n, m in names.items() if isinstance(m, nn.Conv2d)]
        norms = [n for n, m in names.items() if isinstance(m, nn.BatchNorm2d)]
        return dict(zip([*convs[1:], "3"], norms, strict=True))
    if name == "resnet18":
        stream = "bn1"
        for block in (f"layer{stage}.{n}" for stage in range(1, 5) for n in range(2)):
            found |= {f"{block}.conv1": stream, f"{block}.conv2": f"{block}.bn1"}
            if f"{block}.downsample.0" in names:
                found[f"{block}.downsample.0"] = stream
            stream = f"{block}.bn2"
        return found | {"fc": stream}
    found, stream = {"features.1.conv.1": "features.1.conv.0.1"}, "features.1.conv.2"
    for block in range(2, 18):  # expand, filter by depth, project
        found[f"features.{block}.conv.0.0"] = stream
        found[f"features.{block}.conv.2"] = f"features.{block}.conv.1.1"
        stream = f"features.{block}.conv.3"
    return found | {"features.18.0": stream, "classifier.1": "features.18.1"}


@pytest.mark.parametrize("criterion", ["bn_scale", "l2", "random"])
@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_masked(name, criterion) -> None:
    """Which channels stayed is recognised by their norm's bias, all of which differ."""
    net = randomise_(NETS[name](), 0).double().eval()
    small = prune(net, 0.5, criterion=criterion, input_size=64, seed=3)
    dense, norms = copy.deepcopy(net), dict(net.named_modules())
    x = torch.randn(2, 3, 64, 64).double()
    for reader, norm in read_by(name, net).items():
        kept = torch.isin(norms[norm].bias, small.get_submodule(norm).bias).double()
        assert 0 < int(kept.sum()) == small.get_submodule(norm).num_features
        layer = dense.get_submodule(reader)
        if isinstance(layer, nn.Conv2d):
            kept = kept[:, None, None]
        elif layer.in_features > len(kept):
            kept = kept.repeat_interleave(layer.in_features // len(kept))
        layer.register_forward_pre_hook(lambda _, args, kept=kept: args[0] * kept)
    torch.testing.assert_close(small(x), dense(x))
    assert small(x).std() > 0
    assert not torch.allclose(small(x), net(x))


def test_bn_scale_cuts_the_smallest_scales() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
    gamma = torch.tensor([0.1, -5, 0.2, 3, 1, 0.3, -2, 0.4])
    net[1].weight.data = gamma.clone()
    small = prune(net, 0.5, input_size=2)
    assert small[1].weight.tolist() == gamma[[1, 3, 4, 6]].tolist()
    assert torch.equal(small[3].weight, net[3].weight.view(2, 8, 4)[:, [1, 3, 4, 6]].flatten(1))


def test_bn_scale_leaves_what_has_no_norm() -> None:
    net = zoo.mobilenet_v3_small(num_classes=5)
    small = prune(net, 0.4, unit="macs", input_size=64)
    squeeze = small.features[1].block[1]
    assert squeeze.fc1.out_channels == net.features[1].block[1].fc1.out_channels
    small = prune(net, 0.4, unit="macs", input_size=64, criterion="l2", scope="local")
    assert small.features[1].block[1].fc1.out_channels < squeeze.fc1.out_channels


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_are_of_what_reads_a_channel(criterion) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    small = prune(net, 0.4, criterion=criterion, unit="params", input_size=8)
    read = net[2].weight.transpose(0, 1).flatten(1)
    norms = torch.linalg.vector_norm(read, int(criterion[1]), dim=1)
    kept = norms.topk(small[0].out_channels).indices.sort().values
    assert 2 < len(kept) < 6
    assert torch.equal(small[0].weight, net[0].weight[kept])


def test_a_linear_layer_reads_a_flattened_map_like_a_conv_of_its_size() -> None:
    """And a transposed conv like the conv that it transposes, a grouped one like its parts."""
    conv = nn.Conv2d(6, 4, (2, 3))
    flat = nn.Linear(36, 4)
    flat.weight.data = conv.weight.data.flatten(1)
    across = nn.ConvTranspose2d(6, 4, (2, 3))
    across.weight.data = conv.weight.data.transpose(0, 1)
    stem = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    for criterion in ("l1", "l2", "fpgm", "lamp"):
        kept = [
            prune(nn.Sequential(*stem, *end), 0.5, criterion=criterion, input_size=(2, 3))[0].weight
            for end in ([conv], [nn.Flatten(), flat], [across])
        ]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("criterion", ["activation", "taylor", "fisher"])
def test_statistics_add_up_over_readers(criterion) -> None:
    """The definitions, per image, with a gate where each of two readers takes the same maps."""
    net = randomise_(Forked(), 5).eval()
    data = [(torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(2)]
    want = torch.zeros(8)
    for x, y in [(x[None], y[None]) for xs, ys in data for x, y in zip(xs, ys, strict=True)]:
        gates = [torch.ones(1, 8, 1, 1, requires_grad=True) for _ in range(2)]
        loss = nn.functional.cross_entropy(net(x, *gates), y)
        for gradient in torch.autograd.grad(loss, gates):
            slope = gradient.flatten()
            seen = net.stem(x).relu().abs().mean((0, 2, 3))
            want += {"activation": seen, "taylor": slope.abs(), "fisher": slope**2}[criterion]
    small = prune(
        net, 0.3, criterion=criterion, compensate="none", calibration=data, protect=["head"]
    )
    assert 3 < small.stem[0].out_channels < 8
    kept = want.topk(small.stem[0].out_channels).indices.sort().values
    assert torch.equal(small.stem[0].weight, net.stem[0].weight[kept])
    assert all(p.grad is None for p in net.parameters())
    assert not any(x.requires_grad for x, _ in data)


def test_a_criterion_of_ones_own_serves_all_nets() -> None:
    net = resnet()

    @prune_dn.register_criterion("largest_weight")
    def largest(reading):
        return reading.weight.abs().amax(dim=(0, 2, 3))

    try:
        small = prune(net, 0.5, criterion="largest_weight", scope="local", input_size=64)
    finally:
        del CRITERIA["largest_weight"]
    kept = net.layer1[0].conv2.weight.abs().amax(dim=(0, 2, 3)).topk(32).indices.sort().values
    assert torch.equal(small.layer1[0].bn1.bias, net.layer1[0].bn1.bias[kept])


def test_grouped_convs_lose_equally_from_each_group() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 2, 1),
    )  # fmt: skip
    small = prune(randomise_(net, 0), 0.4, input_size=8)
    grouped = small[3]
    assert grouped.groups == 4
    assert grouped.in_channels % 4 == grouped.out_channels % 4 == 0
    assert grouped.in_channels + grouped.out_channels <= 24
    assert small(torch.zeros(1, 3, 8, 8)).shape == net(torch.zeros(1, 3, 8, 8)).shape


def test_transposed_convs_and_outputs_that_are_read_again() -> None:
    x = torch.zeros(1, 3, 8, 8)
    net = randomise_(UNet(), 0)
    small = prune(net, 0.5, criterion="l2", unit="params", input_size=8)
    assert {k: v.shape for k, v in small(x).items()} == {k: v.shape for k, v in net(x).items()}
    assert small.up[0].in_channels < 8 or small.up[0].out_channels < 6


def test_what_is_protected_stays() -> None:
    net = resnet()
    small = prune(net, 0.3, protect=["layer1.0", "fc", "layer2.?.conv1"], input_size=64)
    for name in ("conv1", "layer1.0.conv1", "layer1.1.conv2", "layer4.1.conv2", "layer2.0.conv1"):
        assert small.get_submodule(name).out_channels == net.get_submodule(name).out_channels
    assert small.fc.weight.shape == net.fc.weight.shape
    assert small.layer1[1].conv1.out_channels < 64


def test_widths_are_multiples_and_no_smaller_than_asked() -> None:
    small = prune(
        resnet(), 0.6, unit="macs", round_to=8, min_channels=20, input_size=64, criterion="l1"
    )
    widths = {m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(w % 8 == 0 and w >= 24 for w in widths)
    assert min(widths) < 64


def test_flags_and_memory_format_stay() -> None:
    net = resnet().to(memory_format=torch.channels_last)
    net.layer1.requires_grad_(False)
    net.layer2.eval()
    with torch.no_grad():
        small = prune(net, 0.5, input_size=64)
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert not small.layer2[0].bn1.training and small.layer3[0].bn1.training
    assert small.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is not b for a, b in zip(small.parameters(), net.parameters(), strict=True))


def test_the_seed_decides_what_is_random() -> None:
    net, options = resnet(), {"criterion": "random", "scope": "local", "input_size": 64}
    one, same, other = (prune(net, 0.5, seed=s, **options).conv1.weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape == other.shape and not torch.equal(one, other)


def test_a_shuffled_net_loses_equally_from_each_half() -> None:
    net = randomise_(Shuffled(), 0)
    small = prune(net, 0.3, input_size=64)
    left = torch.isin(net.norm.bias, small.norm.bias)
    assert 0 < left.sum() < 8 and torch.equal(left[:4], left[4:])


def test_a_pruned_net_goes_through_torchs_own_files(tmp_path) -> None:
    small = prune(resnet(), 0.5, unit="macs", input_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(again(x), small(x))
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
    assert prune_dn.recalibrate_batch_norm_(small, [x]) == 1
    prune_dn.save(small, tmp_path / "small.safetensors", example_inputs=x)
    loaded = prune_dn.load(tmp_path / "small.safetensors", model=resnet())
    assert torch.equal(loaded(x), small(x))


def test_pruning_again_goes_on_from_there() -> None:
    once = prune(resnet(), 0.5, unit="macs", input_size=64)
    twice = prune(once, 0.5, unit="macs", input_size=64)
    assert 0.5 <= 1 - counted(twice, "macs") / counted(once, "macs") < 0.53


LABELLED = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 9]))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0.0}, "pruning_ratio is 0: nothing would be cut"),
        ({"pruning_ratio": 50}, r"did you mean 0.5\?"),
        ({"criterion": "l3"}, "criterion 'l3' is unknown; choose from activation, bn_scale"),
        (
            {"criterion": "reconstruction", "calibration": [X]},
            "outputs of the model .* loss='softmax'",
        ),
        (
            {"criterion": "mfm_win_rate", "calibration": [X]},
            "judges only what competes, and this net has no MFM",
        ),
        ({"unit": "flops"}, "unit 'flops' is unknown; choose from channels, params, macs"),
        ({"scope": "here"}, "scope 'here' is unknown; choose from global, local"),
        ({"units": ["edge"]}, r"units=\['edge'\]: this net has none of them"),
        ({"compensate": "mean"}, "compensate='mean' needs calibration images: give"),
        ({"min_channels": 0}, "min_channels is 0; it must be an integer from 1 to"),
        (
            {"protect": ["layer9"]},
            "'layer9' matches no module; names look like conv1, layer1.0.conv1",
        ),
        ({"protect": "fc"}, r"is one string; give a list, \['fc'\]"),
        ({"protect": ["*"]}, r"protect=\['\*'\] leaves no channels of this ResNet"),
        ({"pruning_ratio": 0.9, "min_channels": 60}, "cannot bring channels .* ask for less"),
        ({"input_size": None}, "size of images is needed for a ResNet: give input_size in pixels"),
        ({"input_size": 0}, "image_size is 0; give pixels"),
        ({"criterion": "taylor"}, "'taylor' needs calibration images: give calibration="),
        ({"criterion": "taylor", "calibration": [X]}, "needs labels: give calibration batches"),
        ({"criterion": "taylor", "calibration": LABELLED}, "labels must be integers from 0 to 4"),
        (
            {"criterion": "bn_scale", "compensate": "none", "calibration": [X]},
            "calibration has no effect: criterion 'bn_scale'",
        ),
    ],
)
def test_requests_that_cannot_be_met(options, message) -> None:
    ratio = options.pop("pruning_ratio", 0.5)
    with pytest.raises(PruneDNError, match=message):
        prune(resnet(), ratio, **{"input_size": 64, **options})


def broken() -> nn.Module:
    net = resnet()
    net.layer1[0].bn1.weight.data[3] = torch.nan
    return net


PLAIN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (zoo.swin_t, {}, PruningError, "transformer .* is a ShiftedWindowAttention"),
        (
            lambda: zoo.VisionTransformer(64, 16, 1, 2, 8, 16),
            {},
            PruningError,
            "this VisionTransformer is a transformer .* only CNNs can be pruned",
        ),
        (lambda: nn.Linear(3, 2), {}, PruningError, "Linear has no convolution: only CNNs"),
        (
            lambda: nn.Conv2d(3, 4, 1),
            {"unit": "params", "criterion": "l1"},
            PruningError,
            "no channels of this Conv2d can be cut: .* stays: an output of the net",
        ),
        (
            lambda: PLAIN,
            {"criterion": "bn_scale"},
            PruningError,
            "no norm with a scale is on channels of this Sequential that can go; choose",
        ),
        (broken, {}, PruningError, "^layer1.0.bn1.weight holds 1 NaN or infinite value"),
        (lambda: nn.DataParallel(resnet()), {}, ConversionError, "unwrap it: pass model.module"),
    ],
)
def test_models_that_are_refused(make, options, error, message) -> None:
    with pytest.raises(error, match=message):
        prune(make(), 0.3, **{"input_size": 64, **options})


def test_a_net_without_norms_is_cut_by_l2_and_its_filters_count() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 3))
    with torch.no_grad():  # the last conv reads its first channels most, whoever makes them
        net[2].weight.copy_(torch.arange(8, 0, -1).reshape(1, 8, 1, 1).expand(6, 8, 3, 3))
        net[3].weight.copy_(torch.arange(6, 0, -1).reshape(1, 6, 1, 1).expand(2, 6, 3, 3))
    assert prune_dn.count(net, 16).channels == 8 + 6 + 2
    small = prune(net, 0.5, input_size=16)
    assert prune_dn.count(small, 16).channels == 8
    assert torch.equal(small[0].weight, net[0].weight[: small[0].out_channels])
    assert torch.equal(small[2].bias, net[2].bias[: small[2].out_channels])
    by_name = prune(net, 0.5, criterion="l2", input_size=16)
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), by_name.parameters(), strict=True)
    )


def test_an_image_that_the_net_cannot_take() -> None:
    with pytest.raises(PruningError, match=r"does not run on inputs of shape \(1, 3, 5, 5\)"):
        prune(zoo.alexnet(), 0.3, unit="macs", criterion="l1", input_size=5)


def test_a_plan_that_leaves_groups_unequal_is_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=4),
        nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    plan = prune_dn.make_plan(net, 0.3, unit="macs", input_size=6)
    assert prune_dn.apply_plan(net, plan)
    odd = dataclasses.replace(plan, keep_indices={"0": tuple(range(11))})
    with pytest.raises(
        PruningError, match=r"keep_indices of 0 leave \[3, 3, 3, 2\] channels in the 4"
    ):
        prune_dn.apply_plan(net, odd)


def test_what_cannot_be_met_names_what_stays() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8]), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    with pytest.raises(
        PruningError, match=r"cannot bring macs from .* \(0 stays: a layer norm takes"
    ):
        prune(net, 0.9, unit="macs", input_size=8)
    whole = sum(p.numel() for p in net.parameters())
    with pytest.raises(PruningError, match=f"cannot bring params from {whole:,} down to"):
        prune(net, 0.95, unit="params", input_size=8)


def test_a_plan_is_data_for_any_net(tmp_path) -> None:
    net = resnet()
    plan = prune_dn.make_plan(net, 0.5, unit="macs", input_size=64)
    plan.save(tmp_path / "plan.json")
    again = prune_dn.Plan.load(tmp_path / "plan.json")
    assert again == plan
    small, other = prune_dn.apply_plan(net, again), prune(net, 0.5, unit="macs", input_size=64)
    mine, theirs = small.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() | theirs.keys())
    assert plan.achieved["after"]["macs"] == counted(small, "macs")
    rows = {row["name"]: row for row in plan.layers}
    assert rows["layer1.0.conv1"]["kind"] == "bottleneck" and rows["conv1"]["kind"] == "stream"
    assert rows["layer1.0.conv1"]["after"] == small.layer1[0].conv1.out_channels
    with pytest.raises(PruningError, match="this plan was made for a ResNet of another shape"):
        prune_dn.apply_plan(small, plan)
    with pytest.raises(PruningError, match="keep_indices name 'conv9'"):
        dataclasses.replace(plan, keep_indices={"conv9": (0,)})
    with pytest.raises(PruningError, match="different integers from 0 to"):
        dataclasses.replace(plan, keep_indices={"layer1.0.conv1": (0, 99)})
