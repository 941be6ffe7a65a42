"""Requests, budgets, protection and errors of `make_plan`."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import strategies as st
from oracle import randomise_
from properties import counted, feasible
from torch import nn

from prune_dn.errors import ConversionError, PruningError
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet, densenet, densenet40, densenet_bc100
from prune_dn.pruning import CRITERIA, Plan, apply_plan, make_plan, prune


@pytest.fixture(scope="module")
def net() -> DenseNet:
    made = densenet([3, 3], 8, bn_size=2, stem="cifar", num_classes=5)
    randomise_(made, 3)
    return made.eval()


@pytest.mark.parametrize("unit", ["channels", "params", "macs"])
@pytest.mark.parametrize("scope", ["global", "local"])
# Nothing competes here, so there is nothing to win.
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"mfm_win_rate"}))
def test_the_budget_is_met_within_one_unit(net, unit, scope, criterion) -> None:
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))] if CRITERIA[criterion].need else None
    plan = make_plan(net, 0.4, unit=unit, scope=scope, criterion=criterion, calibration=batches)
    whole = getattr(count(net), unit)
    after = getattr(count(plan.config_after), unit)
    assert after == plan.achieved["after"][unit]
    assert plan.achieved["ratio"] == pytest.approx(1 - after / whole)
    # The dearest unit: a filter of the first layer, 16 x 9 weights, read by two layers (16 weights
    # each) and the transition (20). A whole layer goes only if that does not overshoot by more.
    weights = 16 * 9 + 2 * 16 + 20
    dearest = {"channels": 4, "params": weights + 2 * 3, "macs": weights * 1024}
    assert after <= 0.6 * whole < after + dearest[unit]


@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.6, 0.7])
def test_an_edge_that_would_bring_down_much_more_stays(net, ratio) -> None:
    """The last reader of a filter takes it along, that of a layer the layer: others go instead."""
    plan = make_plan(net, ratio, unit="macs", units=["edge"], criterion="lamp")
    missed = (plan.achieved["ratio"] - ratio) * plan.achieved["baseline"]["macs"]
    assert 0 <= missed < 20 * 1024, "the dearest edge: the first transition's"


def test_whole_layers_go_where_they_do_not_pay_for_their_upkeep() -> None:
    net = densenet([4, 4], 6, bn_size=4, stem="cifar", num_classes=5)
    block, transition = net.features.denseblock1, net.features.transition1
    # Nobody cares for what layer 2 of block 1 makes: positions 18 to 23 of the stream.
    for norm in (block.denselayer3.norm1, block.denselayer4.norm1, transition.norm):
        norm.weight.data[18:24] = 0.05
    assert net.config.num_init_features == 12
    plan = make_plan(net, 0.25, unit="macs", units=["stream", "layer"])
    gone = {r["name"] for r in plan.layers if r["after"] == 0}
    assert gone == {f"features.denseblock1.denselayer2.{x}" for x in ("norm1", "conv1", "conv2")}
    assert all(r["after"] for r in make_plan(net, 0.25, unit="macs").layers)
    # The layer alone saves a fifth: where less is asked for, nothing else has to go.
    less = make_plan(net, 0.15, unit="macs", units=["stream", "layer"])
    assert {r["name"] for r in less.layers if r["after"] == 0} == gone
    assert [len(block) for block in less.config_after.blocks] == [3, 4]
    assert all(layer.out_channels == 6 for layer in sum(less.config_after.blocks, ()))


def test_local_scope_cuts_the_same_share_everywhere() -> None:
    plan = make_plan(densenet_bc100(), 0.5, scope="local", criterion="l1")
    for row in plan.layers:
        if row["kind"] != "edge":
            assert row["after"] / row["before"] == pytest.approx(0.5, abs=1 / row["before"])


def test_the_least_important_go() -> None:
    net = densenet([1], 8, bn_size=None, stem="cifar", num_classes=3)
    with torch.no_grad():
        net.features.norm5.weight.copy_(torch.arange(24.0))
        net.features.denseblock1.denselayer1.norm1.weight.fill_(0.5)
    plan = make_plan(net, 0.19, units=["edge"])
    # 8 of 40 edges: the two of norm5 below 0.5 are 0; then 0.5 x 16 ties in the layer, first first.
    assert plan.keep_indices["features.norm5"][0] == 1
    assert plan.achieved["after"]["channels"] == 32


def test_random_follows_its_seed(net) -> None:
    plans = [make_plan(net, 0.4, criterion="random", seed=s) for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("round_to", [2, 3, 4, 8])
def test_cut_widths_are_multiples(round_to) -> None:
    net = randomise_(densenet([3, 3], 12, bn_size=2, stem="cifar", num_classes=5), 1)
    plan = make_plan(net, 0.3, round_to=round_to)
    changed = [r for r in plan.layers if r["kind"] != "edge" and r["before"] != r["after"]]
    assert changed
    assert all(row["after"] % round_to == 0 for row in changed)


def test_growth_12_rounds_to_8_only() -> None:
    plan = make_plan(densenet40(), 0.3, round_to=8, criterion="random")
    layers = {r["after"] for r in plan.layers if r["kind"] == "stream" and r["before"] == 12}
    assert layers == {8, 12}


@counted(
    st.integers(1, 6),
    st.sampled_from(["global", "local"]),
    st.floats(0.1, 1),
    st.booleans(),
    st.booleans(),
)
def test_no_width_falls_below_the_floor(least, scope, ratio, edges, layers) -> int:
    net = randomise_(densenet([3, 2], 6, bn_size=2, stem="cifar", num_classes=5), 2)
    kinds = ["stream", "bottleneck", *(["edge"] if edges else [])]
    kinds += ["layer"] if layers and scope == "global" else []
    request = {"pruning_ratio": ratio, "min_channels": least, "scope": scope, "units": kinds}
    found = feasible(functools.partial(make_plan, net), request, {"cannot bring": {}})
    if found is None:
        return 0
    plan = found[0]
    for row in plan.layers:
        # Cut by edges, a stream channel may lose its last reader: then it goes, floor or not.
        if not (edges and row["kind"] == "stream") and row["after"]:
            assert row["after"] >= least
        assert row["after"] or edges or ("layer" in kinds and gone_whole(plan, row["name"]))
    return 1


def gone_whole(plan: Plan, name: str) -> bool:
    layer = name.rpartition(".")[0]
    rows = [row for row in plan.layers if row["name"].startswith(f"{layer}.")]
    return "denselayer" in layer and all(row["after"] == 0 for row in rows)


def test_protected_modules_keep_every_weight(net) -> None:
    patterns = ["features.denseblock1.denselayer2", "*.norm5"]
    plan = make_plan(net, 0.15, protect=patterns)
    small, before = apply_plan(net, plan), net.state_dict()
    for key, value in small.state_dict().items():
        if "denseblock1.denselayer2" in key or "norm5" in key or key.startswith("classifier"):
            assert torch.equal(value, before[key])
    reason = plan.protected["features.conv0"]
    assert "16 of 16 stream units stay" in reason
    assert "protected by 'features.denseblock1.denselayer2'" in reason


def test_the_stems_norm_can_be_protected() -> None:
    net = randomise_(densenet([2, 2], 8, bn_size=2, num_classes=5), 4)
    assert "features.conv0" in make_plan(net, 0.5, criterion="random").keep_indices
    plan = make_plan(net, 0.3, criterion="random", protect=["features.norm0"])
    assert "features.conv0" not in plan.keep_indices
    assert set(plan.protected) == {"features.conv0"}


def test_without_protection_the_same_request_cuts_there(net) -> None:
    plan = make_plan(net, 0.3)
    assert plan.protected == {}
    assert any("denseblock1.denselayer2" in name for name in plan.keep_indices)


def test_iterating_reaches_the_ratio_of_the_original(net) -> None:
    first = prune(net, 0.3, unit="macs")
    plan = make_plan(first, 0.5, unit="macs", baseline=net.config)
    assert plan.achieved["ratio"] == pytest.approx(0.5, abs=0.02)
    assert count(plan.config_after).macs <= 0.5 * count(net).macs
    with pytest.raises(PruningError, match="reached already"):
        make_plan(first, 0.2, unit="macs", baseline=net.config)


def test_a_plan_survives_its_file(net, tmp_path) -> None:
    plan = make_plan(net, 0.4, protect=["features.conv0"])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "bad.json").write_text('{"format": "other"}')
    with pytest.raises(PruningError, match=r"cannot read the plan .*bad\.json"):
        Plan.load(tmp_path / "bad.json")
    with pytest.raises(PruningError, match="cannot read the plan"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0, "nothing would be cut"),
        (0.0, "nothing would be cut"),
        (1, "must lie in"),
        (1.0, "must lie in"),
        (-0.1, "must lie in"),
        (50, "did you mean 0.5"),
        (float("nan"), "must be a number"),
        ("50", "must be a number"),
        (True, "must be a number"),
        (None, "must be a number"),
        (0.99, "cannot bring channels"),
    ],
)
def test_impossible_ratios(net, ratio, text) -> None:
    with pytest.raises(PruningError, match=text):
        make_plan(net, ratio)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"unit": "flops"}, "unit 'flops' is unknown; choose from channels, params, macs"),
        ({"scope": "all"}, "choose from global, local"),
        ({"criterion": "l3"}, "choose from activation, bn_scale"),
        ({"units": ["stream", "filters"]}, "choose from stream, bottleneck, edge"),
        ({"units": []}, "nothing may be cut"),
        ({"units": "stream"}, "give a list"),
        ({"protect": "features.conv0"}, "give a list"),
        ({"protect": ["features.convO"]}, "'features.convO' matches no module"),
        ({"units": ["layer", "edge"]}, "needs 'stream' among the units"),
        ({"units": ["layer", "stream"], "scope": "local"}, "and scope 'global'"),
        ({"min_channels": 0}, "min_channels is 0"),
        ({"round_to": 2.0}, "round_to is 2.0"),
        ({"round_to": 1000}, "larger than every width"),
        ({"protect": ["features"]}, "leaves no channels of this DenseNet"),
        ({"min_channels": 1000}, "cannot bring"),
    ],
)
def test_impossible_arguments(net, arguments, text) -> None:
    with pytest.raises(PruningError, match=text):
        make_plan(net, 0.5, **arguments)


def test_a_net_without_bottlenecks_says_so() -> None:
    with pytest.raises(PruningError, match="basic layer has no bottleneck"):
        make_plan(densenet40(), 0.5, units=["bottleneck"])


def test_weights_that_are_not_finite(net) -> None:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.features.denseblock2.denselayer1.norm1.weight[3] = float("nan")
    with pytest.raises(PruningError, match=r"denseblock2.denselayer1.norm1.weight holds 1 NaN"):
        make_plan(broken, 0.5)


def test_all_scales_zero_or_tied_still_meets_the_budget(net) -> None:
    tied = copy.deepcopy(net)
    with torch.no_grad():
        for module in tied.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.zero_()
                module.bias.fill_(50.0)
    plan = make_plan(tied, 0.5, unit="macs")
    assert 0.5 <= plan.achieved["ratio"] < 0.56


def test_other_models_are_refused() -> None:
    with pytest.raises(PruningError, match="size of images is needed for a Sequential"):
        make_plan(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5)
    with pytest.raises(PruningError, match="0 stays: an output of the net"):
        make_plan(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5, input_size=8)
    with pytest.raises(ConversionError, match=r"model\.module"):
        make_plan(nn.DataParallel(densenet40()), 0.5)


def test_a_plan_is_shown_in_one_line() -> None:
    plan = make_plan(densenet([2, 2], 8, stem="cifar", num_classes=10), 0.5, unit="macs")
    before, after = (plan.achieved[x]["macs"] for x in ("before", "after"))
    cut = sum(row["after"] < row["before"] for row in plan.layers)
    assert repr(plan) == (
        f"<Plan: {plan.achieved['ratio']:.1%} of macs removed, {before:,} -> {after:,} MACs, {cut} of "
        f"{len(plan.layers)} groups of units cut>"
    )
