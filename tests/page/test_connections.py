"""Connections: against the keep_indices of a plan, a forward pass, and a net that is built by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from prune_dn.graph import trace
from prune_dn.models import DenseNet, densenet
from prune_dn.page.connections import connections, rectified_variance, streams, weights_of
from prune_dn.page.nets import View, connection_rows, map_section, views_of
from prune_dn.pruning import apply_plan, make_plan


def net(**others: object) -> DenseNet:
    torch.manual_seed(3)
    model = densenet(
        [3, 2], growth_rate=4, num_init_features=8, num_classes=5, stem="cifar", **others
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def widths(model: DenseNet) -> list[list[tuple[str, int]]]:
    """By block: (source, channels) in the order of the stream, from the config alone."""
    config, blocks = model.config, []
    first = ("features.conv0", config.num_init_features)
    for b, layers in enumerate(config.blocks, start=1):
        made = [
            (
                f"features.denseblock{b}.{x.name}.conv{1 if x.bottleneck is None else 2}",
                x.out_channels,
            )
            for x in layers
        ]
        blocks.append([first, *made])
        if b <= len(config.transitions):
            first = (f"features.transition{b}.conv", config.transitions[b - 1].out_channels)
    return blocks


def expected(model: DenseNet, plan: dict) -> dict[tuple[str, str], tuple[int, int]]:
    """(before, after) of each connection of a stream, from the JSON of a plan."""
    kept = plan["keep_indices"]
    found = {}
    for b, stream in enumerate(widths(model), start=1):
        layers = [f"features.denseblock{b}.{x.name}" for x in model.config.blocks[b - 1]]
        readers = [(f"{name}.norm1", f"{name}.conv1") for name in layers]
        last = (f"features.transition{b}.norm", f"features.transition{b}.conv")
        readers.append(last if b == 1 else ("features.norm5", "classifier"))
        for number, (norm, reader) in enumerate(readers, start=1):
            start = 0
            for source, n in stream[:number]:
                stays = set(kept.get(norm, range(10**6))) & set(range(start, start + n))
                stays &= {start + i for i in kept.get(source, range(n))}
                if kept.get(reader) == []:
                    stays = set()
                found[reader, source] = (n, len(stays))
                start += n
    return found


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("bn_size", [None, 2])
def test_the_map_is_what_the_plan_keeps(ratio: float, bn_size: int | None) -> None:
    model = net(bn_size=bn_size)
    plan = make_plan(model, ratio, unit="macs", units=["stream", "edge", "layer"], input_size=8)
    right = expected(model, json.loads(plan.to_json()))
    before, after = views_of(plan)
    assert before is not None and after is not None
    section = map_section(before, after)
    assert section is not None
    cells = {}
    for group in section.maps:
        assert [m.title for m in group.maps] == ["share still read"]
        for pair, (text, share) in group.maps[0].cells.items():
            n, left = right[pair]
            assert text == f"{left} of {n} channels" and share == pytest.approx(left / n)
            cells[pair] = text
    assert cells.keys() == right.keys()
    assert any(left < n for n, left in right.values())
    rows = {(r["reader"], r["source"]): r for r in connection_rows(before, after)}
    for pair, (n, left) in right.items():
        assert (rows[pair]["channels_before"], rows[pair]["channels_after"]) == (n, left)


def test_the_nets_themselves_give_the_same_map_with_weights() -> None:
    model = net(bn_size=2)
    plan = make_plan(model, 0.5, unit="macs", units=["stream", "edge"], input_size=8)
    views = View.of(model, image_size=8), View.of(apply_plan(model, plan), image_size=8)
    for view, told in zip(views, views_of(plan), strict=True):
        assert told is not None
        assert view.connections.channels == told.connections.channels
        by_reader: dict[str, float] = {}
        for (reader, _), weight in view.connections.weights.items():
            by_reader[reader] = by_reader.get(reader, 0.0) + weight
        assert by_reader == pytest.approx(dict.fromkeys(by_reader, 1.0))
    section = map_section(*views)
    assert section is not None
    assert [m.title for m in section.maps[0].maps] == [
        "share still read",
        "weight before",
        "weight after",
    ]


def test_weights_are_the_variance_that_a_source_brings() -> None:
    """Against drawn numbers, through the layer itself: one source is let through at a time."""
    model = net(bn_size=2)
    graph, layer = model.config.graph(8), model.features.denseblock1.denselayer3
    found = weights_of(graph, model)
    sources = widths(model)[0][:3]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200_000, len(layer.norm1.weight), generator=generator, dtype=torch.float64)
    seen = torch.relu(drawn * layer.norm1.weight.double() + layer.norm1.bias.double())
    kernel = layer.conv1.weight.double().flatten(1)
    ends = torch.tensor([n for _, n in sources]).cumsum(0).tolist()
    parts = [(seen[:, a:b] @ kernel[:, a:b].T).var(0).sum() for a, b in pairwise([0, *ends])]
    for (source, _), part in zip(sources, [p.item() for p in parts], strict=True):
        share = part / sum(p.item() for p in parts)
        reader = "features.denseblock1.denselayer3.conv1"
        assert found[reader, source] == pytest.approx(share, abs=0.01)


def test_rectified_variance_at_the_ends() -> None:
    mean, deviation = torch.tensor([50.0, -50.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])
    assert rectified_variance(mean, deviation).tolist() == pytest.approx([4.0, 0.0, 0.0], abs=1e-4)


def test_mfm_sources_are_the_convs_behind_it() -> None:
    model = net(bn_size=2, mfm={"denseblock1.denselayer2": "2/1", "transition1": "2/1"})
    found = connections(model.config.graph(8), model)
    makers = {p.layer for p in model.config.graph(8).producers}
    assert {source for _, source in found.channels} <= makers
    for b, stream in enumerate(widths(model), start=1):
        reader = f"features.transition{b}.conv" if b == 1 else "classifier"
        assert {s: found.channels[reader, s] for s, _ in stream} == dict(stream)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.side, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(10, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.first(images)
        summed = first + self.second(first)
        return self.last(torch.cat([summed, self.side(summed)], 1)).mean((2, 3))


def test_of_a_traced_net_sums_have_several_sources() -> None:
    model = Residual()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    found = connections(graph, model)
    assert found.channels["last", "side"] == 4
    assert found.channels["last", "first"] == found.channels["last", "second"] == 6
    assert not any(reader == "first" for reader, _ in found.channels)
    (stream,) = streams(graph, found)
    assert stream.sources == ("first", "second", "side") and "last" in stream.readers
    weight = model.last.weight.detach().double().square().sum((0, 2, 3))
    assert found.weights["last", "side"] == pytest.approx(float(weight[6:].sum() / weight.sum()))
