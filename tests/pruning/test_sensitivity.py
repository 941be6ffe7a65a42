"""Each group alone: rows agree with nets that are cut by hand, here with masks and slow loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from oracle import masked, randomise_
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import apply_plan
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.ratios import SensitivityRow, ratios_within
from prune_dn.pruning.sensitivity import sensitivity
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units

KINDS = ("stream", "bottleneck", "edge")


def made(bn_size: int | None = 2, **changes) -> DenseNet:
    net = densenet([2, 2], 8, bn_size=bn_size, stem="cifar", num_classes=5, **changes)
    return randomise_(net, 3).double().eval()


@pytest.fixture(scope="module")
def net() -> DenseNet:
    return made()


def answer(net: nn.Module) -> float:
    """A number that every weight moves."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return float((net(x) * torch.arange(1.0, 6.0)).sum())


def l2_by_hand(net: DenseNet, row: SensitivityRow) -> torch.Tensor:
    """What the readers lose with each unit of a row's group: no `importance`, no `Units`."""

    def reads(weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(0, 1).flatten(1).norm(dim=1)

    modules = dict(net.named_modules())
    parent = row.name.rpartition(".")[0]
    if row.kind == "bottleneck":
        return reads(modules[f"{parent}.conv2"].weight)
    if row.kind == "edge":
        reader = {
            "features.norm5": "classifier",
            "features.transition1.norm": "features.transition1.conv",
        }
        return reads(modules[reader.get(row.name, f"{parent}.conv1")].weight)
    # Stream: growth 8 from a stem of 16; block 2 starts with the transition's 16.
    block, start, readers = {
        "features.conv0": (1, 0, 3),
        "features.denseblock1.denselayer1.conv2": (1, 16, 2),
        "features.denseblock1.denselayer2.conv2": (1, 24, 1),
        "features.transition1.conv": (2, 0, 3),
        "features.denseblock2.denselayer1.conv2": (2, 16, 2),
        "features.denseblock2.denselayer2.conv2": (2, 24, 1),
    }[row.name]
    convs = [f"features.denseblock{block}.denselayer{i}.conv1" for i in (1, 2)]
    convs.append("features.transition1.conv" if block == 1 else "classifier")
    found = [reads(modules[c].weight)[start : start + row.size] for c in convs[3 - readers :]]
    return torch.stack(found).sum(0)


def test_every_value_is_that_of_a_net_masked_by_hand(net) -> None:
    rows = sensitivity(net, answer, ratios=(0.25, 0.6), units=KINDS)
    table = Units(net.config.graph())
    assert {r.kind for r in rows} == set(KINDS)
    assert len(rows) == 2 * len(table.groups)
    for row in rows:
        least = l2_by_hand(net, row).argsort()[: round(row.ratio * row.size)].tolist()
        keep = np.ones(table.size, dtype=bool)
        group = next(g for g in table.groups if g.name == row.name)
        keep[[group.start + i for i in least]] = False
        plan = plan_of(subject(net), table, table.close(keep))
        assert row.units_cut == len(least) > 0
        assert row.value == pytest.approx(answer(masked(net, plan)), rel=1e-9)
        assert row.value == pytest.approx(answer(apply_plan(net, plan)), rel=1e-12)
        assert row.params_saved == count(net).params - count(plan.config_after).params > 0
        assert row.macs_saved == count(net).macs - count(plan.config_after).macs > 0


def test_dense_value_and_drop(net) -> None:
    rows = sensitivity(net, answer, ratios=[0.5])
    assert {r.dense for r in rows} == {answer(net)}
    assert all(r.drop == r.dense - r.value for r in rows)
    assert len({r.value for r in rows}) == len(rows)
    turned = sensitivity(net, answer, ratios=[0.5], higher_is_better=False)
    assert [r.drop for r in turned] == [-r.drop for r in rows]


def test_the_model_stays_and_every_net_is_its_own(net) -> None:
    before = copy.deepcopy(net.state_dict())
    net.train()
    seen = []

    def spoil(small: DenseNet) -> float:
        assert not small.training
        seen.append(answer(small))
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
        return seen[-1]

    rows = sensitivity(net, spoil, ratios=[0.5])
    assert net.training
    net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert seen == [answer(net), *(r.value for r in rows)]


def test_order_counts_and_progress() -> None:
    net, calls, steps = made(bn_size=None), [], []

    def evaluate(small: DenseNet) -> float:
        calls.append(small)
        return float(len(calls))

    rows = sensitivity(
        net, evaluate, ratios=(0.9, 0.5, 0.95, 0.5), progress=lambda *step: steps.append(step)
    )
    # Of 8 units 0.9 and 0.95 ask for 7 and 8, and one must stay: the same cut, evaluated once.
    layer = [r for r in rows if r.name == "features.denseblock1.denselayer1.conv1"]
    assert [(r.ratio, r.units_cut) for r in layer] == [(0.5, 4), (0.9, 7), (0.95, 7)]
    assert layer[1].value == layer[2].value
    names = ["conv0", *(f"denseblock1.denselayer{i}.conv1" for i in (1, 2)), "transition1.conv"]
    names += [f"denseblock2.denselayer{i}.conv1" for i in (1, 2)]
    assert list(dict.fromkeys(r.name for r in rows)) == [f"features.{n}" for n in names]
    assert steps == [(i + 1, len(calls)) for i in range(len(calls))]


def test_a_ratio_too_small_for_a_group_has_no_row() -> None:
    rows = sensitivity(made(), answer, ratios=[0.04, 0.5], units=["stream"])
    assert {(r.name, r.units_cut) for r in rows if r.ratio == 0.04} == {
        ("features.conv0", 1),
        ("features.transition1.conv", 1),
    }


def test_a_reader_of_one_producer_keeps_a_channel() -> None:
    """norm5 reads the last layer only: all its 8 channels would leave the classifier nothing."""
    net = made()
    table = Units(net.config.graph())
    keep = np.ones(table.size, dtype=bool)
    edges = next(g for g in table.groups if g.name == "features.norm5")
    keep[edges.start : edges.start + 24] = False
    net = apply_plan(net, plan_of(subject(net), table, table.close(keep)))
    assert set(net.config.classifier_indices) == set(range(24, 32))
    rows = sensitivity(net, answer, ratios=[0.99], units=KINDS)
    last = [r for r in rows if r.name == "features.denseblock2.denselayer2.conv2"]
    assert [r.units_cut for r in last] == [7]
    assert all(math.isfinite(r.value) for r in rows)


@pytest.mark.parametrize("mfm", [{"transition1": "2/1"}, {"transition1": "3/2"}])
def test_mfm_units_are_tuples(mfm) -> None:
    net = made(mfm=mfm)
    row = next(r for r in sensitivity(net, answer, ratios=[0.5]) if "transition" in r.name)
    siblings = 2 if mfm["transition1"] == "2/1" else 3
    assert row.size * siblings == net.get_submodule("features.transition1.conv").weight.shape[0]
    assert row.units_cut == round(row.size / 2)


def test_protected_modules_have_no_rows(net) -> None:
    patterns = ["features.denseblock1.denselayer2", "*.norm5"]
    rows = sensitivity(net, answer, ratios=[0.5], units=KINDS, protect=patterns)
    names = {r.name for r in rows}
    assert "features.denseblock1.denselayer1.conv1" in names  # its bottleneck: read by nobody else
    assert "features.conv0" not in names  # denselayer2 reads it
    assert not any(n.startswith("features.denseblock1.denselayer2") for n in names)
    assert "features.transition1.conv" not in names  # norm5 reads it
    free = {r.name: r for r in sensitivity(net, answer, ratios=[0.5], units=KINDS)}
    assert all(r == free[r.name] for r in rows)


def test_criteria_that_read_images(net) -> None:
    images = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5) for _ in range(2)]
    rows = sensitivity(net.float(), lambda n: 0.0, criterion="taylor", calibration=images)
    net.double()
    assert rows
    with pytest.raises(PruningError, match="'taylor' needs calibration images"):
        sensitivity(net, answer, criterion="taylor")
    with pytest.raises(PruningError, match="calibration has no effect"):
        sensitivity(net, answer, calibration=images)


