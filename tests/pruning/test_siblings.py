"""Scores of what competes, what may go, and what protection leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import masked, randomise_

from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import CRITERIA, apply_plan, make_plan
from prune_dn.pruning.budget import floor, losers
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.importance import importance
from prune_dn.pruning.parts import Group
from prune_dn.pruning.statistics import Wins
from prune_dn.pruning.units import Units

LAYER = "features.denseblock1.denselayer2"


def made(**options: object) -> DenseNet:
    """One MFM of each kind and place."""
    given = {"mfm": {"denseblock1.*": "2/1", "transition1": "3/2"},
             "mfm_skipped": {"denseblock1.denselayer2": "2/1", "classifier": "2/1"}, **options}  # fmt: skip
    net = densenet([2, 2], 6, bn_size=2, stem="cifar", num_classes=4, **given)
    return randomise_(net, 3).eval()


def batches(seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(3))


def group(units: Units, name: str) -> Group:
    return next(g for g in units.groups if g.name == name)


def scores_of(net: DenseNet, criterion: str) -> tuple[Units, np.ndarray]:
    units, data = Units(net.config.graph()), None
    if CRITERIA[criterion].need:
        data = read_batches([(x, torch.arange(3)) for x in batches()])
    return units, importance(net, units, criterion, calibration=data)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_siblings_share_what_their_unit_is_worth(criterion) -> None:
    units, scores = scores_of(made(), criterion)
    made_up = scores[group(units, f"{LAYER}.conv2").units]
    siblings = scores[group(units, f"{LAYER}.mfm").units].reshape(2, 3)
    np.testing.assert_allclose(siblings.sum(0), made_up, rtol=1e-6)
    edges = scores[group(units, f"{LAYER}.norm1").units]
    sides = scores[group(units, f"{LAYER}.read").units]  # 15 channels: pair 7 has one side
    np.testing.assert_allclose(sides[:7] + sides[8:], edges[:7], rtol=1e-6)
    if criterion != "mfm_win_rate":
        np.testing.assert_allclose(sides[7], edges[7], rtol=1e-6)
    if criterion not in ("mfm_win_rate", "random"):
        np.testing.assert_allclose(sides[:7], sides[8:], rtol=1e-6)


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale"])
def test_the_share_is_that_of_the_filters_weights(criterion) -> None:
    net = made()
    units, scores = scores_of(net, criterion)
    weight = net.get_submodule(f"{LAYER}.conv2").weight.detach().flatten(1).double()
    size = weight.abs().sum(1) if criterion == "l1" else weight.square().sum(1).sqrt()
    siblings = scores[group(units, f"{LAYER}.mfm").units].reshape(2, 3)
    expected = size.reshape(2, 3).numpy()
    np.testing.assert_allclose(siblings[0] / siblings[1], expected[0] / expected[1], rtol=1e-6)


def test_filters_without_weights_share_equally() -> None:
    net = made()
    with torch.no_grad():
        net.get_submodule(f"{LAYER}.conv2").weight.zero_()
    units, scores = scores_of(net, "l2")
    siblings = scores[group(units, f"{LAYER}.mfm").units].reshape(2, 3)
    np.testing.assert_allclose(siblings[0], siblings[1])


def test_the_win_rate_scores_margins() -> None:
    net = made()
    units, scores = scores_of(net, "mfm_win_rate")
    names = [f"{LAYER}.mfm", f"{LAYER}.read", "read"]
    found = collect(net, names, read_batches(batches()), Wins)
    for name in names:
        margins = found[name].margins.numpy()
        np.testing.assert_allclose(scores[group(units, name).units], margins, rtol=1e-6)
    edges = scores[group(units, "features.norm5").units]
    np.testing.assert_allclose(edges, found["read"].margins.reshape(2, -1).sum(0), rtol=1e-6)


def test_plain_readers_share_the_worth_of_a_unit() -> None:
    net = densenet([3], 6, bn_size=2, stem="cifar", num_classes=4, mfm={"*1": "2/1"})
    units, scores = scores_of(randomise_(net, 2).eval(), "mfm_win_rate")
    first = "features.denseblock1.denselayer1"
    made_up = scores[group(units, f"{first}.conv2").units]
    siblings = scores[group(units, f"{first}.mfm").units].reshape(2, 3)
    np.testing.assert_allclose(made_up, siblings.sum(0), rtol=1e-6)
    for reader in (LAYER, "features.denseblock1.denselayer3"):
        edges = scores[group(units, f"{reader}.norm1").units][12:15]
        np.testing.assert_allclose(edges, made_up / 3, rtol=1e-6)  # and the classifier


def test_three_siblings_are_judged_as_a_unit() -> None:
    net = made(mfm_skipped=None)
    units, scores = scores_of(net, "mfm_win_rate")
    name = "features.transition1.mfm"
    margins = collect(net, [name], read_batches(batches()), Wins)[name].margins.numpy()
    made_up = scores[group(units, "features.transition1.conv").units]
    np.testing.assert_allclose(made_up, margins.reshape(3, -1).sum(0), rtol=1e-6)


@pytest.mark.parametrize("criterion", ["l2", "mfm_win_rate", "random"])
def test_of_each_pair_the_least_important_goes(criterion) -> None:
    units, scores = scores_of(made(), criterion)
    lose = losers(units, scores, np.ones(units.size, dtype=bool))
    siblings = group(units, f"{LAYER}.mfm")
    expected = scores[siblings.units].reshape(2, 3).argmin(0)
    chosen = lose[siblings.units].reshape(2, 3)
    assert chosen.sum() == 3 and (chosen.argmax(0) == expected).all()
    sides = lose[group(units, f"{LAYER}.read").units]
    assert not sides[7] and (sides[:7] ^ sides[8:]).all()
    for other in units.groups:
        assert other.kind == "sibling" or lose[other.units].all()


def test_where_the_loser_may_not_go_the_other_may() -> None:
    units, scores = scores_of(made(), "l2")
    siblings = group(units, f"{LAYER}.mfm")
    may_go = np.ones(units.size, dtype=bool)
    loser = siblings.start + int(scores[siblings.units][[0, 3]].argmin()) * 3
    may_go[loser] = False
    lose = losers(units, scores, may_go)
    other = 2 * siblings.start + 3 - loser
    assert not lose[loser] and lose[other]
    may_go[other] = False
    assert not losers(units, scores, may_go)[[loser, other]].any()


def test_a_request_for_siblings_cuts_filters_and_nothing_else() -> None:
    net, x = made(mfm_skipped=None).double(), batches()[0].double()
    before = net.config
    plan = make_plan(
        net, 0.06, unit="macs", units=["sibling"], criterion="mfm_win_rate", calibration=batches()
    )
    filters = 12 * 9 * 32 * 32 / count(net).macs
    assert 0.06 <= plan.achieved["ratio"] < 0.06 + filters
    rows = [r for r in plan.layers if r["before"] != r["after"]]
    assert {r["kind"] for r in rows} == {"stream", "sibling"}
    assert all(r["name"].startswith("features.denseblock1") for r in rows)
    small = apply_plan(net, plan)
    single = [x.mfm_alone for x in small.config.blocks[0]]
    assert any(single)
    assert [x.out_channels for x in small.config.blocks[0]] == [
        x.out_channels for x in before.blocks[0]
    ]
    torch.testing.assert_close(small(x), masked(net, plan)(x))


def test_all_that_siblings_can_save_is_named() -> None:
    net = made(mfm_skipped=None)
    with pytest.raises(PruningError, match=r"cannot bring macs .*\((\d+\.\d)% fewer\)") as error:
        make_plan(net, 0.9, unit="macs", units=["sibling"], criterion="l2")
    most = float(str(error.value).split("(")[1].split("%")[0]) / 100
    plan = make_plan(net, most - 0.001, unit="macs", units=["sibling"], criterion="l2")
    assert [x.mfm for x in plan.config_after.blocks[0]] == [None, None]
    with pytest.raises(PruningError, match="cannot bring channels"):  # those of norms
        make_plan(net, 0.1, units=["sibling"], criterion="l2")


def test_a_side_that_reads_what_is_protected_stays() -> None:
    """Layer 2 reads 12 channels of the stem, which competes with layer 1's 3: the last lead alone."""
    net = made(mfm={"denseblock1.denselayer2": "2/1"})
    first = "features.denseblock1.denselayer1"
    for seed in range(4):
        plan = make_plan(
            net, 0.25, unit="macs", units=["sibling", "stream"], scope="local", criterion="random",
            protect=[f"{first}.conv2"], seed=seed,
        )  # fmt: skip
        reads = plan.keep_indices[f"{LAYER}.read"]
        config = plan.config_after
        width = config.num_init_features
        positions = {*config.blocks[0][1].input_indices, *(config.blocks[0][1].rival_indices or ())}
        assert config.blocks[0][0].out_channels == 6
        assert set(range(width, width + 6)) <= positions
        assert len(reads) < 18
        assert "it reads what is protected" in plan.protected[f"{LAYER}.read"]


