"""The model of latency: rates are found again from times that they made; plans meet measured times."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys

import pytest
import torch
from torch import nn

from prune_dn.errors import PruningError, PruningWarning
from prune_dn.measure.latency import Latency
from prune_dn.models import densenet
from prune_dn.models.probe import describe
from prune_dn.pruning import Plan, apply_plan, fit_latency_model, latency_model, make_plan
from prune_dn.pruning.latency_model import LatencyModel
from prune_dn.pruning.rates import Rates

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    NET = densenet([3, 3], 8, bn_size=2, stem="cifar", num_classes=5).eval()
RATES = Rates(mac_1x1=2e-7, mac_kxk=1e-7, normalised=3e-6, concatenated=1e-6, layer=0.05)
TRUE = LatencyModel(RATES, 0.3, 0.0, "eager", 1, 32, "made up")


def pretend(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
    """Let nets take `factor` times what TRUE predicts for the cut ones, instead of timing them."""

    def measure(configs, timing, image_size, repeats):
        times = [TRUE.predict(c) * (1 if c == NET.config else factor) for c in configs]
        return times, "made up", 0.0

    monkeypatch.setattr(latency_model, "_measure", measure)


def test_known_rates_are_found_again(monkeypatch) -> None:
    pretend(monkeypatch)
    found = fit_latency_model(NET, runtime="eager", nets=24)
    assert found.error < 1e-6
    assert found.constant == pytest.approx(0.3, rel=1e-3)
    assert found.rates.mac_kxk == pytest.approx(1e-7, rel=1e-3)
    assert found.rates.layer == pytest.approx(0.05, rel=1e-3)
    assert found.rates.gathered == pytest.approx(0, abs=1e-9)


def test_blocks_of_channels_are_found_again(monkeypatch) -> None:
    rates = dataclasses.replace(RATES, step=8, mac_kxk=1e-6)
    monkeypatch.setattr(sys.modules[__name__], "TRUE", dataclasses.replace(TRUE, rates=rates))
    pretend(monkeypatch)
    found = fit_latency_model(NET, runtime="eager", nets=24)
    assert found.rates.step == 8
    assert found.error < 1e-6


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.8])
def test_the_measured_time_meets_the_request(monkeypatch, factor) -> None:
    pretend(monkeypatch, factor)
    plan = make_plan(NET, 0.4, unit="latency", latency_model=TRUE, criterion="l1")
    dense, small = (plan.achieved[when]["latency"] for when in ("before", "after"))
    assert dense == pytest.approx(TRUE.predict(NET.config))
    assert small == pytest.approx(factor * TRUE.predict(plan.config_after))
    assert plan.achieved["ratio"] == pytest.approx(1 - small / dense)
    assert 0.4 <= plan.achieved["ratio"] < 0.45
    assert plan.requested["latency_model"]["rates"]["mac_1x1"] == 2e-7
    assert type(plan).from_json(plan.to_json()) == plan


def test_cut_widths_fill_blocks_where_that_can_meet_the_budget(monkeypatch) -> None:
    """A conv that is computed in blocks of 8 takes the same time for 3 channels as for 8."""
    rates = dataclasses.replace(RATES, step=8)
    monkeypatch.setattr(sys.modules[__name__], "TRUE", dataclasses.replace(TRUE, rates=rates))
    pretend(monkeypatch)

    def cut_widths(ratio: float, **request: object) -> set[int]:
        plan = make_plan(NET, ratio, unit="latency", latency_model=TRUE, criterion="l1", **request)
        assert plan.achieved["ratio"] >= ratio
        rows = [row for row in plan.layers if row["kind"] == "bottleneck"]
        return {row["after"] for row in rows if row["after"] != row["before"]}

    assert cut_widths(0.2) == {8}
    threes = cut_widths(0.2, round_to=3)
    assert threes and not any(width % 3 for width in threes), "no width here has a multiple of 24"
    assert any(width % 8 for width in cut_widths(0.65)), "blocks of 8 leave more time than that"


def test_the_default_model_is_fitted(monkeypatch) -> None:
    pretend(monkeypatch)
    plan = make_plan(NET, 0.3, unit="latency", criterion="l1")
    assert plan.requested["latency_model"]["runtime"] == "onnxruntime"
    assert plan.achieved["ratio"] >= 0.3


def test_a_model_where_it_has_no_effect_and_one_for_other_images() -> None:
    with pytest.raises(PruningError, match="latency_model has no effect with unit 'macs'"):
        make_plan(NET, 0.4, unit="macs", latency_model=TRUE)
    with pytest.raises(PruningError, match="fitted on images of 32 pixels, and input_size is 48"):
        make_plan(NET, 0.4, unit="latency", latency_model=TRUE, input_size=48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protect": ["nobody"]}, "protect pattern 'nobody' matches no module"),
        ({"round_to": 64}, "round_to=64 is larger than every width"),
        ({"criterion": "taylor"}, "'taylor' needs calibration images"),
        ({"ratios": "none.json"}, "cannot read ratios from none.json"),
        ({"pruning_ratio": 0}, "pruning_ratio is 0"),
    ],
)
def test_nothing_is_timed_for_arguments_that_are_wrong(monkeypatch, arguments, message) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(latency_model, "_measure", never)
    model = functools.partial(fit_latency_model, NET, runtime="eager", nets=8)
    for given in (None, model):
        with pytest.raises(PruningError, match=message):
            make_plan(
                NET, **{"pruning_ratio": 0.4, **arguments}, unit="latency", latency_model=given
            )
    with pytest.raises(AssertionError):
        make_plan(NET, 0.4, unit="latency", latency_model=model)


def test_out_of_reach(monkeypatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(PruningError, match="cannot bring latency from"):
        make_plan(NET, 0.99, unit="latency", latency_model=TRUE)


def test_a_real_fit() -> None:
    found = fit_latency_model(NET, runtime="eager", nets=8, repeats=3)
    assert found.predict(NET.config) > 0
    one, same = found.measure(NET.config, NET.config, repeats=3)
    assert one == same > 0


@pytest.mark.parametrize(
    ("model", "factor", "text"),
    [
        ({"error": 0.24}, 1.0, "fits badly: it misses the times of other nets by 24%"),
        ({"spread": 0.6}, 1.0, "machine was busy .* differ by 60% of the median"),
        (
            {},
            0.5,
            r"asked to remove 20.0% of the time, the plan removes 5\d.\d% as measured in eager",
        ),
    ],
)
def test_what_speaks_against_a_plan_is_said_and_kept(monkeypatch, model, factor, text) -> None:
    """Half the predicted time, whatever is cut: no plan is near the request."""
    pretend(monkeypatch, factor)
    timing = dataclasses.replace(TRUE, **model)
    ratio = 0.2 if factor < 1 else 0.4
    with pytest.warns(PruningWarning, match=text):
        plan = make_plan(NET, ratio, unit="latency", latency_model=timing, criterion="l1")
    (told,) = plan.achieved["warnings"]
    assert re.search(text, told)
    assert plan.achieved["runtime"] == "eager"
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_good_plan_says_nothing(monkeypatch) -> None:
    pretend(monkeypatch)
    plan = make_plan(NET, 0.4, unit="latency", latency_model=TRUE, criterion="l1")
    assert plan.achieved["warnings"] == []


def test_the_spread_is_that_of_the_runs(monkeypatch) -> None:
    def timed(nets, *, batch_size, **_):
        return {n: Latency(2.0, 1.5, 3.5, 9, batch_size, "eager", "here") for n in nets}

    monkeypatch.setattr(latency_model, "compare_latency", timed)
    found = fit_latency_model(NET, runtime="eager", nets=8, repeats=1)
    assert found.spread == 1.0 and found.machine == "here"


# -- nets that are traced -------------------------------------------------------------------------


class Grouped(nn.Module):
    """A residual sum, a grouped convolution, and a batch norm before a reader of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, groups=2),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 5)."""
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


def traced() -> tuple[Grouped, LatencyModel]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Grouped().eval()
    example = describe(torch.zeros(1, 3, 16, 16))
    rates = Rates(mac_1x1=2e-7, mac_kxk=1e-7, normalised=3e-6)
    return net, LatencyModel(rates, 0.03, 0.0, "eager", 1, None, "made up", inputs=example)


def pretend_of(monkeypatch: pytest.MonkeyPatch, known: LatencyModel, factor: float = 1.0) -> None:
    def measure(nets, timing, where, repeats):
        assert where == known.inputs
        first = known.predict(nets[0])
        times = [known.predict(net) for net in nets]
        return [t * (1 if t == first else factor) for t in times], "made up", 0.0

    monkeypatch.setattr(latency_model, "_measure", measure)


def test_rates_of_a_traced_net_are_found_again(monkeypatch) -> None:
    net, known = traced()
    pretend_of(monkeypatch, known)
    for given in ({"image_size": 16}, {"example_inputs": torch.zeros(1, 3, 16, 16)}):
        found = fit_latency_model(net, runtime="eager", nets=24, **given)
        assert found.error < 1e-6 and found.inputs == known.inputs and found.image_size is None
        for rate in ("mac_1x1", "mac_kxk", "normalised"):
            assert getattr(found.rates, rate) == pytest.approx(getattr(known.rates, rate), rel=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.8])
def test_the_measured_time_of_a_traced_net_meets_the_request(monkeypatch, factor) -> None:
    net, known = traced()
    pretend_of(monkeypatch, known, factor)
    asked = {"unit": "latency", "latency_model": known, "criterion": "l1", "input_size": 16}
    plan = make_plan(net, 0.4, **asked)
    dense, after = (plan.achieved[when]["latency"] for when in ("before", "after"))
    assert dense == pytest.approx(known.predict(net))
    small = apply_plan(net, plan)
    assert after == pytest.approx(factor * known.predict(small))
    assert 0.9 * 0.6 <= after / dense <= 0.6
    assert small.branch[5].groups == 2 and small.branch[5].in_channels % 2 == 0
    again = make_plan(small, 0.7, baseline=net, **asked)
    assert again.achieved["baseline"]["latency"] == pytest.approx(dense)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_traced_net_is_timed_for_real() -> None:
    net, _ = traced()
    found = fit_latency_model(net, runtime="eager", image_size=16, nets=8, repeats=3)
    assert found.predict(net) > 0 and found.machine.endswith(torch.__version__)
    one, same = found.measure(net, net, repeats=3)
    assert one == same > 0


def test_a_model_of_other_inputs_is_refused() -> None:
    net, known = traced()
    asked = {"unit": "latency", "criterion": "l1"}
    for model, given, fitted in ((net, 24, known), (net, 16, TRUE), (NET, 32, known)):
        with pytest.raises(PruningError, match="was fitted on other inputs than this net was"):
            make_plan(model, 0.4, input_size=given, latency_model=fitted, **asked)
