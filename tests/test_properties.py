"""A property that checks too little fails, and requests move to where a net can meet them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from properties import counted, feasible

from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning import make_plan


@pytest.mark.parametrize(
    ("rounds", "checked", "fails"), [(1, 0, True), (2, 1, True), (2, 2, False)]
)
def test_a_property_that_checks_too_little_fails(rounds, checked, fails) -> None:
    @counted(st.integers(), rounds=rounds)
    def check(_: int) -> int:
        return checked

    for _ in range(2):  # each run counts anew
        if fails:
            with pytest.raises(AssertionError, match=r"\d+ of \d+ rounds were checked"):
                check()
        else:
            check()


def test_a_property_that_fails_says_with_what() -> None:
    @counted(st.integers(0, 9))
    def check(number: int) -> int:
        assert number < 3
        return 1

    with pytest.raises(AssertionError, match="assert 3 < 3"):
        check()


@pytest.mark.parametrize(
    ("request_", "changed"),
    [
        ({"pruning_ratio": 0.2}, set()),
        ({"pruning_ratio": 0.99}, {"pruning_ratio"}),
        ({"pruning_ratio": 0.1, "units": ["sibling"]}, {"units"}),
        ({"pruning_ratio": 0.1, "criterion": "mfm_win_rate"}, {"criterion"}),
        ({"pruning_ratio": 0.1, "min_channels": 99}, {"min_channels", "units"}),
        ({"pruning_ratio": 0.9, "round_to": 99}, {"pruning_ratio", "round_to"}),
    ],
)
def test_a_request_is_loosened_where_it_must_be(request_, changed) -> None:
    net = densenet([2, 2], 6, bn_size=2, stem="cifar", num_classes=5)
    whole = {"criterion": "l2", "min_channels": 1, "round_to": 1, "units": ["stream"], **request_}

    def ask(**asked):
        reads = asked["criterion"] == "mfm_win_rate"
        batches = [net.classifier.weight.new_zeros(1, 3, 8, 8)] if reads else None
        return make_plan(net, input_size=8, calibration=batches, **asked)

    plan, asked = feasible(ask, whole)
    assert {key for key in asked if asked[key] != whole[key]} == changed
    assert plan.requested["pruning_ratio"] == asked["pruning_ratio"]
    assert plan.config_after != net.config


def test_what_cannot_be_met_or_is_another_mistake() -> None:
    net = densenet([1], 1, num_init_features=1, bn_size=None, stem="cifar", num_classes=2)
    request = {"pruning_ratio": 0.5, "unit": "macs", "units": ["stream"], "criterion": "l2"}
    assert feasible(lambda **asked: make_plan(net, **asked), request, {"cannot bring": {}}) is None
    with pytest.raises(PruningError, match="criterion 'l3' is unknown"):
        feasible(lambda **asked: make_plan(net, **asked), {**request, "criterion": "l3"})
