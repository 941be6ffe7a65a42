"""The named nets: published sizes, widths by formula, MFM where it was asked for."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from prune_dn.errors import ConfigError
from prune_dn.models import BUILDERS, LIGHT_CNNS, DenseNet, densenet, densenet40, densenet_bc100


def numel(net: DenseNet) -> int:
    return sum(p.numel() for p in net.parameters())


def basic_params(depth: int, k: int, init: int, classes: int) -> int:
    """Three blocks of basic layers without compression, counted layer by layer."""
    total, width = 3 * init * 9, init
    for b in range(3):
        for _ in range(depth):
            total += 2 * width + width * k * 9
            width += k
        if b < 2:
            total += 2 * width + width * width
    return total + 2 * width + width * classes + classes


def bottleneck_params(depth: int, k: int, classes: int) -> int:
    width = 2 * k
    total = 3 * width * 9
    for b in range(3):
        for _ in range(depth):
            total += 2 * width + width * 4 * k + 8 * k + 4 * k * k * 9
            width += k
        if b < 2:
            total += 2 * width + width * (width // 2)
            width //= 2
    return total + 2 * width + width * classes + classes


@pytest.mark.parametrize(
    ("name", "params"),
    [
        # printed by torchvision for its own nets (docs, IMAGENET1K_V1)
        ("densenet121", 7_978_856),
        ("densenet161", 28_681_000),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("densenet40", basic_params(12, 12, 24, 10)),
        ("densenet_bc100", bottleneck_params(16, 12, 10)),
        ("densenet_bc190", bottleneck_params(31, 40, 10)),
    ],
)
def test_parameter_counts(name: str, params: int) -> None:
    with torch.device("meta"):
        assert numel(BUILDERS[name]()) == params


def test_paper_sizes() -> None:
    with torch.device("meta"):  # arXiv:1608.06993, table 2, in millions
        assert round(numel(densenet_bc100()) / 1e6, 1) == 0.8
        assert round(numel(BUILDERS["densenet_bc190"]()) / 1e6, 1) == 25.6
        assert [len(b) for b in BUILDERS["densenet264"]().config.blocks] == [6, 12, 64, 48]


def test_options_reach_the_config() -> None:
    net = densenet([1, 2], 6, num_init_features=5, bn_size=3, compression=0.7, num_classes=7,
                   in_channels=1, stem="cifar", drop_rate=0.25, memory_efficient=True)  # fmt: skip
    c = net.config
    assert (c.num_init_features, c.num_classes, c.in_channels, c.drop_rate) == (5, 7, 1, 0.25)
    assert c.stem == "cifar" and net.memory_efficient
    assert [x.bottleneck for b in c.blocks for x in b] == [18, 18, 18]
    assert c.transitions[0].out_channels == int((5 + 6) * 0.7)
    with torch.device("meta"):
        grey = BUILDERS["densenet121"](5, in_channels=1)
    assert grey.features.conv0.weight.shape[1] == 1 and grey.classifier.out_features == 5


def test_every_builder_but_the_general_one_takes_the_same_options() -> None:
    common = {"num_classes", "drop_rate", "mfm", "mfm_skipped", "memory_efficient"}
    light = {"num_classes", "in_channels", "image_size", "widths", "embedding", "drop_rate"}
    for name, builder in BUILDERS.items():
        known = light if name in LIGHT_CNNS else common
        assert known <= set(inspect.signature(builder).parameters), name
    assert set(LIGHT_CNNS) == {"light_cnn_9", "light_cnn_29", "light_cnn_29_v2"}


def test_mfm_middle_and_last() -> None:
    config = densenet40(mfm="middle_and_last").config
    layers = [layer for block in config.blocks for layer in block]
    on = [i for i, layer in enumerate(layers) if layer.mfm]
    assert on[0] == 18 and on[-1] == 35 and len(on) == 5
    gaps = [b - a for a, b in itertools.pairwise(on)]
    assert max(gaps) - min(gaps) <= 1
    assert {layers[i].out_channels for i in on} == {6} and {layers[i].filters for i in on} == {12}
    assert {x.out_channels for i, x in enumerate(layers) if i not in on} == {12}
    # the smallest net that it fits
    nine = densenet([9], 2, stem="cifar", mfm="middle_and_last").config.blocks[0]
    assert [layer.mfm for layer in nine] == [None] * 4 + ["2/1"] * 5


def test_mfm_mapping_and_widths() -> None:
    net = densenet([2, 1], 6, stem="cifar", num_classes=3,
                   mfm={"denseblock1.*": "3/2", "*.denselayer2": "2/1", "transition1": "3/2"})  # fmt: skip
    c = net.config
    assert [(x.mfm, x.out_channels) for b in c.blocks for x in b] == [
        ("3/2", 4),
        ("2/1", 3),
        (None, 6),
    ]
    # 12 + 4 + 3 = 19 channels, half of them 9, all in units of three
    assert (c.transitions[0].filters, c.transitions[0].out_channels) == (9, 6)
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_mfm_on_what_is_read() -> None:
    net = densenet([2, 1], 4, num_init_features=5, bn_size=2, stem="cifar", num_classes=3,
                   mfm_skipped={"denseblock1.denselayer[12]": "2/1", "classifier": "2/1"})  # fmt: skip
    first, second = net.config.blocks[0]
    assert (first.input_indices, first.rival_indices) == ((0, 1, 2), (3, 4, 2))
    assert (second.input_indices, second.rival_indices) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 4))
    assert net.config.transitions[0].rival_indices is None
    assert net.config.classifier_rivals == (5, 6, 7, 8, 9)
    assert net.classifier.in_features == net.features.norm5.num_features == 5
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_the_preset_takes_the_same_layers_on_both_sides() -> None:
    made = densenet40(mfm="middle_and_last").config
    read = densenet40(mfm_skipped="middle_and_last").config
    assert [x.mfm is None for b in made.blocks for x in b] == [
        x.rival_indices is None for b in read.blocks for x in b
    ]
    assert {x.out_channels for b in read.blocks for x in b} == {12}
    assert all(t.rival_indices is None for t in read.transitions)


def test_one_channel_has_nobody_to_compete_with() -> None:
    net = densenet(
        [1], 4, num_init_features=1, stem="cifar", num_classes=3, mfm_skipped={"*": "2/1"}
    )
    assert net.config.blocks[0][0].rival_indices is None
    assert net.config.classifier_rivals == (3, 4, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compression": 0.0}, r"compression is 0.0; it must lie in \(0, 1\]"),
        ({"growth_rate": 0}, "growth_rate is 0; it must be an integer of at least 1"),
        ({"block_config": [2, 0]}, r"block_config\[1\] is 0; it must be an integer of at least 1"),
        ({"block_config": []}, "there are no blocks"),
        ({"num_init_features": 0}, "num_init_features is 0"),
        ({"mfm": "middle_and_last"}, "takes five layers of the second half; 4 layers are too few"),
        ({"mfm": "all"}, "mfm is 'all'; use None, 'middle_and_last' or a mapping like"),
        ({"mfm": {"transition1": "2/3"}}, "mfm kind '2/3' is unknown; choose one of 2/1, 3/2"),
        (
            {"mfm": {"transition9": "2/1"}},
            "'transition9' matches no part; the parts are denseblock1",
        ),
        ({"mfm": {"classifier": "2/1"}}, "mfm pattern 'classifier' matches no part"),
        (
            {"mfm_skipped": {"classifier": "3/2"}},
            "mfm_skipped kind '3/2' is unknown; choose one of 2/1",
        ),
        ({"mfm_skipped": "middle_and_last"}, "mfm_skipped='middle_and_last' takes five layers"),
        ({"mfm_skipped": {"conv0": "2/1"}}, "mfm_skipped pattern 'conv0' matches no part"),
        (
            {"growth_rate": 7, "mfm": {"*.denselayer1": "2/1"}},
            "denseblock1.denselayer1: mfm 2/1 needs a growth rate that is a multiple of 2, not 7",
        ),
    ],
)
def test_errors(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        densenet(**{"block_config": [2, 2], "growth_rate": 4, "stem": "cifar", **options})