def test_random_follows_its_seed(net) -> None:
    found = [sensitivity(net, answer, criterion="random", seed=s, ratios=[0.5]) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_input_size_counts(net) -> None:
    def saved(size: int) -> list[int]:
        rows = sensitivity(net, answer, ratios=[0.5], units=["bottleneck"], input_size=size)
        return [r.macs_saved for r in rows]

    assert saved(16) == [4 * macs for macs in saved(8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": []}, r"ratios is \[\]; give a list of fractions"),
        ({"ratios": 0.5}, "ratios is 0.5; give a list"),
        ({"ratios": [0.5, 0]}, r"ratios: 0 must be a number in \(0, 1\)"),
        ({"ratios": [1.0]}, r"ratios: 1.0 must be"),
        ({"ratios": [50]}, r"did you mean 0.5\?"),
        ({"ratios": [float("nan")]}, "ratios: nan must be"),
        ({"ratios": [True]}, "ratios: True must be"),
        ({"ratios": ["0.5"]}, "ratios: '0.5' must be"),
        ({"criterion": "l3"}, "criterion 'l3' is unknown; choose from activation"),
        ({"units": "stream"}, "is one string; give a list"),
        ({"units": ["edges"]}, "units 'edges' is unknown; choose from stream"),
        ({"units": []}, "units is empty"),
        ({"protect": ["nobody"]}, "protect pattern 'nobody' matches no module"),
        ({"protect": ["features"]}, "leaves no channels of this DenseNet that could be cut"),
        ({"ratios": [0.01]}, r"ratios=\[0.01\] cut nothing"),
    ],
)
def test_bad_arguments_before_anything_is_evaluated(net, arguments, message) -> None:
    def never(_: DenseNet) -> float:
        raise AssertionError

    with pytest.raises(PruningError, match=message):
        sensitivity(net, never, **arguments)


def test_a_net_without_bottlenecks() -> None:
    with pytest.raises(PruningError, match="this net has none of them"):
        sensitivity(made(bn_size=None), answer, units=["bottleneck"])
    assert sensitivity(made(bn_size=None), answer)


def test_evaluate_must_give_a_number(net) -> None:
    with pytest.raises(PruningError, match="evaluate gave None for the dense net"):
        sensitivity(net, lambda _: None)
    with pytest.raises(PruningError, match="evaluate gave nan for the dense net"):
        sensitivity(net, lambda _: math.nan)
    with pytest.raises(PruningError, match="this Linear has no convolution"):
        sensitivity(nn.Linear(2, 2), answer)


def row(name: str, ratio: float, drop: float) -> SensitivityRow:
    return SensitivityRow(name, "stream", ratio, 8, 2, 1.0 - drop, 1.0, drop, 1, 1)


def test_ratios_within() -> None:
    rows = [row("a", 0.75, 0.3), row("a", 0.25, -0.1), row("a", 0.5, 0.2), row("b", 0.25, 0.4)]
    rows.append(row("c", 0.5, math.nan))
    assert ratios_within(rows, 0.2) == {"a": 0.5}
    assert ratios_within(rows, 0.0) == {"a": 0.25}
    assert ratios_within(rows, 1) == {"a": 0.75, "b": 0.25}
    assert ratios_within([], 0.1) == {}
    for wrong in (-0.1, math.nan, math.inf, "1"):
        with pytest.raises(PruningError, match=r"max_drop is .*; it must be a number"):
            ratios_within(rows, wrong)
