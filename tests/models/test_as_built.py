"""A net of ours is what its layers are: the config follows them, or the net is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from oracle import randomise_
from torch import nn

import prune_dn
from prune_dn.errors import CheckpointError, ConversionError, PruneDNError
from prune_dn.models import DenseNet, LightCNN, densenet, light_cnn_9, light_cnn_29_v2
from prune_dn.models.as_built import as_built
from prune_dn.models.convert import convert
from prune_dn.pruning.sensitivity import sensitivity

LAYER = "features.denseblock1.denselayer1"


def tiny(stem: str = "imagenet") -> DenseNet:
    return randomise_(densenet([2, 1], 4, stem=stem, num_classes=5, bn_size=2), 0).eval()


def tiny_light() -> LightCNN:
    net = light_cnn_29_v2(
        5, image_size=16, block_config=(1, 0, 0, 0), widths=(2, 4, 4, 4, 4), embedding=6
    )
    return randomise_(net, 0).eval()


def every(net: nn.Module, kind: type, **values: object) -> None:
    for module in net.modules():
        if isinstance(module, kind):
            for key, value in values.items():
                setattr(module, key, value)


class Sub(DenseNet):
    """Answers the same."""

    def training_step(self) -> None:
        pass


class Sigmoid(DenseNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


class LightSigmoid(LightCNN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


def other_classes(net: nn.Module) -> None:
    net.classifier = nn.Linear(net.classifier.in_features, 14)


def other_classes_in_place(net: nn.Module) -> None:
    net.classifier.weight = nn.Parameter(torch.randn(14, net.classifier.in_features))
    net.classifier.bias = nn.Parameter(torch.randn(14))


def grey(net: nn.Module) -> None:
    net.features.conv0 = nn.Conv2d(1, 8, 7, 2, 3, bias=False)


def grey_light(net: nn.Module) -> None:
    net.conv1.filter = nn.Conv2d(3, 4, 5, padding=2)


def stale_config(net: nn.Module) -> None:
    net.config = dataclasses.replace(net.config, num_classes=77, norm_eps=0.3, drop_rate=0.2)


def counters(net: nn.Module) -> None:
    """As thop leaves them."""
    for module in net.modules():
        module.register_buffer("total_ops", torch.zeros(1))


def light_head(net: nn.Module) -> None:
    net.fc2 = nn.Linear(6, 9, bias=False)


READ = {
    "classifier": (tiny, other_classes, {"num_classes": 14}),
    "classifier's tensors": (tiny, other_classes_in_place, {"num_classes": 14}),
    "grey": (tiny, grey, {"in_channels": 1}),
    "eps": (tiny, lambda net: every(net, nn.BatchNorm2d, eps=0.1), {"norm_eps": 0.1}),
    "dropout": (
        tiny,
        lambda net: every(net, type(net.get_submodule(LAYER)), drop_rate=0.5),
        {"drop_rate": 0.5},
    ),
    "stale": (tiny, stale_config, {"num_classes": 5, "norm_eps": 1e-5, "drop_rate": 0.0}),
    "SyncBatchNorm": (tiny, nn.SyncBatchNorm.convert_sync_batchnorm, {}),
    "counters": (tiny, counters, {}),
    "subclass": (tiny, lambda net: setattr(net, "__class__", Sub), {}),
    "hook that only looks": (
        tiny,
        lambda net: net.features.register_forward_hook(lambda *_: None),
        {},
    ),
    "Light CNN's head": (tiny_light, light_head, {"num_classes": 9}),
    "Light CNN in colour": (tiny_light, grey_light, {"in_channels": 3}),
}


@pytest.mark.parametrize("name", READ)
def test_the_config_is_read_from_the_layers(name, tmp_path: Path) -> None:
    make, change, says = READ[name]
    net = make()
    change(net)
    size = 16 if isinstance(net, LightCNN) else 64
    built = as_built(net)
    for field, value in says.items():
        assert getattr(built.config, field) == value
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, first.in_channels, size, size)
    torch.testing.assert_close(built.eval()(x), net(x))
    assert prune_dn.count(net, size).params == sum(p.numel() for p in net.parameters())
    prune_dn.save(net, tmp_path / "net.safetensors")
    again = prune_dn.load(tmp_path / "net.safetensors")
    torch.testing.assert_close(again(x), net(x))
    assert again.config == built.config
    small = prune_dn.prune(net, 0.3, unit="params", criterion="l2")
    assert small.eval()(x).shape == net(x).shape
    assert small.config == as_built(small).config
    if isinstance(net, DenseNet):
        plan = prune_dn.make_plan(net, 0.3)
        assert plan.achieved["before"]["params"] == sum(p.numel() for p in net.parameters())
        assert prune_dn.apply_plan(net, plan).eval()(x).shape == net(x).shape


def test_what_is_read_is_exported(tmp_path: Path) -> None:
    net = tiny()
    other_classes(net)
    prune_dn.export_onnx(net, tmp_path / "net.onnx", image_size=32)
    light = tiny_light()
    light_head(light)
    prune_dn.export_onnx(light, tmp_path / "light.onnx", image_size=16)


def test_a_net_that_is_its_config_comes_back_itself() -> None:
    net = tiny()
    net.names, net.features.norm5.momentum = ["a"], 0.5
    assert as_built(net) is net and convert(net, share=True) is net
    light = tiny_light()
    assert as_built(light) is light


def test_flags_are_kept_and_weights_are_shared_or_copied() -> None:
    net = tiny().train()
    net.features.denseblock1.eval()
    net.features.conv0.weight.requires_grad_(False)
    net.features.norm5.momentum = None
    other_classes(net)
    net.memory_efficient = 2
    for share in (False, True):
        built = as_built(net, share=share)
        for name, module in net.named_modules():
            assert built.get_submodule(name).training is module.training, name
        assert not built.features.conv0.weight.requires_grad
        assert built.classifier.weight.requires_grad
        assert built.features.norm5.momentum is None and built.memory_efficient == 2
        for name, tensor in net.state_dict().items():
            assert (tensor.data_ptr() == built.state_dict()[name].data_ptr()) is share
    assert net.config.num_classes == 5  # the given net is not touched


def replaced(path: str, module: nn.Module) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, module)

    return change


def option(path: str, key: str, value: object) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        setattr(net.get_submodule(path), key, value)

    return change


def forward_of_its_own(net: nn.Module) -> None:
    block = net.features.denseblock1
    block.forward = lambda x: type(block).forward(block, x) * 2


def reordered(net: nn.Module) -> None:
    norm = net.features.norm0
    del net.features.norm0
    net.features.add_module("norm0", norm)


REFUSED = {
    "stride": (option("features.conv0", "stride", (1, 1)), r"conv0 has stride \(1, 1\), not \(2, 2\)"),
    "one eps": (option("features.norm5", "eps", 0.1), "features.norm5 has eps 0.1, not 1e-05"),
    "one dropout": (option(LAYER, "drop_rate", 0.5), f"{LAYER} has drop_rate 0.5, not 0.0"),
    "padding": (option(f"{LAYER}.conv2", "padding", (2, 2)), r"conv2 has padding \(2, 2\), not \(1, 1\)"),
    "padding mode": (option(f"{LAYER}.conv2", "padding_mode", "reflect"), "padding_mode 'reflect', not 'zeros'"),
    "dilation": (option(f"{LAYER}.conv2", "dilation", (2, 2)), r"conv2 has dilation \(2, 2\)"),
    "statistics": (option("features.norm5", "track_running_stats", False), "norm5 has track_running_stats False"),
    "no statistics": (option("features.norm5", "running_mean", None), "norm5.running_mean is missing"),
    "bias": (option("features.conv0", "bias", nn.Parameter(torch.ones(8))), "conv0.bias is unexpected"),
    "head": (
        replaced("classifier", nn.Sequential(nn.Linear(15, 5), nn.Sigmoid())),
        r"classifier is torch.nn.modules.container.Sequential, not a Linear.*nn.Sequential\(model\)",
    ),
    "no bias": (replaced("classifier", nn.Linear(15, 5, bias=False)), "classifier.bias is missing"),
    "quantised": (
        replaced("classifier", torch.ao.nn.qat.Linear(15, 5, qconfig=torch.ao.quantization.default_qat_qconfig)),
        "fake_quant",
    ),
    "group norm": (replaced("features.norm5", nn.GroupNorm(1, 15)), "norm5 is torch.*GroupNorm, not a BatchNorm2d"),
    "instance norm": (replaced("features.norm5", nn.InstanceNorm2d(15)), "norm5 is torch.*InstanceNorm2d, not a"),
    "activation": (replaced("features.relu0", nn.SiLU()), "features.relu0 is torch.*SiLU, not a ReLU"),
    "width": (
        replaced("features.conv0", nn.Conv2d(3, 9, 7, 2, 3, bias=False)),
        "conv0.weight has shape 9x3x7x7 where 8x3x7x7 is needed",
    ),
    "missing": (lambda net: delattr(net.features, "pool0"), "features.pool0 is missing, not a MaxPool2d"),
    "extra": (replaced("features.extra", nn.Sigmoid()), r"features.extra \(Sigmoid\) is unknown"),
    "auxiliary head": (replaced("aux", nn.Linear(3, 3)), r"aux \(Linear\) is unknown"),
    "order": (reordered, "its modules stand in another order"),
    "forward": (forward_of_its_own, "denseblock1 has a forward of its own"),
    "subclass": (lambda net: setattr(net, "__class__", Sigmoid), "Sigmoid changes the forward of .*DenseNet"),
    "pre-hook": (
        lambda net: net.register_forward_pre_hook(lambda _, x: (x[0] - 1,)),
        "the model has a forward pre-hook",
    ),
    "hook": (
        lambda net: net.classifier.register_forward_hook(lambda _, x, y: y * 2),
        "classifier has a forward hook",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_config_says_is_refused_everywhere(name, tmp_path: Path) -> None:
    change, text = REFUSED[name]
    net = tiny()
    plan = prune_dn.make_plan(net, 0.3)
    change(net)
    path = tmp_path / "net.safetensors"
    for use in (
        convert,
        prune_dn.count,
        lambda net: prune_dn.prune(net, 0.3),
        lambda net: sensitivity(net, lambda _: 0.0),
        lambda net: prune_dn.settling_plan(net, [torch.zeros(1, 3, 32, 32)]),
        lambda net: prune_dn.fit_latency_model(net, image_size=32),
        lambda net: prune_dn.apply_plan(net, plan),
        lambda net: prune_dn.export_onnx(net, tmp_path / "net.onnx", image_size=32),
    ):
        with pytest.raises(ConversionError, match=text):
            use(net)
    with pytest.raises(CheckpointError, match=text):
        prune_dn.save(net, path)
    assert not list(tmp_path.iterdir())


def test_the_way_out_that_the_message_names() -> None:
    net = tiny()
    net.classifier = nn.Sequential(net.classifier, nn.Sigmoid())
    small = prune_dn.prune(nn.Sequential(net), 0.3, unit="params", input_size=32).eval()
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert isinstance(small[0].classifier[1], nn.Sigmoid)
    removed = 1 - sum(p.numel() for p in small.parameters()) / sum(
        p.numel() for p in net.parameters()
    )
    assert removed >= 0.3
    with pytest.raises(ConversionError, match=r"classifier is .*Sequential"):
        convert(small[0])


def test_other_indices_than_the_config_says() -> None:
    net = tiny("cifar")
    plan = prune_dn.make_plan(net, 0.3, units=["edge"])
    small = prune_dn.apply_plan(net, plan)
    reader = next(m for m in small.modules() if getattr(m, "input_indices", None) is not None)
    reader.input_indices = reader.input_indices.flip(0)
    with pytest.raises(ConversionError, match="input_indices holds other indices than the config"):
        convert(small)


LIGHT = {
    "forward": (lambda net: setattr(net, "__class__", LightSigmoid), "LightSigmoid changes the forward"),
    "stride": (option("conv1.filter", "stride", (2, 2)), r"conv1.filter has stride \(2, 2\)"),
    "pooling": (option("pool1", "plus_mean", False), "pool1 has plus_mean False, not True"),
    "head": (replaced("fc2", nn.Sequential(nn.Linear(6, 5))), "fc2 is .*Sequential, not a Linear"),
    "hook": (lambda net: net.fc.register_forward_hook(lambda _, x, y: y.relu()), "fc has a forward hook"),
    "embed": (lambda net: setattr(net, "embed", lambda x: x.flatten(1)[:, :6]), "the model has a embed of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_light_cnns_too(name, tmp_path: Path) -> None:
    change, text = LIGHT[name]
    net = tiny_light()
    change(net)
    for use in (
        as_built,
        prune_dn.count,
        lambda net: prune_dn.prune(net, 0.3, criterion="l2"),
        lambda net: prune_dn.export_onnx(net, tmp_path / "net.onnx", image_size=16),
    ):
        with pytest.raises(ConversionError, match=text):
            use(net)
    with pytest.raises(CheckpointError, match=text):
        prune_dn.save(net, tmp_path / "net.safetensors")


# -- computed weights and the meta device ----------------------------------------------------------


def masked(layer: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("apply", [masked, nn.utils.parametrizations.weight_norm, old_weight_norm])
@pytest.mark.parametrize(
    ("make", "layer"),
    [(tiny, f"{LAYER}.conv2"), (tiny, "classifier"), (tiny_light, "conv1.filter")],
)
def test_computed_weights_are_refused_everywhere(make, layer, apply, tmp_path: Path) -> None:
    net = make()
    plan = None if isinstance(net, LightCNN) else prune_dn.make_plan(net, 0.3)
    apply(net.get_submodule(layer))
    text = rf"{layer}.weight is computed by .*; bake it in first: torch.nn.utils"
    with pytest.raises(CheckpointError, match=text):
        prune_dn.save(net, tmp_path / "net.safetensors")
    uses = [as_built, lambda net: prune_dn.prune(net, 0.3, criterion="l2", unit="params")]
    if plan is not None:
        uses += [convert, lambda net: prune_dn.apply_plan(net, plan)]
    for use in uses:
        with pytest.raises(PruneDNError, match=text):
            use(net)


@pytest.mark.parametrize(
    "make", [tiny, tiny_light, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3))]
)
def test_no_cut_gives_weights_on_the_meta_device(make) -> None:
    net = make()
    plan = prune_dn.make_plan(net, 0.3) if isinstance(net, DenseNet) else None
    net.to("meta")
    with pytest.raises(PruneDNError, match="is on the meta device"):
        prune_dn.prune(net, 0.3, criterion="l2", unit="params", input_size=16)
    if plan is not None:
        with pytest.raises(PruneDNError, match="is on the meta device"):
            prune_dn.apply_plan(net, plan)


def test_light_cnn_9_is_its_config() -> None:
    net = light_cnn_9(3, image_size=16, widths=(2, 2, 2, 2, 2), embedding=4)
    assert as_built(net) is net
    small = prune_dn.prune(net, 0.3, units=["sibling"], criterion="l2")
    assert as_built(small) is small
