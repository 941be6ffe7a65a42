"""The order of channels: fewer ranges for readers that select, and the same answers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import masked, randomise_
from other_nets import Layer
from torch import nn

import prune_dn
from prune_dn.graph.pieces import ranges_of
from prune_dn.models import DenseNet, densenet
from prune_dn.models.dense_net import ReadStream
from prune_dn.pruning import Plan, apply_plan, compensate_plan, make_plan
from prune_dn.pruning.arrange import arranged, fewest_ranges
from prune_dn.pruning.plan import plan_of
from prune_dn.pruning.subject import subject
from prune_dn.pruning.units import Units

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def ranges(reads: np.ndarray) -> int:
    return sum(len(ranges_of(np.flatnonzero(row).tolist())) for row in reads if row.any())


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_an_order_is_nearly_the_best(readers: int, channels: int, seed: int) -> None:
    reads = np.random.default_rng(seed).random((readers, channels)) < 0.5
    order = fewest_ranges(reads)
    assert sorted(order.tolist()) == list(range(channels))
    every = itertools.permutations(range(channels))
    best = min(ranges(reads[:, list(permutation)]) for permutation in every)
    found, before = ranges(reads[:, order]), ranges(reads)
    assert best <= found <= min(before, best + 1)
    if found == before:
        assert order.tolist() == list(range(channels))


def net(seed: int = 1, **options) -> DenseNet:
    made = densenet([3, 3], 8, stem="cifar", num_classes=5, **options)
    return randomise_(made.double().eval(), seed)


def edges(model: nn.Module, **more) -> Plan:
    request = {"unit": "macs", "units": ["edge"], "criterion": "random", **more}
    return make_plan(model, 0.3, input_size=8, **request)


def rising(plan: Plan) -> Plan:
    """The same cut as plans before the order was chosen said it: the channels in their old order."""
    given_net = DenseNet(plan.config_before)
    table = Units(plan.config_before.graph())
    keep = np.ones(table.size, dtype=bool)
    for group in table.groups:
        if group.name in plan.keep_indices:
            keep[group.units] = False
            keep[group.start + np.array(plan.keep_indices[group.name], dtype=int)] = True
    made = plan_of(subject(given_net), table, keep)
    return dataclasses.replace(plan, keep_indices=made.keep_indices, config_after=made.config_after)


def pieces(model: nn.Module) -> int:
    reads = [
        m for m in model.modules() if isinstance(m, ReadStream) and m.input_indices is not None
    ]
    return sum(len(ranges_of(m.input_indices.tolist())) for m in reads)


def test_readers_get_fewer_ranges_and_the_answers_stay() -> None:
    dense = net(bn_size=None)
    plan = edges(dense)
    before = rising(plan)
    assert before.keep_indices != plan.keep_indices
    for name, kept in before.keep_indices.items():
        assert sorted(plan.keep_indices.get(name, kept)) == list(kept)
    small, old = apply_plan(dense, plan), apply_plan(dense, before)
    assert pieces(small) < 0.7 * pieces(old)
    torch.testing.assert_close(small(X), old(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small(X), masked(dense, plan)(X), rtol=1e-9, atol=1e-9)
    for found in (plan, before):
        assert Plan.from_json(found.to_json()) == found


@settings(max_examples=25)
@given(
    st.integers(0, 9999),
    st.sampled_from([None, 2]),
    st.sampled_from([{}, {"denseblock1.*": "2/1"}]),
)
def test_any_cut_in_its_order_equals_masked(
    seed: int, bn_size: int | None, mfm: dict[str, str]
) -> None:
    dense = net(
        seed, bn_size=bn_size, mfm=mfm, mfm_skipped={"denseblock2.*": "2/1"} if seed % 2 else {}
    )
    generator = np.random.default_rng(seed)
    for _ in range(2):
        table = Units(dense.config.graph())
        keep = table.close(generator.random(table.size) < 0.8)
        plan = plan_of(subject(dense), arranged(table, keep), keep)
        small = apply_plan(dense, plan)
        torch.testing.assert_close(small(X), masked(dense, plan)(X), rtol=1e-9, atol=1e-9)
        assert Plan.from_json(plan.to_json()) == plan
        dense = small


def test_a_refit_fits_the_filters_in_their_order() -> None:
    dense = net(bn_size=None).float()
    plan = edges(dense)
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = rising(plan)
    nets = [compensate_plan(apply_plan(dense, p), dense, p, [images]) for p in (plan, before)]
    answers = [made(X.float()).detach() for made in nets]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3 * float(answers[0].abs().max()))
    assert not torch.allclose(answers[0], apply_plan(dense, plan)(X.float()), rtol=1e-2)


def test_files_hold_the_order(tmp_path: Path) -> None:
    dense = net(bn_size=None).float()
    plan = edges(dense)
    for name, found in (("new", plan), ("old", rising(plan))):
        small = apply_plan(dense, found)
        prune_dn.save(small, tmp_path / f"{name}.safetensors")
        again = prune_dn.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(again.eval()(X.float()), small(X.float()))


class Twice(nn.Module):
    """Maps that a sum ties, read by layers that select and by a linear layer behind a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.layers = nn.ModuleList(Layer(12 + 8 * i) for i in range(3))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        maps = self.one(x) + self.two(x)
        for layer in self.layers:
            maps = layer(maps)
        return self.head(self.pool(maps).flatten(1))


def test_the_order_in_any_net() -> None:
    model = randomise_(Twice().eval(), 2)
    table = Units(subject(model, 8).graph)
    keep = table.close(np.random.default_rng(0).random(table.size) < 0.75)
    order = arranged(table, keep)
    assert (order.moved != np.arange(table.size)).any()
    plan = plan_of(subject(model, 8), order, keep)
    small = apply_plan(model, plan)  # which checks that pruned equals masked
    old = apply_plan(model, plan_of(subject(model, 8), table, keep))
    x = X.float()
    torch.testing.assert_close(small(x), old(x), rtol=1e-5, atol=1e-5)
    assert Plan.from_json(plan.to_json()) == plan
