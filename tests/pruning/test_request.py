"""What is asked: plain numbers, units as a set, and PruningError for everything else."""

from __future__ import annotations

import dataclasses
import itertools
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchvision
from oracle import randomise_
from torch import nn

from prune_dn.errors import PruneDNError, PruningError
from prune_dn.models import LightCNN, densenet, light_cnn_9
from prune_dn.pruning import Plan, make_plan, prune, settling_plan
from prune_dn.pruning.config import LATENCY, UNITS, PruneConfig, Unit
from prune_dn.pruning.rates import COUNTED
from prune_dn.pruning.request import usual_criterion
from prune_dn.pruning.sensitivity import sensitivity


def net() -> nn.Module:
    return randomise_(densenet([2, 2], 8, bn_size=2, stem="cifar", num_classes=5), 3).eval()


def light() -> LightCNN:
    return light_cnn_9(5, image_size=16).eval()


@pytest.mark.parametrize("units", list(itertools.permutations(["stream", "bottleneck", "edge"])))
def test_the_order_of_units_does_not_matter(units) -> None:
    plan = make_plan(net(), 0.3, units=[*units, units[0]])
    assert plan == make_plan(net(), 0.3, units=set(units))
    assert plan.requested["units"] == ["stream", "bottleneck", "edge"]


def test_the_usual_units_in_any_order_are_for_any_net() -> None:
    for model in (torchvision.models.resnet18(), light()):
        one, other = (
            prune(model, 0.5, units=units, input_size=16)
            for units in (["stream", "bottleneck"], ("bottleneck", "stream", "bottleneck"))
        )
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() | theirs.keys())
    with pytest.raises(PruningError, match=r"units=\['edge'\]: this net has none of them"):
        prune(light(), 0.5, units=["edge"])


@pytest.mark.parametrize(
    "ratio", [np.float64(0.4), np.float32(0.375), np.float16(0.5), Fraction(2, 5)]
)
def test_numbers_of_other_kinds_are_plain_numbers(ratio) -> None:
    asked = {"min_channels": np.int64(2), "round_to": np.int8(2), "seed": np.uint8(3)}
    plan = make_plan(net(), ratio, input_size=(np.int32(16), 8), **asked)
    assert plan == make_plan(
        net(), float(ratio), min_channels=2, round_to=2, seed=3, input_size=(16, 8)
    )
    assert Plan.from_json(plan.to_json()) == plan
    model = torchvision.models.resnet18()
    prune(model, ratio, input_size=np.int64(32), **asked)


WRONG: list[tuple[str, Any, str]] = [
    *(
        ("pruning_ratio", value, r"pruning_ratio is .*; it must be a number in \(0, 1\)")
        for value in ("0.5", "50", None, True, np.True_, Decimal("0.5"), torch.tensor(0.5), [0.5])
    ),
    ("pruning_ratio", np.float32("nan"), "it must be a number"),
    ("pruning_ratio", np.int64(50), r"must lie in \(0, 1\); did you mean 0.5"),
    ("pruning_ratio", 0.5j, "it must be a number"),
    *(
        (name, value, f"{name} is .*; it must be an integer from 1 to")
        for name in ("min_channels", "round_to")
        for value in (0, -1, 2.0, "2", True, None, Decimal(2), torch.tensor(2), np.float64(2))
    ),
    *(
        ("seed", value, "seed is .*; it must be an integer from 0 to 4294967295")
        for value in (-1, 2**32, 1.0, "1", None, True, torch.tensor(1))
    ),
    *(
        ("input_size", value, r"image_size is .*; give pixels, or \(height, width\)")
        for value in (0, -1, "32", 32.0, True, (32,), (32, 32, 3), (32, 0), [32, None])
    ),
    ("units", "stream", r"units='stream' is one string; give a list"),
    ("units", 3, "units is 3; give a list of names"),
    ("units", None, "units is None; give a list of names"),
    ("units", [None], r"units is \[None\]; give a list of names"),
    ("units", [], "units is empty"),
    ("units", ["streams"], "units 'streams' is unknown; choose from stream"),
    ("protect", "conv", "give a list"),
    ("protect", None, "protect is None; give a list of names"),
    ("protect", [1], r"protect is \[1\]; give a list of names"),
    ("unit", None, "unit None is unknown"),
    ("unit", ["macs"], r"unit \['macs'\] is unknown"),
    ("scope", 1, "scope 1 is unknown"),
    ("criterion", 1, "criterion 1 is unknown"),
    ("criterion", ["l1"], r"criterion \['l1'\] is unknown"),
]


@pytest.mark.parametrize("make", [net, torchvision.models.resnet18, light])
@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_what_is_no_number_or_choice_is_refused(make, name, value, text) -> None:
    request = {"pruning_ratio": 0.5, "input_size": 16, **{name: value}}
    if make is not net and name == "input_size" and value is None:
        return
    with pytest.raises(PruneDNError, match=text):
        prune(make(), **request)


def test_every_entrance_checks_its_seed() -> None:
    with pytest.raises(PruningError, match="seed is -1"):
        settling_plan(densenet([2], 8, stem="cifar", mfm={"*": "2/1"}), criterion="random", seed=-1)
    with pytest.raises(PruningError, match="seed is -1"):
        sensitivity(net(), lambda _: 0.0, criterion="random", seed=-1)


