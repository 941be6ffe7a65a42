"""Parameters and MACs against torch's counter, thop and published numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from oracle import randomise_
from other_nets import NETS as NETS_OF_OTHERS
from torch.utils.flop_counter import FlopCounterMode

from prune_dn.errors import ConfigError
from prune_dn.graph import call, trace
from prune_dn.measure.profiling import count, count_per_layer, weight_uses
from prune_dn.models import (
    DenseNet,
    densenet,
    densenet40,
    densenet121,
    densenet_bc100,
    light_cnn_29,
)
from prune_dn.models.examples import batch_size, in_batch
from prune_dn.pruning import prune

NETS = {
    "densenet40": (densenet40, {}, 32),
    "bc100": (densenet_bc100, {}, 32),
    "uneven images": (densenet, {"block_config": [2, 2], "growth_rate": 8}, (75, 50)),
    "mfm": (
        densenet,
        {
            "block_config": [2, 2],
            "growth_rate": 6,
            "stem": "cifar",
            "mfm": {"denseblock1.*": "3/2", "transition1": "2/1", "denseblock2.denselayer2": "2/1"},
        },
        32,
    ),
}


@pytest.fixture(params=sorted(NETS))
def case(request) -> tuple[DenseNet, tuple[int, int]]:
    build, arguments, size = NETS[request.param]
    return build(**arguments).eval(), (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("cut", [False, True])
def test_macs_agree_with_torch(case, cut) -> None:
    net, size = case
    if cut:
        net = prune(randomise_(net, 0), 0.4, units=["stream", "edge"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, *size))
    assert count(net, size).macs * 2 == counter.get_total_flops()
    assert count(net, size).params == sum(p.numel() for p in net.parameters())


def test_macs_agree_with_thop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop imports distutils
        from thop import profile
    net = prune(randomise_(densenet40(), 0), 0.5)
    fresh = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs, params = profile(
            fresh,
            (torch.zeros(1, 3, 32, 32),),
            verbose=False,
            custom_ops={
                torch.nn.BatchNorm2d: None,
                torch.nn.AvgPool2d: None,
            },
        )
    ours = count(net)
    norms = sum(row.params for row in count_per_layer(net) if row.channels)
    assert params in (ours.params, ours.params - norms)
    assert macs == ours.macs


def test_published_sizes() -> None:
    assert count(densenet121()).params == 7_978_856
    assert count(densenet121()).macs == pytest.approx(2.83e9, rel=0.005)  # torchvision's table
    assert count(densenet40()).params == pytest.approx(1.06e6, rel=0.01)


def test_counting_has_no_side_effects(case) -> None:
    net, size = case
    net.features.norm5.train()
    keys, flags = list(net.state_dict()), [m.training for m in net.modules()]
    assert count(net, size) == count(net, size) == count(net.config, size)
    assert list(net.state_dict()) == keys
    assert [m.training for m in net.modules()] == flags


def test_rows_carry_state_dict_names() -> None:
    net = densenet_bc100()
    weights = {k.removesuffix(".weight") for k in net.state_dict() if k.endswith(".weight")}
    assert {row.name for row in count_per_layer(net)} == weights


@pytest.mark.parametrize("size", [0, -1, 3.5, (32,), "32"])
def test_impossible_image_sizes(size) -> None:
    with pytest.raises(ConfigError, match="image_size"):
        count(densenet40(), size)
    with pytest.raises(ConfigError, match="too small for 3 blocks"):
        count(densenet40(), 3)


class Twice(torch.nn.Module):
    """A transposed conv, a grouped one that runs twice, a linear layer on maps, shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.ConvTranspose2d(3, 4, 2, 2, bias=False)
        self.grouped = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.one, self.other = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.norm(self.grouped(self.grouped(self.up(x)))).movedim(1, -1)
        return self.other(self.one(x))


@pytest.mark.parametrize(
    ("make", "size"), [(torchvision.models.mobilenet_v2, (64, 96)), (Twice, (4, 6))]
)
def test_other_nets_against_pytorchs_counter(make, size) -> None:
    net = make()
    cost = count(net, size)
    assert cost.params == sum(p.numel() for p in net.parameters())
    assert cost.channels == sum(
        m.num_features for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)
    )
    image = torch.zeros(1, 3, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image)
    assert cost.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("net", "size", "message"),
    [
        (
            torch.nn.Conv2d(3, 4, 1),
            None,
            "size of images is needed for a Conv2d: give it in pixels",
        ),
        (torch.nn.Linear(3, 4), 8, "this Linear is no CNN: it has no convolution"),
        (torch.nn.Conv2d(3, 4, 9), 8, r"Conv2d does not run on an image of shape \(1, 3, 8, 8\)"),
        (torch.nn.Conv2d(3, 4, 1), 0, "image_size is 0; give pixels"),
    ],
)
def test_other_nets_that_cannot_be_counted(net, size, message) -> None:
    with pytest.raises(ConfigError, match=message):
        count(net, size)


def test_a_light_cnn_knows_its_image_size() -> None:
    """Multiply-adds that PyTorch counts; without norms the filters of convs are the channels."""
    net = light_cnn_29(10, image_size=32, widths=(4, 6, 8, 6, 6), embedding=8)
    image = torch.zeros(1, 1, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(image)
    cost = count(net)
    assert cost == count(net, 32) and cost.macs == counter.get_total_flops() // 2
    trunks, blocks = (4, 6, 8, 6), (1, 2, 3, 4)
    units = 4 + sum(t * (2 * n + 1) for t, n in zip(trunks, blocks, strict=True)) + 6 + 8 + 6 + 6
    assert cost.channels == 2 * units
    assert cost.params == sum(p.numel() for p in net.parameters())
    with pytest.raises(
        ConfigError, match="size of images is 48, and this Light CNN takes images of 32"
    ):
        count(net, 48)


def test_channels_are_those_of_norms_where_there_are_norms() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 5, 3)
    )
    assert count(net, 8).channels == 8
    del net[1]
    assert count(net, 8).channels == 8 + 5


@pytest.mark.parametrize("name", sorted(NETS_OF_OTHERS))
def test_any_net_on_its_example_against_pytorchs_counter(name: str) -> None:
    """MACs of one example, however many there are in the batch."""
    build, example, _ = NETS_OF_OTHERS[name]
    net, inputs = build(), example()
    cost = count(net, example_inputs=inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(net.eval(), inputs)
    # Kernels of 3 x 3 that are buffers are nobody's weights; 24 maps of 10 x 10, 16 of 3 x 3.
    more = 9 * (24 * 10 * 10 + 16 * 3 * 3) if name == "blurred" else 0
    assert cost.macs + more == counter.get_total_flops() // 2 // batch_size(inputs) > more
    assert cost.params == sum(p.numel() for p in net.parameters())
    assert count(net, example_inputs=in_batch(inputs, 3)) == cost
    uses = trace(net, inputs).uses()  # what pruning goes by
    assert weight_uses(net, None, example_inputs=inputs) == uses


def test_an_example_that_does_not_fit() -> None:
    net = NETS_OF_OTHERS["two inputs"][0]()
    with pytest.raises(
        ConfigError, match=r"does not run on inputs of shape .*; give example_inputs"
    ):
        count(net, example_inputs=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="hold no tensor with a batch axis in front"):
        count(net, example_inputs=(1, 2))
    with pytest.raises(ConfigError, match="image_size has no effect beside example_inputs"):
        count(net, 8, example_inputs=torch.zeros(1, 3, 8, 8))
