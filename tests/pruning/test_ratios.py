"""Plans by measured drops: one tolerance for all groups, the smallest that meets the budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from oracle import randomise_
from torchvision.models import resnet18

from prune_dn.errors import PruningError
from prune_dn.measure.profiling import count
from prune_dn.models import DenseNet, DenseNetConfig, densenet
from prune_dn.pruning import Plan, make_plan, prune
from prune_dn.pruning.arrange import arranged
from prune_dn.pruning.config import KINDS
from prune_dn.pruning.importance import importance
from prune_dn.pruning.kept import indices_of
from prune_dn.pruning.ratios import FORMAT, SensitivityRow
from prune_dn.pruning.units import Units

RATIOS = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def net() -> DenseNet:
    return randomise_(densenet([3, 3], 8, bn_size=2, stem="cifar", num_classes=5), 3).eval()


def measured(net: DenseNet, drops, kinds=KINDS, ratios=RATIOS) -> list[SensitivityRow]:
    """A row per group and ratio; `drops(group's number, ratio)` says what it costs."""
    return [
        SensitivityRow(
            g.name, g.kind, r, g.size, round(r * g.size), 0.0, 0.0, float(drops(n, r)), 1, 1
        )
        for n, g in enumerate(Units(net.config.graph()).groups)
        if g.kind in kinds
        for r in ratios
    ]


def uneven(group: int, ratio: float) -> float:
    """Another steepness and bend per group; some fall between two ratios, some are below 0."""
    draws = np.random.default_rng(group).uniform(-0.1, 1.0, size=3)
    return float((1 + group % 5) * draws[RATIOS.index(ratio)])


def rising(group: int, ratio: float) -> float:
    """The same, but every further unit costs more, so that no two units tie."""
    return 0.01 * group + sum(abs(uneven(group, r)) + 0.001 for r in RATIOS if r <= ratio)


def by_hand(net: DenseNet, rows: list[SensitivityRow], kinds, target: float) -> DenseNetConfig:
    """Every tolerance is tried, from the smallest: no ranking, no bisection."""
    table = Units(net.config.graph())
    scores = importance(net, table, "l2")
    counts = []  # per group of these kinds: how much each number of cut units costs
    for group in table.groups:
        points = [(0, 0.0)]
        for row in rows:
            if row.name == group.name and row.kind in kinds:
                points.append((row.units_cut, max(points[-1][1], row.drop)))
        costs = []
        for (a, low), (b, high) in itertools.pairwise(points):
            costs += [low + (high - low) * (k - a) / (b - a) for k in range(a + 1, b + 1)]
        counts.append(costs)
    for tolerance in sorted({cost for costs in counts for cost in costs}):
        keep = np.ones(table.size, dtype=bool)
        for group, costs in zip(table.groups, counts, strict=True):
            least = np.argsort(scores[group.units])[: sum(c <= tolerance for c in costs)]
            keep[group.start + least] = False
        keep = table.close(keep)
        after = net.config.after(indices_of(arranged(table, keep), keep))
        if count(after, 32).macs <= target:
            return after
    raise AssertionError("out of reach")


@pytest.mark.parametrize("kinds", [("stream", "bottleneck"), ("edge",), ("bottleneck", "edge")])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45])
def test_one_tolerance_the_smallest_that_meets_the_budget(net, kinds, ratio) -> None:
    rows = measured(net, rising)
    plan = make_plan(net, ratio, unit="macs", criterion="l2", units=kinds, ratios=rows)
    expected = by_hand(net, rows, kinds, (1 - ratio) * count(net).macs)
    assert plan.config_after == expected
    assert plan.requested["ratios"] == "rows of sensitivity"


def test_a_drop_that_falls_again_counts_as_the_largest_before(net) -> None:
    falling = measured(net, lambda n, r: 1 + n % 3 - r * (n % 2))
    flat = []
    for row in falling:
        before = [r.drop for r in falling if r.name == row.name and r.ratio <= row.ratio]
        flat.append(dataclasses.replace(row, drop=max(before)))
    assert flat != falling
    plans = [make_plan(net, 0.4, unit="macs", ratios=rows) for rows in (falling, flat)]
    assert plans[0].keep_indices == plans[1].keep_indices


def test_where_nothing_costs_anything_the_same_share_goes_everywhere(net) -> None:
    rows = measured(net, lambda n, r: -0.5, ratios=(0.75,))
    plan = make_plan(net, 0.4, unit="macs", criterion="l1", ratios=rows)
    local = make_plan(net, 0.4, unit="macs", criterion="l1", scope="local")
    assert plan.keep_indices == local.keep_indices


def test_what_was_not_measured_stays(net) -> None:
    rows = measured(net, uneven)
    spared = "features.denseblock1.denselayer2.conv2"
    rows = [row for row in rows if row.name != spared]
    # No figure at half of the second layer's bottleneck: nothing beyond a quarter of its 16.
    narrow = "features.denseblock1.denselayer2.conv1"
    rows = [
        dataclasses.replace(r, drop=math.nan) if r.name == narrow and r.ratio == 0.5 else r
        for r in rows
    ]
    plan = make_plan(net, 0.5, unit="macs", criterion="l2", ratios=rows)
    after = {row["name"]: row["after"] for row in plan.layers}
    assert after[spared] == 8 and after[narrow] >= 12
    with pytest.raises(PruningError, match=r"the largest measured ratios, the protected .* allow"):
        make_plan(net, 0.99, unit="macs", ratios=rows)


def test_protect_and_min_channels_hold(net) -> None:
    rows = measured(net, lambda n, r: n * r)
    plan = make_plan(
        net, 0.3, unit="macs", ratios=rows, protect=["*.denselayer1"], min_channels=5, round_to=5
    )
    changed = [r for r in plan.layers if r["before"] != r["after"] and r["kind"] != "edge"]
    assert changed and all(r["after"] % 5 == 0 for r in changed)
    assert not any("denselayer1" in r["name"] for r in changed)


def as_file(path: Path, net: DenseNet, measured: list[SensitivityRow], **changes) -> Path:
    facts = {
        "format": FORMAT,
        "params": count(net).params,
        "rows": [dataclasses.asdict(r) for r in measured],
        **changes,
    }
    text = json.dumps(facts).replace("NaN", "null")
    path.write_text(text)
    return path


def test_a_file_gives_the_plan_of_its_rows(net, tmp_path) -> None:
    rows = measured(net, uneven)
    rows[4] = dataclasses.replace(rows[4], drop=math.nan)
    path = as_file(tmp_path / "sensitivity.json", net, rows)
    plan = make_plan(net, 0.3, unit="params", ratios=path)
    assert plan.keep_indices == make_plan(net, 0.3, unit="params", ratios=rows).keep_indices
    assert plan.requested["ratios"] == str(path)
    assert Plan.from_json(plan.to_json()) == plan
    assert prune(net, 0.3, unit="params", ratios=str(path)).config == plan.config_after


def test_another_net_is_refused(net, tmp_path) -> None:
    rows = measured(net, uneven)
    wider = densenet([3, 3], 12, bn_size=2, stem="cifar", num_classes=5)
    with pytest.raises(PruningError, match=r"another net: 16 stream units in features.conv0, here"):
        make_plan(wider, 0.3, ratios=rows)
    shorter = densenet([2, 3], 8, bn_size=2, stem="cifar", num_classes=5)
    with pytest.raises(PruningError, match=r"another net: .*denselayer3.*, here are none"):
        make_plan(shorter, 0.3, ratios=[r for r in rows if ".denselayer3." in r.name])
    # All of its groups are in a longer net as well; only the size of the whole net tells.
    longer = densenet([3, 4], 8, bn_size=2, stem="cifar", num_classes=5)
    rows = measured(net, uneven, ("stream", "bottleneck"))
    make_plan(longer, 0.1, ratios=rows)
    path = as_file(tmp_path / "s.json", net, rows)
    with pytest.raises(PruningError, match=r"s.json was measured on another net: [\d,]+ params"):
        make_plan(longer, 0.1, ratios=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ["a"]}, r"a row with name \['a'\], which is no str"),
        ({"name": None}, "a row with name (None|nan), which is no str"),
        ({"kind": {}}, "a row with kind {}, which is no str"),
        ({"size": 8.0}, "a row with size 8.0, which is no int"),
        ({"size": True}, "a row with size True, which is no int"),
        ({"units_cut": "3"}, "a row with units_cut '3', which is no int"),
        ({"units_cut": 10**400}, "a row with units_cut 10*, which is no int"),
        ({"units_cut": 17}, "a row with units_cut 17, of 16 units"),
        ({"units_cut": -1}, "a row with units_cut -1, of 16 units"),
        ({"drop": [0.1]}, r"a row with drop \[0.1\], which is no float"),
        ({"drop": 10**400}, "a row with drop 10*, which is no float"),
    ],
)  # fmt: skip
def test_rows_of_another_shape(net, tmp_path, changes, message) -> None:
    rows = measured(net, uneven, ("stream",))
    rows[0] = dataclasses.replace(rows[0], **changes)
    with pytest.raises(PruningError, match=f"ratios has {message}; run `prune-dn sensitivity`"):
        make_plan(net, 0.1, ratios=rows, units=["stream"])
    path = as_file(tmp_path / "s.json", net, rows)
    with pytest.raises(PruningError, match=message):
        make_plan(net, 0.1, ratios=path, units=["stream"])


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"a":' * 50_000, "", "9" * 5000])
def test_files_of_another_shape(net, tmp_path, text) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(PruningError, match=r"cannot read ratios from .*s.json: .*; give the"):
        make_plan(net, 0.1, ratios=tmp_path / "s.json")
    (tmp_path / "s.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PruningError, match="cannot read ratios from"):
        make_plan(net, 0.1, ratios=tmp_path / "s.json")


def test_ratios_that_cannot_be_used(net, tmp_path) -> None:
    rows = measured(net, uneven, ("stream",))
    path = as_file(tmp_path / "s.json", net, rows)
    for arguments, message in [
        ({}, "s.json has measured no bottleneck units.* --units stream,bottleneck"),
        ({"scope": "local"}, "scope='local' has no effect with ratios"),
        ({"units": ["stream", "layer"]}, "units 'layer' and ratios do not go together"),
        ({"ratios": tmp_path / "none.json"}, "cannot read ratios from .*none.json: .*No such file"),
        ({"ratios": tmp_path}, "cannot read ratios from"),
        ({"ratios": [0.5]}, "ratios holds 0.5; give the rows"),
    ]:
        with pytest.raises(PruningError, match=message):
            make_plan(net, 0.3, **{"ratios": path, **arguments})
    for changes in ({"format": "x"}, {"rows": [{"name": "a"}]}, {"rows": None}, {"params": "x"}):
        broken = as_file(tmp_path / "b.json", net, rows, **changes)
        with pytest.raises(PruningError, match=r"cannot read ratios from .*b.json: .*; give the"):
            make_plan(net, 0.3, ratios=broken, units=["stream"])
    assert make_plan(net, 0.1, ratios=path, units=["stream"])
    basic = randomise_(densenet([2], 8, bn_size=None, stem="cifar", num_classes=5), 1)
    rows = measured(basic, uneven, ("stream",))
    assert make_plan(basic, 0.1, ratios=rows)  # the default units, of which it has no bottleneck
    with pytest.raises(PruningError, match="was measured on another net: 16 stream units in"):
        prune(resnet18(), 0.3, ratios=path, input_size=32)
