"""The largest cut within a budget: against all ratios tried one by one, stopped and taken up, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise_
from other_nets import UNet
from torch import Tensor, nn

from prune_dn import apply_plan, compensate_plan, count, prune, prune_within
from prune_dn.errors import BudgetError, PruningError
from prune_dn.models import densenet


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    made = densenet([3, 3], 8, bn_size=2, stem="cifar", num_classes=4)
    randomise_(made, 1)
    return made.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def size(model: nn.Module) -> float:
    return float(count(model, 8).params)


def found_by_trying(net: nn.Module, max_drop: float, step: float) -> float:
    """The largest multiple of `step` that holds, where the metric falls with the ratio."""
    best, ratio = 0.0, step
    while ratio < 1 - 1e-9:
        try:
            small = prune(net, ratio, unit="macs", criterion="l2", input_size=8)
        except BudgetError:
            break
        if size(net) - size(small) <= max_drop:
            best = ratio
        ratio += step
    return best


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_it_finds_what_trying_all_ratios_finds(net: nn.Module, share: float) -> None:
    budget = share * size(net)
    found = prune_within(
        net, size, budget, tolerance=1 / 64, unit="macs", criterion="l2", input_size=8
    )
    assert found.best.pruning_ratio == found_by_trying(net, budget, 1 / 64) > 0
    assert found.best.drop == size(net) - size(found.model) <= budget
    assert found.dense == size(net) and found.best.macs == count(found.model, 8).macs
    assert all(t.holds == (t.drop <= budget) for t in found.trials)
    assert found.plan is not None and found.plan.achieved["ratio"] >= found.best.pruning_ratio


def test_the_planner_may_be_the_limit(net: nn.Module) -> None:
    found = prune_within(net, size, size(net) - 1, tolerance=0.05, unit="macs", min_channels=4)
    assert found.reach is not None
    assert found.reach - found.best.pruning_ratio <= 0.05
    with pytest.raises(BudgetError, match="cannot bring macs"):
        prune(net, found.reach, unit="macs", min_channels=4)


def test_the_plan_gives_the_net(net: nn.Module, images: Tensor) -> None:
    """Refitted, and the same as by hand."""
    scores = net(images)

    def like_dense(small: nn.Module) -> Tensor:
        with torch.no_grad():
            return -(small(images) - scores).square().mean(1).double()

    found = prune_within(
        net, like_dense, 0.3, calibration=[images], loss="softmax", tolerance=0.2, unit="macs",
        input_size=8,
    )  # fmt: skip
    assert found.plan is not None and found.images == len(images)
    assert found.plan.requested["criterion"] == "reconstruction"
    by_hand = compensate_plan(
        apply_plan(net, found.plan), net, found.plan, [images], "least_squares", loss="softmax"
    )
    for one, other in zip(
        found.model.state_dict().values(), by_hand.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    low, high = found.best.interval or (None, None)
    assert low is not None and high is not None and low <= found.best.drop <= high


def test_a_stopped_search_goes_on(net: nn.Module, tmp_path: Path) -> None:
    whole = prune_within(net, size, 0.4 * size(net), tolerance=0.05, unit="macs")
    calls = []

    def stopped(model: nn.Module) -> float:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(model)
        return size(model)

    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        prune_within(net, stopped, 0.4 * size(net), tolerance=0.05, unit="macs", path=path)
    assert len(json.loads(path.read_text())["trials"]) == 2

    again: list[nn.Module] = []

    def counted(model: nn.Module) -> float:
        again.append(model)
        return size(model)

    found = prune_within(net, counted, 0.4 * size(net), tolerance=0.05, unit="macs", path=path)
    assert len(again) == 1 + len(found.trials) - 2  # dense, and the trials that were not there
    assert found.best.pruning_ratio == whole.best.pruning_ratio
    state = found.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole.model.state_dict().items())
    # The trials serve another budget, too.
    del again[:]
    other = prune_within(net, counted, 0.3 * size(net), tolerance=0.25, unit="macs", path=path)
    assert len(again) < 1 + len(other.trials)
    assert other.best.drop <= 0.3 * size(net)


def test_a_file_of_another_search(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    ask: dict[str, Any] = {"tolerance": 0.3, "path": path}
    prune_within(net, size, 0.4 * size(net), unit="macs", **ask)
    with pytest.raises(PruningError, match=r"is of another search \(another net, request"):
        prune_within(net, size, 0.4 * size(net), unit="params", **ask)
    with torch.no_grad():
        net.classifier.bias += 1
    with pytest.raises(PruningError, match="is of another search"):
        prune_within(net, size, 0.4 * size(net), unit="macs", **ask)
    with torch.no_grad():
        net.classifier.bias -= 1
    with pytest.raises(PruningError, match="so evaluate measures something else"):
        prune_within(net, lambda m: 2 * size(m), 0.4 * size(net), unit="macs", **ask)
    path.write_text("{}")
    with pytest.raises(PruningError, match="is no file of a search"):
        prune_within(net, size, 0.4 * size(net), unit="macs", **ask)


def test_tuned_nets_are_what_is_measured(net: nn.Module) -> None:
    def tune(model: nn.Module) -> None:
        with torch.no_grad():
            model.classifier.bias.fill_(7.0)

    def metric(model: nn.Module) -> float:
        return float(model.classifier.bias.detach().mean())

    dense = metric(net)
    found = prune_within(
        net, metric, 0.5, tune=tune, higher_is_better=dense < 7, tolerance=0.3, unit="macs"
    )
    assert found.best.value == metric(found.model) == 7.0


def test_errors_are_better_when_low(net: nn.Module) -> None:
    def error(model: nn.Module) -> float:
        return -size(model)

    budget = 0.4 * size(net)
    found = prune_within(net, error, budget, higher_is_better=False, tolerance=0.1, unit="macs")
    same = prune_within(net, size, budget, tolerance=0.1, unit="macs")
    assert found.best.pruning_ratio == same.best.pruning_ratio
    assert found.best.drop == same.best.drop


def test_certain_asks_the_upper_end(net: nn.Module) -> None:
    """Of few images the interval is wide, so less is cut."""
    whole = size(net)

    def scores(model: nn.Module) -> list[int]:
        right = round(30 * size(model) / whole)
        return [1] * right + [0] * (30 - right)

    bold = prune_within(net, scores, 0.4, tolerance=0.05, unit="macs")
    sure = prune_within(net, scores, 0.4, tolerance=0.05, unit="macs", certain=True)
    assert sure.best.interval is not None and bold.best.interval is not None
    assert sure.best.interval[1] <= 0.4 < bold.best.interval[1]
    assert sure.best.pruning_ratio < bold.best.pruning_ratio
    assert "95 % interval" in str(bold) and "on 30 images" in str(bold)


def test_nets_that_are_traced() -> None:
    torch.manual_seed(0)
    net = UNet().eval()
    example = torch.randn(1, 3, 16, 16)

    def params(model: nn.Module) -> float:
        return float(sum(p.numel() for p in model.parameters()))

    found = prune_within(
        net,
        params,
        0.75 * params(net),
        example_inputs=example,
        tolerance=0.5,
        unit="macs",
        timed=True,
    )
    assert isinstance(found.model, UNet)
    assert found.best.latency_ms is not None and found.best.latency_ms > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pruning_ratio": 0.5}, "finds the ratio: leave pruning_ratio and settle out"),
        ({"max_drop": 0}, "max_drop is 0; it must be a number above 0"),
        ({"max_drop": float("nan")}, "max_drop is nan; it must be a number above 0"),
        ({"tolerance": 1}, "it is a share of the cost, below 1"),
        ({"evaluate": lambda _: 0.5}, "every cut would hold; give max_drop in the metric's own units"),
        ({"evaluate": lambda _: float("nan")}, "for the dense net; every number must be finite"),
        ({"evaluate": lambda _: "good"}, "must return one number, or one score per image"),
        ({"evaluate": lambda _: []}, "must return one number, or one score per image"),
        ({"certain": True}, "needs a score per image"),
        ({"compensate": "least_squares"}, "calibration"),
        ({"units": ["stream"], "bogus": 1}, "'bogus' is no field of a request"),
    ],
)  # fmt: skip
def test_bad_arguments(net: nn.Module, fields: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"evaluate": size, "max_drop": 1.0, **fields}
    with pytest.raises(PruningError, match=message):
        prune_within(net, **asked)


def test_what_goes_wrong_on_the_way(net: nn.Module) -> None:
    values = iter([5.0, float("inf")])
    with pytest.raises(
        PruningError, match=r"inf for pruning_ratio 0\.5; every number must be finite"
    ):
        prune_within(net, lambda _: next(values), 1.0, unit="macs")
    lists = iter([[1.0, 1.0], [1.0]])
    with pytest.raises(
        PruningError, match=r"2 scores for the dense net and 1 at pruning_ratio 0\.5"
    ):
        prune_within(net, lambda _: next(lists), 0.5, unit="macs")


def test_a_budget_that_cannot_be_met(net: nn.Module) -> None:
    numbers = iter([10.0, 1.0, 2.0, 3.0, 4.0])
    with pytest.raises(
        BudgetError,
        match=r"no cut holds max_drop=1: the least drop, 6, was at pruning_ratio 0.0625",
    ):
        prune_within(net, lambda _: next(numbers), 1, tolerance=0.0625, unit="macs")