def test_a_protected_reader_keeps_both_sides() -> None:
    for seed in range(4):
        plan = make_plan(
            made(), 0.2, unit="macs", units=["sibling", "stream"], scope="local",
            criterion="random", protect=[f"{LAYER}.norm1"], seed=seed,
        )  # fmt: skip
        assert f"{LAYER}.read" not in plan.keep_indices
        assert "features.conv0" not in plan.keep_indices  # on either side of the pairs
        assert "features.norm5" in plan.keep_indices
        assert "15 of 15 sibling units stay" in plan.protected[f"{LAYER}.read"]


def test_a_protected_conv_keeps_its_siblings() -> None:
    plan = make_plan(
        made(), 0.02, unit="macs", units=["sibling"], criterion="l2", protect=[f"{LAYER}.conv2"]
    )
    assert f"{LAYER}.mfm" not in plan.keep_indices
    assert "6 of 6 sibling units stay" in plan.protected[f"{LAYER}.mfm"]


@given(st.integers(0, 999), st.integers(1, 4), st.booleans())
def test_no_reader_falls_below_the_floor_whatever_goes(seed, least, guarded) -> None:
    """All that may go does, with random scores: of transitions and the classifier enough stays."""
    config = densenet([2, 1], 4, bn_size=2, stem="cifar", num_classes=3, mfm={"*1": "2/1"},
                      mfm_skipped={"*": "2/1"}).config  # fmt: skip
    units, generator = Units(config.graph()), np.random.default_rng(seed)
    scores, may_go = generator.random(units.size), np.ones(units.size, dtype=bool)
    for group_ in units.groups:
        may_go[group_.units] = group_.kind in ("stream", "sibling")
    if guarded:
        may_go &= generator.random(units.size) < 0.7
    may_go = losers(units, scores, may_go)
    fixed, spare = floor(units, scores, may_go, least)
    keep = units.close(~(may_go & ~fixed & ~spare))
    for selection in units.selections:
        edges = selection.edges
        if units.block_of[edges.start] < 0:
            assert keep[edges.units].sum() >= min(least, edges.size), edges.name


