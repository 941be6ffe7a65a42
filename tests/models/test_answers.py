"""A foreign DenseNet that answers otherwise than its weights say is refused, and the cause named."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from oracle import randomise_
from torch import nn

from prune_dn.errors import ConversionError
from prune_dn.models import densenet
from prune_dn.models.answers import computed_weights, difference
from prune_dn.models.convert import convert

TorchvisionDenseNet = torchvision.models.DenseNet
TimmDenseNet = timm.models.densenet.DenseNet
MEAN = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
LAYER = "features.denseblock1.denselayer2"


def tiny_torchvision(kind: type = TorchvisionDenseNet) -> nn.Module:
    return randomise_(kind(4, (2, 1), 6, bn_size=2, num_classes=5), 0)


def tiny_timm() -> nn.Module:
    return randomise_(TimmDenseNet(4, (2, 1), bn_size=2, num_classes=5), 0)


class HalfLayer(torchvision.models.densenet._DenseLayer):
    def forward(self, x: object) -> torch.Tensor:
        return super().forward(x) / 2


class FlippedBlock(torchvision.models.densenet._DenseBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


class Resizing(TorchvisionDenseNet):
    """Changes nothing on small images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.interpolate(x, size=64) if x.shape[-1] > 200 else x)


class WithHelpers(TorchvisionDenseNet):
    def extra(self) -> int:
        return 1


def without(path: str) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        delattr(net.get_submodule(parent), name)

    return change


def cast_to(path: str, kind: type) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        net.get_submodule(path).__class__ = kind

    return change


def sigmoid_forward(net: nn.Module) -> None:
    forward = net.forward
    net.forward = types.MethodType(lambda _, x: forward(x).sigmoid(), net)


def scaled_forward(net: nn.Module) -> None:
    layer = net.get_submodule(LAYER)
    forward = layer.forward
    layer.forward = lambda *x: forward(*x) * 1.001


def conv_forward(net: nn.Module) -> None:
    net.features.conv0._conv_forward = lambda x, w, _: F.conv2d(x, w, None, 2, 3) * 2


def normalise(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return ((args[0] - MEAN) / MEAN,)


def noise(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0] + 0.01 * torch.randn_like(args[0]),)


def dead_with_half_layer(net: nn.Module) -> None:
    """All answers of the net as it is are 0, whatever its layers do."""
    nn.init.zeros_(net.classifier.weight)
    nn.init.zeros_(net.classifier.bias)
    cast_to(LAYER, HalfLayer)(net)


def fails(*_: object) -> object:
    raise AssertionError("compiled")


def dict_forward(net: nn.Module) -> None:
    forward = net.forward
    net.forward = lambda x: {"out": forward(x)}


BOTH: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "pool0": (without("features.pool0"), "features.pool0 is missing"),
    "pool": (without("features.transition1.pool"), "features.transition1.pool is missing"),
    "instance forward": (sigmoid_forward, "the model has a forward of its own"),
    "layer's instance forward": (scaled_forward, f"{LAYER} has a forward of its own"),
    "other method": (conv_forward, "features.conv0 has a _conv_forward of its own"),
    "pre-hook": (
        lambda net: net.register_forward_pre_hook(normalise),
        r"the model has a forward pre-hook \(normalise\)",
    ),
    "noise": (
        lambda net: net.features.register_forward_pre_hook(noise),
        r"features has a forward pre-hook \(noise\)",
    ),
    "hook": (
        lambda net: net.classifier.register_forward_hook(lambda _, x, y: 5 * y),
        "classifier has a forward hook",
    ),
    "dict": (dict_forward, "answers with a builtins.dict, not with logits"),
}
TORCHVISION = {
    "relu": (without("features.transition1.relu"), "features.transition1.relu is missing"),
    "relu0": (without("features.relu0"), "features.relu0 is missing"),
    "relu1": (without(f"{LAYER}.relu1"), f"does not run .* {LAYER}.relu1 is missing"),
    "layer": (cast_to(LAYER, HalfLayer), "HalfLayer changes the forward of .*_DenseLayer"),
    "block": (
        cast_to("features.denseblock1", FlippedBlock),
        "FlippedBlock changes the forward of .*_DenseBlock",
    ),
    "dead": (dead_with_half_layer, "HalfLayer changes the forward"),
}
CASES = [
    *[(tiny_torchvision, *BOTH[name]) for name in BOTH],
    *[(tiny_torchvision, *TORCHVISION[name]) for name in TORCHVISION],
    *[(tiny_timm, *BOTH[name]) for name in BOTH],
]


@pytest.mark.parametrize(("make", "change", "cause"), CASES)
def test_another_answer_is_refused_and_its_cause_named(make, change, cause) -> None:
    net = make()
    convert(net)
    change(net)
    with pytest.raises(ConversionError, match=cause):
        convert(net)


def test_a_forward_that_differs_only_on_images_of_the_usual_size() -> None:
    with pytest.raises(ConversionError, match="Resizing changes the forward"):
        convert(tiny_torchvision(Resizing))


