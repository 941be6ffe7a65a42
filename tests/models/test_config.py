"""A config survives JSON, and says everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from strategies import pruned_configs

from prune_dn.errors import ConfigError
from prune_dn.models import (
    DenseNetConfig,
    LayerConfig,
    LightCNNConfig,
    TransitionConfig,
    light_cnn_9,
)
from prune_dn.models.config import filters_before_mfm, pair_up

GOOD = DenseNetConfig(
    num_init_features=4,
    blocks=((LayerConfig("denselayer1", 2), LayerConfig("denselayer2", 3, 8)), ()),
    transitions=(TransitionConfig(6, mfm="3/2"),),
    num_classes=10,
)


def layer(**changes: object) -> dict[str, object]:
    first, second = GOOD.blocks[0]
    return {"blocks": ((dataclasses.replace(first, **changes), second), ())}


def transition(**changes: object) -> dict[str, object]:
    return {"transitions": (dataclasses.replace(GOOD.transitions[0], **changes),)}


@given(pruned_configs())
def test_json_round_trip(config: DenseNetConfig) -> None:
    text = config.to_json()
    assert "\n" not in text
    again = DenseNetConfig.from_json(text)
    assert again == config and hash(again) == hash(config)
    assert again.to_json() == text


def test_json_is_plain_data() -> None:
    data = json.loads(GOOD.to_json())
    assert data["blocks"][0][1] == {
        "name": "denselayer2",
        "out_channels": 3,
        "bottleneck": 8,
        "input_indices": None,
        "mfm": None,
        "rival_indices": None,
        "mfm_alone": [],
    }


def test_json_of_before_siblings_could_go_still_loads() -> None:
    data = json.loads(GOOD.to_json())
    del data["classifier_rivals"]
    for part in (*data["blocks"][0], *data["transitions"]):
        del part["rival_indices"], part["mfm_alone"]
    assert DenseNetConfig.from_json(json.dumps(data)) == GOOD


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.num_classes = 3  # type: ignore[misc]


def test_filters_before_mfm() -> None:
    assert [filters_before_mfm(4, kind) for kind in (None, "2/1", "3/2")] == [4, 8, 6]
    assert GOOD.transitions[0].filters == 9
    assert LayerConfig("denselayer1", 5, mfm="2/1").filters == 10
    assert LayerConfig("denselayer1", 5, mfm="2/1", mfm_alone=(0, 3)).filters == 8


@pytest.mark.parametrize(
    ("read", "pairs"),
    [
        ((4,), ((4,), (4,))),
        ((1, 5), ((1,), (5,))),
        ((0, 2, 3), ((0, 2), (3, 2))),
        (tuple(range(6)), ((0, 1, 2), (3, 4, 5))),
        (tuple(range(7)), ((0, 1, 2, 3), (4, 5, 6, 3))),
    ],
)
def test_halves_compete(read, pairs) -> None:
    assert pair_up(read) == pairs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stem": "resnet"}, "stem is 'resnet'; choose 'cifar' or 'imagenet'"),
        ({"num_init_features": 0}, "num_init_features is 0; it must be an integer of at least 1"),
        ({"num_classes": 2.0}, "num_classes is 2.0; it must be an integer of at least 1"),
        ({"in_channels": True}, "in_channels is True; it must be an integer of at least 1"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0; it must lie in [0, 1)"),
        ({"drop_rate": float("nan")}, "drop_rate is nan; it must lie in [0, 1)"),
        ({"drop_rate": "0.1"}, "drop_rate is '0.1'; it must lie in [0, 1)"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be a number above 0"),
        ({"blocks": (), "transitions": ()}, "there are no blocks; a DenseNet has at least one"),
        ({"transitions": ()}, "2 blocks need 1 transitions, not 0"),
        (layer(name="denselayer2"), "block 1 has two layers named 'denselayer2'"),
        (layer(name="a.b"), "block 1 has a layer named 'a.b'; names are denselayer1, ..."),
        (layer(out_channels=0), "block 1, denselayer1: out_channels is 0; it must be an integer"),
        (layer(bottleneck=0), "block 1, denselayer1: bottleneck is 0; it must be None or at least"),
        (layer(mfm="2:1"), "block 1, denselayer1: mfm is '2:1'; choose one of 2/1, 3/2 or None"),
        (
            transition(out_channels=5),
            "transition 1: mfm 3/2 gives 2 maps per unit, so out_channels=5 is not possible",
        ),
        (
            transition(input_indices=(0, 9)),
            "transition 1: input_indices must be rising positions in a stream of 9 channels",
        ),
        (layer(input_indices=()), "block 1, denselayer1: input_indices must be rising positions"),
        (layer(input_indices=(1, 1)), "must be rising positions in a stream of 4 channels"),
        (layer(input_indices=(-1, 1)), "must be rising positions in a stream of 4 channels"),
        (layer(input_indices=(0, 1.5)), "block 1, denselayer1: input_indices must be integers"),
        (
            layer(mfm_alone=(0,)),
            "block 1, denselayer1: mfm_alone is (0,); siblings of mfm None cannot be cut alone",
        ),
        (
            transition(mfm_alone=(0,)),
            "transition 1: mfm_alone is (0,); siblings of mfm 3/2 cannot be cut alone, only of 2/1",
        ),
        (
            layer(mfm="2/1", mfm_alone=(1, 2)),
            "denselayer1: mfm_alone must be rising numbers of the 2 units",
        ),
        (layer(mfm="2/1", mfm_alone=(1, 0)), "mfm_alone must be rising numbers of the 2 units"),
        (layer(mfm="2/1", mfm_alone=(0, 1)), "has all 2 units: nobody competes, so mfm must be"),
        (
            layer(rival_indices=(2, 3)),
            "block 1, denselayer1: rival_indices: 2 rivals need as many positions to compete with, "
            "not None",
        ),
        (
            layer(input_indices=(0,), rival_indices=(2, 3)),
            "as many positions to compete with, not 1",
        ),
        (
            layer(input_indices=(0, 1), rival_indices=(2, 0)),
            "rival_indices must be positions in a stream of 4 channels, none before the one that",
        ),
        (
            layer(input_indices=(0, 1), rival_indices=(2, 4)),
            "rival_indices must be positions in a stream of 4 channels",
        ),
        (layer(input_indices=(0, 1), rival_indices=(0, 1)), "has nobody who competes with another"),
        (layer(input_indices=(0, 1), rival_indices=(1, 1)), "has a position that is read twice"),
        (layer(input_indices=(0, 1), rival_indices=(3, 3)), "has a position that is read twice"),
        (
            {"classifier_indices": (0, 1), "classifier_rivals": (2, 6)},
            "classifier_rivals must be positions in a stream of 6 channels",
        ),
        (
            {"classifier_indices": (6,)},
            "classifier_indices must be rising positions in a stream of 6",
        ),
    ],
)
def test_each_problem_is_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(GOOD, **changes)
    assert str(error.value).startswith("this DenseNetConfig cannot be built:\n  ")
    assert text in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(GOOD, num_classes=0, drop_rate=-1.0, **layer(out_channels=-2))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[1]", "3", '{"blocks": 1}', '{"blocks": [], "transitions": []}']
)
def test_what_is_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match="not a DenseNetConfig in JSON: "):
        DenseNetConfig.from_json(text)


def test_unknown_fields_are_refused() -> None:
    data = {**json.loads(GOOD.to_json()), "growth": 12}
    with pytest.raises(ConfigError, match="growth"):
        DenseNetConfig.from_json(json.dumps(data))


def many(layers: int, **changes: object) -> DenseNetConfig:
    block = tuple(LayerConfig(f"denselayer{i + 1}", 1) for i in range(layers))
    return dataclasses.replace(GOOD, **{"blocks": (block,), "transitions": (), **changes})


def test_configs_that_are_too_large() -> None:
    with pytest.raises(ConfigError, match="it has 20,000 layers; nets have at most 1,000"):
        many(20_000)
    with pytest.raises(ConfigError, match=r"it has .* channels; nets have at most 1,000,000"):
        dataclasses.replace(GOOD, num_classes=10**18)
    with pytest.raises(ConfigError, match=r"it has 1,000,0\d\d channels"):
        dataclasses.replace(GOOD, **layer(out_channels=10**6))
    with pytest.raises(ConfigError, match=r"it has 1,000,0\d\d channels"):
        dataclasses.replace(GOOD, **layer(bottleneck=10**6))
    with pytest.raises(
        ConfigError, match=r"it has 180,.* channels to be read; nets have at most 20,0"
    ):
        many(900, num_init_features=200_000)
    assert many(1_000).blocks[0][-1].name == "denselayer1000"
    text = many(1_000).to_json().replace('"denselayer1000"', '"denselayer999"')
    with pytest.raises(ConfigError, match="block 1 has two layers named 'denselayer999'"):
        DenseNetConfig.from_json(text)


def test_thousands_of_mistakes_are_not_all_listed() -> None:
    text = many(900).to_json().replace('"out_channels":1', '"out_channels":0')
    with pytest.raises(ConfigError) as error:
        DenseNetConfig.from_json(text)
    assert len(str(error.value).splitlines()) == 22 and str(error.value).endswith("  and more")
    long = GOOD.to_json().replace('"denselayer1"', f'"{"x" * 100_000}"')
    with pytest.raises(ConfigError) as error:
        DenseNetConfig.from_json(long)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("cls", [DenseNetConfig, LightCNNConfig])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "null", "", "\0"])
def test_hostile_json(cls: type[DenseNetConfig] | type[LightCNNConfig], text: str) -> None:
    with pytest.raises(ConfigError, match=f"not a {cls.__name__} in JSON"):
        cls.from_json(text)


@pytest.mark.parametrize("eps", ["1e400", "-1e-5", "NaN", '"x"', "null", "1" + "0" * 400, "0"])
def test_eps_that_no_float_can_be(eps: str) -> None:
    with pytest.raises(ConfigError, match=r"norm_eps is .*; it must be a number above 0"):
        DenseNetConfig.from_json(GOOD.to_json().replace("1e-05", eps))


def test_light_cnns_that_are_too_large() -> None:
    config = light_cnn_9(10, image_size=32).config
    for changes, message in (
        ({"num_classes": 10**18}, "channels; nets have at most 1,000,000"),
        ({"image_size": 10**9}, "it has 1,000,000,000 pixels a side; nets have at most 16,384"),
        (
            {"variant": "29", "blocks": (10**9, 0, 0, 0)},
            "it has 1,000,000,000 residual blocks; nets",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **changes)
