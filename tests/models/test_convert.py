"""Foreign DenseNets give the same logits as ours; what is another net is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from oracle import randomise_
from strategies import pruned_configs
from timm.models.densenet import DenseNet as TimmDenseNet
from torch import nn

from prune_dn.errors import ConversionError
from prune_dn.models import BUILDERS, DenseNet, DenseNetConfig, densenet, densenet40
from prune_dn.models.convert import convert, from_state_dict
from prune_dn.pruning import prune

TorchvisionDenseNet = torchvision.models.DenseNet


def tiny_torchvision(**options: object) -> nn.Module:
    return randomise_(TorchvisionDenseNet(4, (2, 1), 6, bn_size=2, num_classes=5, **options), 0)


def tiny_timm(**options: object) -> nn.Module:
    return randomise_(TimmDenseNet(4, (2, 1), bn_size=2, num_classes=5, **options), 0)


def assert_same_logits(a: nn.Module, b: nn.Module, side: int = 64) -> None:
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=0, atol=1e-5)


# -- modules -------------------------------------------------------------------------------------


def test_weights_are_copied_or_shared() -> None:
    theirs = tiny_torchvision()
    for share in (False, True):
        ours = convert(theirs, share=share).state_dict()
        for name, tensor in theirs.state_dict().items():
            assert (tensor.data_ptr() == ours[name].data_ptr()) is share, name
    small = prune(theirs, 0.05, units=["bottleneck"]).state_dict()  # most tensors stay whole
    taken = {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    assert not taken & {tensor.data_ptr() for tensor in small.values()}


@pytest.mark.parametrize("make", [torchvision.models.densenet121, timm.models.densenet.densenet121])
def test_densenet121_gives_the_same_logits(make: Callable[[], nn.Module]) -> None:
    theirs = make()
    ours = convert(theirs)
    assert ours.config == BUILDERS["densenet121"]().config
    assert_same_logits(theirs, ours)


@pytest.mark.parametrize("name", ["densenet161", "densenet169", "densenet201"])
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_larger_ones_have_our_config(name: str, package: str) -> None:
    module = torchvision.models if package == "torchvision" else timm.models.densenet
    with torch.device("meta"):
        theirs, config = getattr(module, name)(), BUILDERS[name]().config
        ours = convert(theirs)
    assert ours.config == config
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("make", [tiny_torchvision, tiny_timm])
def test_everything_about_the_model_is_kept(make: Callable[..., nn.Module]) -> None:
    drop = {"drop_rate": 0.25} if make is tiny_torchvision else {"proj_drop_rate": 0.25}
    theirs = make(memory_efficient=True, **drop).double()
    theirs.eval()
    theirs.features.denseblock1.train()
    theirs.features.transition1.norm.train()
    theirs.features.conv0.weight.requires_grad_(False)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.05
    theirs.features.norm5.momentum = None
    before = copy.deepcopy(theirs.state_dict())
    ours = convert(theirs)
    assert ours.memory_efficient and ours.config.drop_rate == 0.25 and ours.config.norm_eps == 1e-3
    assert all(p.dtype == torch.float64 for p in ours.parameters())
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if name in modules:
            assert module.training == modules[name].training, name
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == (None if name == "features.norm5" else 0.05)
            assert module.eps == 1e-3
    assert ours.features.denseblock1.denselayer1.read.training and not ours.read.training
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["features.conv0.weight"]
    with torch.no_grad():  # copies: ours can change, theirs does not
        for tensor in ours.state_dict().values():
            tensor.zero_()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_dropout_falls_the_same() -> None:
    theirs = tiny_torchvision(drop_rate=0.5).train()
    ours = convert(theirs)
    x = torch.randn(2, 3, 64, 64)
    outputs = []
    for net in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(net(x))
    torch.testing.assert_close(*outputs)


def test_ours_is_returned_unchanged() -> None:
    net = densenet([1], 4, stem="cifar")
    assert convert(net) is net


def changed(path: str, module: nn.Module, base: Callable[[], nn.Module] = tiny_torchvision):  # type: ignore[no-untyped-def]
    def make() -> nn.Module:
        net = base()
        parent, _, leaf = path.rpartition(".")
        setattr(net.get_submodule(parent), leaf, module)
        return net

    return make


class Other(TorchvisionDenseNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(1)


def uneven_eps() -> nn.Module:
    net = tiny_torchvision()
    net.features.norm0.eps = 0.1
    return net


def uneven_drop() -> nn.Module:
    net = tiny_torchvision()
    net.features.denseblock1.denselayer2.drop_rate = 0.5
    return net


def compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return torch.compile(tiny_torchvision())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.DataParallel(tiny_torchvision()), "wrapped in DataParallel; unwrap it: pass model.module"),
        (compiled, "wrapped in OptimizedModule; unwrap it: pass model._orig_mod"),
        (lambda: nn.Linear(2, 2), "Linear is no DenseNet; pass a DenseNet of torchvision, timm or"),
        (lambda: {"a": 1}, "builtins.dict is no DenseNet; .* use from_state_dict"),
        (lambda: Other(4, (1,), 6), "Other changes the forward of torchvision"),
        (lambda: tiny_timm(stem_type="deep"), r"its stem has several convs \(features.conv0"),
        (lambda: tiny_timm(aa_layer=timm.layers.BlurPool2d), "features.pool0 is Sequential, not"),
        (lambda: tiny_timm(act_layer="silu"), "features.norm0.act is SiLU, not ReLU"),
        (lambda: tiny_timm(global_pool="max"), "global_pool is 'max', not 'avg'"),
        (lambda: tiny_timm(global_pool="catavgmax"), "global_pool is 'catavgmax', not 'avg'"),
        (lambda: tiny_timm(norm_layer="groupnorm1"), "features.norm0 is GroupNorm1Act, not BatchNorm2d"),
        (lambda: tiny_timm(drop_rate=0.5), "head_drop has p 0.5, not 0.0"),
        (changed("features.pool0", nn.Identity()), "features.pool0 is Identity, not MaxPool2d"),
        (changed("features.pool0", nn.MaxPool2d(3, 2)), "features.pool0 has padding 0, not 1"),
        (changed("features.conv0", nn.Conv2d(3, 6, 7, 1, 3, bias=False)), r"conv0 has stride \(1, 1\), not \(2, 2\)"),
        (changed("features.conv0", nn.Conv2d(3, 6, 3, 1, 1, bias=False)), "the stem is a 3x3 conv with features.norm0"),
        (changed("features.conv0", nn.Conv2d(3, 6, 7, 2, 3)), "features.conv0.bias is unexpected"),
        (changed("classifier", nn.Identity()), "classifier is Identity, not Linear"),
        (changed("classifier", nn.Linear(11, 5, bias=False)), "classifier.bias is missing"),
        (changed("features.norm5", nn.BatchNorm2d(11, affine=False)), "features.norm5.weight is missing"),
        (changed("features.extra", nn.Sigmoid()), r"features.extra \(Sigmoid\) is unknown"),
        (uneven_eps, r"norms with different eps \(1e-05, 0.1\)"),
        (uneven_drop, r"layers with different dropout \(0.0, 0.5\)"),
    ],
)  # fmt: skip
def test_what_is_another_net_is_refused(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        convert(make())


# -- state dicts ---------------------------------------------------------------------------------


@given(pruned_configs(edges=False, mfm=False))
def test_state_dict_of_any_pruned_net(config: DenseNetConfig) -> None:
    net = randomise_(DenseNet(config), 1)
    again = from_state_dict(net.state_dict())
    for field in ("num_init_features", "num_classes", "in_channels", "stem", "transitions"):
        assert getattr(again.config, field) == getattr(config, field)
    blocks = [[(x.name, x.out_channels, x.bottleneck) for x in b] for b in config.blocks]
    found = [[(x.name, x.out_channels, x.bottleneck) for x in b] for b in again.config.blocks]
    assert found == blocks
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].data_ptr() != tensor.data_ptr() or not tensor.numel()


def old_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        for part in ("norm1", "conv1", "norm2", "conv2"):
            if "denselayer" in key:
                key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        out[key] = value
    return out


@pytest.mark.parametrize(
    "disguise",
    [
        old_keys,
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {k.replace("features.", "features._orig_mod."): v for k, v in s.items()},
        lambda s: {"state_dict": s, "epoch": 3, "best": 0.9},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {**s, "total_ops": torch.zeros(1), "features.norm5.total_params": torch.ones(1)},
        lambda s: dict(reversed(list(s.items()))),
    ],
)
def test_disguises(disguise: Callable[[dict[str, torch.Tensor]], dict[str, object]]) -> None:
    theirs = TorchvisionDenseNet(2, (2, 11), 4, bn_size=2, num_classes=3)  # 11: 10 sorts after 9
    randomise_(theirs, 0)
    assert_same_logits(theirs, from_state_dict(disguise(dict(theirs.state_dict()))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    net = densenet([1], 4, stem="cifar", num_classes=2).to(dtype)
    again = from_state_dict(net.state_dict())
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.features.norm5.num_batches_tracked.dtype == torch.int64


def edited(**changes: torch.Tensor | None) -> dict[str, object]:
    state: dict[str, object] = dict(densenet40().state_dict())
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "this is no DenseNet: features.conv0.weight is missing; expected .*; found no keys"),
        ({"fc.weight": torch.zeros(2, 2)}, "expected torchvision's DenseNet keys .* found fc.weight"),
        ([1, 2], "a state dict is a mapping of names to tensors, not a value of type list"),
        ({"state_dict": {"epoch": 3}}, "this is no DenseNet: features.conv0.weight is missing; .* found no tensors"),
        (edited(**{"features.norm5.bias": 3}), "the value of 'features.norm5.bias' is a value of type int, not a tensor"),
        (edited(**{"features.norm5.bias": None}), "do not fit a DenseNet: features.norm5.bias is missing"),
        (edited(**{"extra": torch.zeros(1)}), "extra is unexpected"),
        (
            edited(**{"features.norm5.bias": torch.zeros(3)}),
            "features.norm5.bias has shape 3 where 456 is needed",
        ),
        (edited(**{"module.classifier.bias": torch.zeros(10)}), "two keys .* mean 'classifier.bias'"),
        (edited(**{"features.conv0.weight": torch.zeros(24, 3, 5, 5)}), "5x5 conv without features.norm0"),
        (edited(**{"features.conv0.weight": torch.zeros(24, 3)}), "has shape 24x3; it needs 4 sizes"),
        (
            edited(**{"features.conv0.weight": torch.zeros(25, 3, 3, 3)}),
            "denselayer1.conv1 reads 24 of the 25 channels .* load the .safetensors file that prune_dn",
        ),
        (
            edited(**{"features.conv0.weight": torch.zeros(23, 3, 3, 3)}),
            "denselayer1.conv1 reads 24 channels, but only 23 are made before it",
        ),
        (
            edited(**{"classifier.weight": torch.zeros(10, 456, dtype=torch.int8)}),
            "classifier.weight has dtype torch.int8 where floating point is needed",
        ),
        (dict(densenet40(mfm="middle_and_last").state_dict()), "In a net with MFM or with pruned edges"),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(state: dict[str, object], text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        from_state_dict(state)
