"""A plan whose parts do not belong together is refused; whatever is read cuts the same net."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import masked, randomise_
from strategies import edited, pruned_configs

from prune_dn.errors import PruningError
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import Plan, apply_plan, make_plan, settling_plan
from prune_dn.pruning.config import KINDS
from prune_dn.pruning.kept import indices_of, units_of
from prune_dn.pruning.units import Units

MFM = {"mfm": {"denseblock1.*": "2/1", "transition1": "2/1"}}
SKIPPED = {"mfm_skipped": {"denseblock2.*": "2/1", "transition1": "2/1", "classifier": "2/1"}}
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def net_with(**options: Any) -> DenseNet:
    made = densenet([3, 2], 6, bn_size=2, stem="cifar", num_classes=4, **options)
    return randomise_(made, 5).eval()


@functools.cache
def cases() -> list[tuple[DenseNet, Plan, DenseNet]]:
    """Plans of every kind: each with its net, and what it cuts of it."""
    plain, three = net_with(), net_with(mfm={"*": "3/2"})
    rivals = net_with(**MFM, **SKIPPED)
    basic = randomise_(densenet([2, 2], 5, bn_size=None, stem="imagenet", num_classes=3), 1).eval()
    loner = apply_plan(
        rivals, make_plan(rivals, 0.1, unit="params", units=["sibling"], criterion="l1")
    )
    requests: list[tuple[DenseNet, float, dict[str, Any]]] = [
        (plain, 0.4, {"unit": "macs"}),
        (plain, 0.3, {"units": ["edge"], "criterion": "l1"}),
        (plain, 0.5, {"units": ["stream", "bottleneck", "edge"], "scope": "local"}),
        (plain, 0.5, {"units": ["stream", "layer"], "unit": "params", "input_size": (16, 8)}),
        (three, 0.4, {"units": ["stream", "bottleneck", "edge"], "protect": ["*transition1"]}),
        (rivals, 0.4, {"units": KINDS, "criterion": "l2", "unit": "params"}),
        (loner, 0.3, {"units": KINDS, "criterion": "random"}),
        (basic, 0.4, {"units": ["stream", "edge"]}),
    ]
    plans = [(net, make_plan(net, ratio, **request)) for net, ratio, request in requests]
    plans.append((rivals, settling_plan(rivals, [IMAGES])))
    return [(net, plan, apply_plan(net, plan)) for net, plan in plans]


@given(pruned_configs(), st.integers(0, 99), st.floats(0.2, 1), st.sampled_from([*KINDS, None]))
def test_indices_and_units_say_the_same(config, seed, share, only) -> None:
    units = Units(config.graph())
    drawn = np.random.default_rng(seed).random(units.size) < share
    for group in units.groups:
        if only not in (None, group.kind):
            drawn[group.units] = True
    keep = units.close(drawn)
    assert (units_of(units, indices_of(units, keep)) == keep).all()


def same(small: DenseNet, other: DenseNet) -> bool:
    mine, theirs = small.state_dict(), other.state_dict()
    equal = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    return small.config == other.config and equal


def test_a_file_that_was_changed_is_refused_or_cuts_the_same_net() -> None:
    ends: Counter[str] = Counter()

    @settings(max_examples=max(150, settings().max_examples))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        net, plan, small = data.draw(st.sampled_from(cases()), label="case")
        document = data.draw(edited(json.loads(plan.to_json())))
        try:
            cut = apply_plan(net, Plan.from_json(json.dumps(document)))
        except PruningError:
            ends["refused"] += 1
            return
        ends["taken"] += 1
        assert same(cut, small)

    check()
    assert ends["refused"] > 100 and ends["taken"] > 0, ends


def test_a_plan_that_was_edited_by_hand_is_refused_or_carried_out() -> None:
    """Without a digest another plan may come of it: what it says it keeps is what is left."""
    ends: Counter[str] = Counter()

    @settings(max_examples=max(400, settings().max_examples))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        net, plan, small = data.draw(st.sampled_from(cases()), label="case")
        document = json.loads(plan.to_json())
        del document["digest"]
        if data.draw(st.booleans()):
            document = data.draw(edited(document))
        else:  # another channel in the place of one
            kept = data.draw(st.sampled_from([x for x in document["keep_indices"].values() if x]))
            kept.remove(data.draw(st.sampled_from(kept)))
            kept.append(data.draw(st.sampled_from(sorted({*range(30)} - {*kept}))))
            kept.sort()
        try:
            found = Plan.from_json(json.dumps(document))
            cut = apply_plan(net, found)
        except PruningError:
            ends["refused"] += 1
            return
        ends["same" if found.keep_indices == plan.keep_indices else "other"] += 1
        assert found.layers == plan.layers and cut.config == small.config
        assert Plan.from_json(found.to_json()) == found
        x = IMAGES[:2].double()
        torch.testing.assert_close(
            cut.double()(x), masked(copy.deepcopy(net).double(), found)(x), rtol=1e-9, atol=1e-9
        )

    check()
    assert ends["refused"] > 100 and ends["same"] > 50 and ends["other"] > 0, ends


def test_plans_of_every_kind_come_back_from_json() -> None:
    for net, plan, small in cases():
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert same(apply_plan(net, again), small)
    sizes = [plan.requested.get("input_size") for _, plan, _ in cases()]
    assert [16, 8] in sizes


def test_what_disagrees_is_named() -> None:
    net, plan, _ = cases()[2]
    first = "features.conv0"

    def fails(match: str, **parts: Any) -> None:
        with pytest.raises(PruningError, match=match):
            dataclasses.replace(plan, **parts)

    kept = plan.keep_indices
    assert 0 < len(kept[first]) < 12
    fails(f"{first} must be different integers from 0 to 11", keep_indices={**kept, first: (0, 0)})
    fails(f"{first} must be different integers from 0 to 11", keep_indices={**kept, first: (0, 12)})
    fails(f"{first} must be different integers", keep_indices={**kept, first: (0, True)})
    fails(f"{first} must be different integers", keep_indices={**kept, first: "012"})
    fails("name 'features.conv1', which config_before", keep_indices={**kept, "features.conv1": ()})
    fails(
        r"disagree: features.denseblock1\.\S+ keeps what goes with what other modules lose, its edge "
        r"unit \d+",
        keep_indices={**kept, first: kept[first][1:]},
    )
    fails(r"norm1 are not in the order of", keep_indices={**kept, first: kept[first][::-1]})
    fails("keep_indices is None; it must be a mapping", keep_indices=None)
    fails("two descriptions of nets, not a DenseNet", config_before=net)
    classes = dataclasses.replace(plan.config_after, num_classes=3)
    fails("config_after is not .*: num_classes is 3, it must be 4", config_after=classes)
    layers = plan.config_after.blocks[1]
    wider = (dataclasses.replace(layers[0], bottleneck=99), *layers[1:])
    wide = dataclasses.replace(plan.config_after, blocks=(plan.config_after.blocks[0], wider))
    fails(r"blocks\[1\]\[0\].bottleneck is 99, it must be \d+", config_after=wide)
    fails("requested of a plan must fit into JSON", requested={"a": torch.zeros(1)})
    fails(
        "achieved baseline.channels of a plan is None", achieved={**plan.achieved, "baseline": {}}
    )
    fails(r"protected\['a'\] of a plan is 3; it must be a text", protected={"a": 3})
    with pytest.raises(PruningError, match="the plan is a str; give a Plan"):
        apply_plan(net, "plan.json")
    edit = dataclasses.replace(plan)
    edit.keep_indices[first] = (0, 1)
    with pytest.raises(PruningError, match="keep_indices disagree"):
        apply_plan(net, edit)
    nothing = {group.name: () for group in Units(net.config.graph()).groups}
    fails("keep_indices leave no net that can be built", keep_indices=nothing)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda plan: plan.pop("format"), "its format is not"),
        (lambda plan: plan.pop("achieved"), "it has no 'achieved'"),
        (lambda plan: plan.update(more=1), "it has an unknown 'more'"),
        (lambda plan: plan.update(keep_indices=[]), "keep_indices is .*; it must be a mapping"),
        (
            lambda plan: plan.update(digest="0"),
            "it is not what was written: its digest differs .leave out 'digest'",
        ),
    ],
)
def test_files_that_are_no_plan(edit, text) -> None:
    document = json.loads(cases()[0][1].to_json())
    if "digest" not in text:
        del document["digest"]
    edit(document)
    with pytest.raises(PruningError, match=f"^not a plan of prune_dn: {text}"):
        Plan.from_json(json.dumps(document))


def test_plans_of_whole_units_that_are_older_name_no_siblings() -> None:
    net = net_with(**MFM)
    plan = make_plan(net, 0.3, unit="params")
    document = json.loads(plan.to_json())
    siblings = [name for name in document["keep_indices"] if name.endswith(".mfm")]
    assert siblings
    for name in ("digest", *siblings):
        (document if name == "digest" else document["keep_indices"]).pop(name)
    assert Plan.from_json(json.dumps(document)) == plan