def test_the_default_criterion_fits_the_net() -> None:
    assert usual_criterion(net()) == "bn_scale"
    assert usual_criterion(light()) == "l2"
    assert make_plan(net(), 0.3).requested["criterion"] == "bn_scale"


def test_a_request_is_what_make_plan_notes() -> None:
    kinds = tuple(kind for kind in UNITS if kind != "edge")
    asked = PruneConfig(0.3, units=kinds[::-1], input_size=[8, 16], criterion="l1")
    assert asked.units == kinds and asked.input_size == (8, 16)
    assert PruneConfig(0.3, input_size=(8, 8)).input_size == 8


def test_a_baseline_is_a_net_of_the_same_kind_or_its_config() -> None:
    asked = {"unit": "macs", "criterion": "l2"}
    as_net, as_config = (make_plan(net(), 0.5, baseline=b, **asked) for b in (net(), net().config))
    assert as_net == as_config == make_plan(net(), 0.5, **asked)
    with pytest.raises(PruningError, match="baseline is a LightCNN; give a DenseNet or its config"):
        make_plan(net(), 0.5, baseline=light())
    with pytest.raises(PruningError, match="baseline is a DenseNetConfig; give the net"):
        make_plan(torchvision.models.resnet18(), 0.5, input_size=32, baseline=net().config)


def test_a_ready_request_is_the_same_as_its_fields() -> None:
    fields = {"unit": "macs", "units": ["edge", "stream"], "criterion": "l1", "round_to": 2}
    assert make_plan(net(), PruneConfig(0.3, **fields)) == make_plan(net(), 0.3, **fields)
    resnet = torchvision.models.resnet18()
    one = prune(resnet, PruneConfig(0.5, unit="macs", input_size=32)).state_dict()
    other = prune(resnet, 0.5, unit="macs", input_size=32).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


@pytest.mark.parametrize("entrance", [prune, make_plan])
def test_unknown_and_doubled_fields_are_refused(entrance) -> None:
    known = r"the fields are pruning_ratio, unit, criterion, .*, seed"
    with pytest.raises(PruningError, match=rf"'criterium' is no .*'criterion'\?\); {known}"):
        entrance(net(), 0.5, criterium="l1")
    with pytest.raises(PruningError, match=rf"'xyz' is no field of a request; {known}"):
        entrance(net(), 0.5, xyz=1)
    with pytest.raises(PruningError, match=r"unit beside a PruneConfig: .*replace\(config, unit="):
        entrance(net(), PruneConfig(0.5), unit="macs")
    asked = PruneConfig(0.5, loss="mse", criterion="reconstruction")
    with pytest.raises(PruningError, match="loss='softmax' beside a PruneConfig with loss='mse'"):
        entrance(net(), asked, loss="softmax", calibration=[torch.randn(4, 3, 16, 16)])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"compensate": "refit"}, "compensate 'refit' is unknown; choose from none, mean, least"),
        ({"runtime": "eager"}, "runtime has no effect with unit 'channels'; use unit 'latency'"),
        ({"batch_size": 4}, "batch_size has no effect with unit 'channels'; use unit 'latency'"),
        (
            {"unit": "latency", "runtime": "tvm"},
            "runtime 'tvm' is unknown; choose from eager, onnx",
        ),
        ({"unit": "latency", "batch_size": 0}, "batch_size is 0; it must be an integer from 1"),
        ({"units": ["layer"]}, "units 'layer' needs 'stream' among the units, and scope 'global'"),
        ({"units": ["edge", "connection"]}, "units 'edge' and 'connection' do not go together"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown; choose softmax, sigmoid, mse"),
    ],
)
def test_a_request_checks_itself_without_a_model(fields, text) -> None:
    with pytest.raises(PruneDNError, match=text):
        PruneConfig(0.5, **fields)


def test_with_images_the_defaults_are_the_best_that_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 5)] * 2
    images, dense = [x for x, _ in data], net()
    plain = {"unit": "macs", "calibration": images, "loss": "softmax"}
    best = prune(dense, 0.4, **plain, criterion="reconstruction", compensate="least_squares")
    usual = prune(dense, 0.4, **plain)
    cut = prune(dense, 0.4, **plain, compensate="none")
    weights, others = best.state_dict(), usual.state_dict()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert not all(torch.equal(weights[key], value) for key, value in cut.state_dict().items())
    plan = make_plan(dense, 0.4, **plain)
    assert plan.requested["criterion"] == "reconstruction"
    # A criterion that reads no images leaves them to the refit.
    l2 = prune(dense, 0.4, unit="macs", criterion="l2", calibration=images, loss="softmax")
    said = prune(dense, 0.4, criterion="l2", compensate="least_squares", **plain).state_dict()
    assert all(torch.equal(said[key], value) for key, value in l2.state_dict().items())
    with pytest.raises(PruneDNError, match="cannot be told from no labels: give loss='softmax'"):
        prune(dense, 0.4, calibration=images)


def test_what_a_plan_notes_makes_the_request_again() -> None:
    asked = PruneConfig(0.3, unit="macs", protect=["features.conv0"], criterion="l1", seed=4)
    noted = make_plan(net(), asked).requested
    fields = {key: noted[key] for key in PruneConfig.__dataclass_fields__}
    assert PruneConfig(**fields) == dataclasses.replace(asked, input_size=32)


def test_every_unit_of_a_request_is_counted_somehow() -> None:
    assert {*COUNTED, LATENCY} == set(get_args(Unit))
