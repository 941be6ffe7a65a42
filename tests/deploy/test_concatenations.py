"""Exported programs select from sources, not from what was concatenated; the answers stay the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from oracle import randomise_
from torch import nn

import prune_dn
from prune_dn.deploy.concatenations import take_from_sources_
from prune_dn.models import densenet


class Selects(nn.Module):
    """Ranges, positions and both of nested concatenations, on several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("few", torch.tensor([0, 2, 4, 6, 9, 10]))
        self.register_buffer("turned", torch.tensor([5, 1]))

    def forward(self, a, b, c):
        joined = torch.cat([a, b], 1)
        nested = torch.cat([joined, c], 1)
        found = (
            nested.index_select(1, self.few),
            nested[:, 3:8],
            nested[:, :7],
            nested.index_select(1, self.turned),  # not rising: as it is
            torch.cat([a, b], 2)[:, 1:3],  # another axis: as it is
            nested[:, ::2],
            torch.cat([nested[:, 4:11], a], 1),
            joined,
        )
        return (*(x.neg() for x in found), nested[:, 2:4])  # the last: an answer, as it is


def test_selections_take_from_the_operands_of_a_concatenation() -> None:
    net = Selects()
    inputs = tuple(torch.randn(2, width, 3) for width in (4, 4, 3))
    example = tuple(x.clone() for x in inputs)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net, example, dynamic_shapes=(batch, batch, batch))
    take_from_sources_(program)
    program.validate()
    inputs = tuple(torch.randn(5, x.shape[1], 3) for x in inputs)
    for found, wanted in zip(program.module()(*inputs), net(*inputs), strict=True):
        assert torch.equal(found, wanted)
    whole = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["val"].ndim == 3]
    taken = ("slice", "index_select", "narrow")
    whole = [n for n in whole if any(word in str(n.target) for word in taken)]
    read = Counter(n.args[0].meta["val"].shape[1] for n in whole)
    assert read[11] == 5, (
        read
    )  # what is not rising, a step and an answer, each of these with its `[:]`


def operators(path: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_dropped_connections_are_fewer_inputs_and_nothing_else(tmp_path: Path) -> None:
    net = randomise_(densenet([3, 3], 6, bn_size=None, stem="cifar", num_classes=5).eval(), 1)
    small = prune_dn.prune(
        net, 0.3, unit="macs", units=["connection"], criterion="l2", input_size=8
    )
    assert any(layer.input_indices for block in small.config.blocks for layer in block)
    prune_dn.export_onnx(small, tmp_path / "small.onnx", image_size=8)
    assert not {"Gather", "Slice", "Split"} & operators(tmp_path / "small.onnx").keys()


def test_edges_are_gathered_from_their_sources_alone(tmp_path: Path) -> None:
    import onnx

    net = randomise_(densenet([3], 6, bn_size=None, stem="cifar", num_classes=5).eval(), 1)
    small = prune_dn.prune(net, 0.5, unit="macs", units=["edge"], criterion="random", input_size=8)
    prune_dn.export_onnx(small, tmp_path / "small.onnx", image_size=8)
    graph = onnx.load(tmp_path / "small.onnx").graph
    joined = {name for node in graph.node if node.op_type == "Concat" for name in node.output}
    takes = [node for node in graph.node if node.op_type in ("Gather", "Slice")]
    assert takes and not joined & {node.input[0] for node in takes}