def test_what_does_not_compete_stays() -> None:
    net = made()
    plan = make_plan(
        net, 0.05, unit="macs", criterion="mfm_win_rate", calibration=batches(), units=["stream"]
    )
    changed = {name for name in plan.keep_indices if name.endswith(("conv0", "conv2", ".conv"))}
    assert changed and changed <= {
        "features.denseblock1.denselayer1.conv2", f"{LAYER}.conv2", "features.transition1.conv",
    }  # fmt: skip
    assert "12 of 12 stream units stay: they do not compete" in plan.protected["features.conv0"]


@pytest.mark.parametrize(
    ("options", "units", "text"),
    [
        ({"mfm": None, "mfm_skipped": None}, ["stream"], "this net has no MFM; choose another"),
        ({}, ["bottleneck"], r"none among units=\['bottleneck'\] that may go"),
        ({"mfm": None, "mfm_skipped": None}, ["sibling"], "siblings are those of an MFM 2/1"),
        ({"mfm": {"*": "3/2"}, "mfm_skipped": None}, ["sibling"], "siblings are those of an MFM"),
    ],
)
def test_nothing_to_judge(options, units, text) -> None:
    with pytest.raises(PruningError, match=text):
        make_plan(
            made(**options), 0.1, units=units, criterion="mfm_win_rate", calibration=batches()
        )


def test_the_win_rate_needs_images() -> None:
    with pytest.raises(PruningError, match="'mfm_win_rate' needs calibration images"):
        make_plan(made(), 0.1, units=["sibling"], criterion="mfm_win_rate")


def test_rounds_go_on_where_the_last_one_ended() -> None:
    net, x = made().double(), batches()[0].double()
    first = count(net, 8).macs
    for round_ in range(1, 4):
        plan = make_plan(
            net, 0.2 * round_, unit="macs", criterion="l2", baseline=made().config,
            units=["sibling", "stream", "edge"], seed=round_, input_size=8,
        )  # fmt: skip
        expected = masked(net, plan)(x)
        net = apply_plan(net, plan)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
        assert count(net, 8).macs <= (1 - 0.2 * round_) * first