def test_what_answers_the_same_is_taken() -> None:
    net = tiny_torchvision(WithHelpers)
    net.features.register_forward_hook(lambda *_: None)
    net.features.register_forward_hook(lambda _, x, y: y * (y > 0))  # a ReLU follows
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(convert(net).eval()(x), net.eval()(x))


def test_a_hook_on_all_modules_is_seen() -> None:
    def shift(module: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor | None:
        return out + 1 if type(module) is torchvision.models.densenet._DenseLayer else None

    handle = nn.modules.module.register_module_forward_hook(shift)
    try:
        with pytest.raises(ConversionError, match=r"all modules have a forward hook .*shift"):
            convert(tiny_torchvision())
    finally:
        handle.remove()


@pytest.mark.parametrize("training", [True, False])
def test_the_net_is_untouched(training) -> None:
    """Also by what its hooks and its forward change on their way."""
    net = tiny_torchvision().train(training)
    net.features.denseblock1.train(not training)
    net.register_forward_pre_hook(lambda _, args: (args[0] + torch.randn_like(args[0]).mul(0),))
    net.classifier.weight.grad = torch.ones_like(net.classifier.weight)
    before = copy.deepcopy(net.state_dict())
    flags = [module.training for module in net.modules()]
    tensors = [id(x) for x in (*net.parameters(), *net.buffers())]
    state = torch.get_rng_state()
    convert(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == flags
    assert [id(x) for x in (*net.parameters(), *net.buffers())] == tensors
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(grads) == 1 and bool((grads[0] == 1).all())


def test_weights_do_not_matter() -> None:
    """Not their values (NaN is for others to find), nor their device or dtype."""
    net = tiny_torchvision()
    net.features.conv0.weight.data[0] = torch.nan
    convert(net)
    for other in (tiny_torchvision().to("meta"), tiny_torchvision().half()):
        convert(other)
        without("features.pool0")(other)
        with pytest.raises(ConversionError, match="pool0 is missing"):
            convert(other)


def test_where_float64_cannot_run_its_own_dtype_does() -> None:
    net = tiny_torchvision()
    handle = net.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    with pytest.warns(UserWarning, match=r"cannot run in float64 .* compared in torch.float32"):
        convert(net)
    handle.remove()
    net.register_forward_pre_hook(lambda _, args: (args[0].float() * 2,))
    with (
        pytest.warns(UserWarning, match="cannot run in float64"),
        pytest.raises(ConversionError, match="forward pre-hook"),
    ):
        convert(net)


def test_compiled_and_wrapped_parts() -> None:
    net = tiny_torchvision()
    net.features.denseblock1.compile(backend=fails)
    convert(net)  # runs the net as it is written
    for wrap, text in (
        (nn.DataParallel, r"model.features = model.features.module"),
        (torch.compile, r"features is wrapped in OptimizedModule; .* model.features._orig_mod"),
    ):
        net = tiny_torchvision()
        net.features = wrap(net.features)
        with pytest.raises(ConversionError, match=text):
            convert(net)


def test_tied_weights_count_for_each() -> None:
    net, x = tiny_torchvision().eval(), torch.randn(1, 3, 64, 64)
    block = net.features.denseblock1
    block.denselayer2.conv2.weight = block.denselayer1.conv2.weight
    torch.testing.assert_close(convert(net)(x), net(x))


def test_quantised_layers_are_named() -> None:
    net = tiny_torchvision().train()
    net.qconfig = torch.ao.quantization.default_qat_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.prepare_qat(net, inplace=True)
    with pytest.raises(ConversionError, match=r"conv0 is torch.ao.*Conv2d, not Conv2d"):
        convert(net)


def test_difference_is_relative_to_the_largest_answer() -> None:
    one = densenet([1], 4, stem="cifar", num_classes=3)
    other = copy.deepcopy(one)
    assert difference(one, other, (1, 3, 8, 8)) is None
    other.register_forward_hook(lambda _, x, y: y * 0.75)
    found = difference(other, one, (1, 3, 8, 8))
    assert found == "its answers are others (relative difference 0.25)"


# -- computed weights ----------------------------------------------------------------------------


def old(function: Callable[..., object]) -> Callable[[nn.Module], object]:
    def apply(layer: nn.Module) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still in use
            return function(layer)

    return apply


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "prune twice": lambda layer: [
        torch.nn.utils.prune.random_unstructured(layer, "weight", 0.2) for _ in range(2)
    ],
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("make", [tiny_torchvision, tiny_timm])
def test_computed_weights_are_refused_and_the_call_that_is_named_bakes_them_in(make, name) -> None:
    model = make().eval()
    COMPUTED[name](model.classifier)
    with pytest.raises(
        ConversionError, match=r"classifier.weight is computed by .* bake it in"
    ) as e:
        convert(model)
    call = str(e.value).rpartition("bake it in first: ")[2]
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(call, {"torch": torch, "model": model})
    assert not list(computed_weights(model))
    torch.testing.assert_close(convert(model)(x), want)
