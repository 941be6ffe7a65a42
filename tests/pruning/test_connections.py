"""Connections: all edges from one layer to one reader go together, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import masked, randomise_
from torch import nn

import prune_dn
from prune_dn.errors import PruningError
from prune_dn.graph import trace
from prune_dn.graph.types import NONE
from prune_dn.models import DenseNet, densenet
from prune_dn.models.dense_net import ReadStream
from prune_dn.pruning import Plan, apply_plan, make_plan
from prune_dn.pruning.kept import units_of
from prune_dn.pruning.sensitivity import sensitivity
from prune_dn.pruning.units import Units


class Dense(nn.Module):
    """Five dense layers on a stem, each behind a norm, as others write them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(6))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1) for i in range(5))
        self.head = nn.Linear(38, 5)

    def forward(self, x):
        maps = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            maps.append(conv(norm(torch.cat(maps, 1)).relu()))
        return self.head(self.norms[5](torch.cat(maps, 1)).relu().mean((2, 3)))


def ours(**options) -> DenseNet:
    given = {"stem": "cifar", "num_classes": 5, "bn_size": None, **options}
    return randomise_(densenet([4, 4], 6, **given).double().eval(), 1)


def by_source(table: Units, plan: Plan) -> list[tuple[int, int]]:
    """For each connection how many of its edges stay, and how many could: those whose channel stays."""
    keep, found = units_of(table, plan.keep_indices), []
    alive = dict(zip(table.reads.tolist(), keep[table.source].tolist(), strict=True))
    for number in np.unique(table.connection[table.connection != NONE]):
        edges = np.flatnonzero(table.connection == number)
        found.append((int(keep[edges].sum()), sum(alive[e] for e in edges.tolist())))
    return found


REQUESTS = [
    {"units": ["connection"], "unit": "macs"},
    {"units": ["connection"], "unit": "params", "scope": "local"},
    {"units": ["stream", "connection"], "unit": "macs", "criterion": "random"},
    {"units": ["stream", "bottleneck", "connection", "layer"], "unit": "macs"},
    {"units": ["stream", "connection"], "unit": "channels", "round_to": 2, "min_channels": 3},
    {"units": ["connection"], "unit": "macs", "protect": ["features.denseblock1.denselayer2"]},
]


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("bn_size", [None, 2])
def test_a_connection_goes_whole_and_pruned_equals_masked(request_, bn_size) -> None:
    net = ours(bn_size=bn_size)
    ratio = 0.5 if "stream" in request_["units"] else 0.3
    plan = make_plan(net, ratio, input_size=8, **request_)
    counts = by_source(Units(net.config.graph()), plan)
    assert all(kept in (0, could) for kept, could in counts)
    if "stream" not in request_["units"]:  # there whole channels may be the cheaper ones
        assert any(kept == 0 < could for kept, could in counts)
    small = apply_plan(net, plan)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(small(x), masked(net, plan)(x), rtol=1e-9, atol=1e-9)
    assert Plan.from_json(plan.to_json()) == plan
    if request_["units"] == ["connection"]:  # nothing is gathered: whole sources are concatenated
        reads = {name: m for name, m in small.named_modules() if isinstance(m, ReadStream)}
        pieces = {name: m.pieces for name, m in reads.items() if "layer" in name and m.pieces}
        assert pieces and not any(piece.indices for found in pieces.values() for piece in found)


def test_in_a_net_of_ours_a_source_is_read_whole_or_not_at_all() -> None:
    net = ours()
    small = apply_plan(net, make_plan(net, 0.4, unit="macs", units=["connection"], input_size=8))
    config, seen = small.config, set()
    for first, layers in zip(
        (config.num_init_features, config.transitions[0].out_channels), config.blocks, strict=True
    ):
        stops = np.cumsum([first, *(layer.out_channels for layer in layers)])
        for number, layer in enumerate(layers):
            read = set(range(stops[number])) & set(layer.input_indices or range(stops[number]))
            for start, stop in zip([0, *stops], stops[: number + 1], strict=False):
                share = len(read & set(range(start, stop))) / (stop - start)
                seen.add(share)
    assert seen == {0.0, 1.0}


def test_the_cheapest_connection_goes_first() -> None:
    """Harm per cost of whole connections, by brute force: at a small ratio the cheapest one goes.

    But for what every reader keeps: the connection of its best edge.
    """
    net = ours()
    table = Units(net.config.graph(8))
    scores, costs = np.zeros(table.size), np.zeros(table.size)
    for selection in table.selections:
        reader = selection.reader
        weight = net.get_submodule(reader.layer).weight.detach()
        losses = (
            weight.flatten(2).square().sum((0, 2)) if weight.ndim == 4 else weight.square().sum(0)
        )
        scores[selection.edges.units] = losses.sqrt().numpy()
        pixels = reader.positions if weight.ndim == 4 else 1
        costs[selection.edges.units] = weight[:, 0].numel() * pixels
    numbers = np.unique(table.connection[table.connection != NONE])
    price = {
        c: scores[table.connection == c].sum() / costs[table.connection == c].sum() for c in numbers
    }
    plan = make_plan(net, 1e-6, unit="macs", criterion="l2", units=["connection"], input_size=8)
    gone = np.unique(table.connection[~units_of(table, plan.keep_indices)])
    for selection in table.selections:
        edges = selection.edges
        price.pop(table.connection[edges.start + scores[edges.units].argmax()])
    assert gone.tolist() == [min(price, key=lambda c: price[c])]


def test_any_net_whose_readers_select_has_connections() -> None:
    net = randomise_(Dense().eval(), 3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = make_plan(net, 0.3, unit="macs", units=["connection"], criterion="l2", example_inputs=x)
    small = apply_plan(net, plan)  # which checks that pruned equals masked
    counts = by_source(Units(trace(net, x)), plan)
    assert all(kept in (0, could) for kept, could in counts)
    assert Plan.from_json(plan.to_json()) == plan
    again = prune_dn.prune(
        small, 0.2, unit="macs", units=["connection"], criterion="l2", example_inputs=x
    )
    assert prune_dn.count(again, 8).macs < prune_dn.count(small, 8).macs


def test_what_cannot_be_asked_of_connections_is_said() -> None:
    net = ours()
    with pytest.raises(
        PruningError, match="round_to=4 has no effect on connections, which go whole"
    ):
        make_plan(net, 0.3, units=["connection"], round_to=4)
    with pytest.raises(PruningError, match="units 'connection' and ratios do not go together"):
        make_plan(net, 0.3, units=["connection"], ratios=[])
    with pytest.raises(PruningError, match="units 'connection' is unknown; choose from stream"):
        sensitivity(net, lambda _: 0.0, units=["connection"])
    competing = ours(mfm_skipped={"*": "2/1"})
    with pytest.raises(PruningError, match=r"units=\['connection'\]: this net has none of them"):
        make_plan(competing, 0.3, units=["connection"])
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(PruningError, match="edges and connections need a batch norm in front"):
        make_plan(plain, 0.3, units=["connection"], input_size=8)
