"""A family is a config with `graph()` and one registration: all else serves it as it serves DenseNets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prune_dn import apply_plan, compensate_plan, count, load, make_plan, save
from prune_dn.deploy.onnx_files import export_onnx
from prune_dn.errors import CheckpointError, ConfigError, ConversionError, PruningError
from prune_dn.graph import Graph, Op, Producer, Reader, trace
from prune_dn.graph.types import NONE, OUTPUT, Follower
from prune_dn.models import DENSE_NET, Family, register_family
from prune_dn.models.families import FAMILIES
from prune_dn.models.state_dicts import from_state_dict
from prune_dn.pruning import Plan
from prune_dn.pruning.units import Units
from prune_dn.run.inspection import show_file


@dataclass(frozen=True)
class ChainConfig:
    """Convs of these widths, one after another, each with a batch norm; a linear layer on their means."""

    chain: tuple[int, ...]
    num_classes: int = 4
    in_channels: int = 3

    def graph(self, image_size: int | tuple[int, int] | None = None) -> Graph:
        """A chain: each layer reads what the one before it makes."""
        pixels = 16**2 if image_size is None else int(np.prod(np.broadcast_to(image_size, 2)))
        ends = np.cumsum([*self.chain, self.num_classes])
        made = np.split(np.arange(ends[-1]), ends[:-1])
        read = [np.full(self.in_channels, NONE), *made[:-1]]
        convs = [f"convs.{i}" for i in range(len(self.chain))]
        norms = [f"norms.{i}" for i in range(len(self.chain))]
        return Graph(
            producers=tuple(map(Producer, [*convs, "head"], made)),
            readers=tuple(Reader(n, x, None) for n, x in zip([*convs, "head"], read, strict=True)),
            followers=tuple(
                Follower(n, x, params=2, pixels=pixels, is_norm=True)
                for n, x in zip(norms, made[:-1], strict=True)
            ),
            ops=(
                *(Op(n, (3, 3), 1, pixels, bias=True) for n in convs),
                Op("head", (), 1, 1, bias=True),
            ),
            ties=np.arange(ends[-1]),
            fixed=dict.fromkeys(made[-1].tolist(), OUTPUT),
            balanced=(),
        )

    def after(self, kept: Mapping[str, Sequence[int]]) -> ChainConfig:
        """What is left is a chain of other widths."""
        left = [len(kept.get(f"convs.{i}", range(w))) for i, w in enumerate(self.chain)]
        return dataclasses.replace(self, chain=tuple(left))

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> ChainConfig:
        """What `to_json` wrote."""
        data = json.loads(text)
        return ChainConfig(tuple(data.pop("chain")), **data)


class Chain(nn.Module):
    """The net of a `ChainConfig`."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.in_channels, *config.chain]
        pairs = zip(widths, config.chain, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in config.chain)
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.head(x.mean((2, 3)))


CHAIN = Family(
    "chain",
    Chain,
    ChainConfig,
    image_size=lambda config: 16,
    firsts=("convs.0.weight",),
    infer=lambda tensors: ChainConfig(
        tuple(
            len(t) for n, t in tensors.items() if n.startswith("convs.") and n.endswith("weight")
        ),
        *tensors["head.bias"].shape,
        in_channels=tensors["convs.0.weight"].shape[1],
    ),
    facts=lambda config: {"chain": list(config.chain)},
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_family(CHAIN)
    yield
    del FAMILIES["Chain"]


def net() -> Chain:
    torch.manual_seed(0)
    found = Chain(ChainConfig((8, 12, 10)))
    for norm in found.norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.2, 1.5)
        nn.init.normal_(norm.bias)
    return found.eval()


def images(count: int = 96) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_its_graph_and_costs_are_those_of_the_traced_net() -> None:
    chain = net()
    drawn, traced = Units(chain.config.graph()), Units(trace(chain, torch.zeros(1, 3, 16, 16)))
    assert [(g.name, g.size) for g in drawn.groups] == [(g.name, g.size) for g in traced.groups]
    found, right = count(chain), count(nn.Sequential(chain), 16)
    assert (found, count(chain.config)) == (right, right)


def test_planned_cut_and_refitted(tmp_path: Path) -> None:
    chain = net()
    plan = make_plan(chain, 0.5, unit="macs", calibration=[images()], loss="softmax")
    assert plan.config_before == chain.config and 0.5 <= plan.achieved["ratio"] < 0.6
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    small = apply_plan(chain, plan)
    assert isinstance(small, Chain) and small.config == plan.config_after != chain.config
    assert count(small).macs == plan.achieved["after"]["macs"]
    refitted = compensate_plan(small, chain, plan, [images()], loss="softmax")
    fresh = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = chain(fresh)
        lost, left = ((x(fresh) - wanted).square().mean().item() for x in (small, refitted))
    assert left < 0.5 * lost


def test_pruned_equals_masked() -> None:
    chain = net().double()
    plan = make_plan(chain, 0.4, unit="macs", criterion="l2")
    small, masked = apply_plan(chain, plan), net().double()
    for i, layer in enumerate([*masked.convs[1:], masked.head]):
        gone = torch.ones(chain.config.chain[i], dtype=torch.bool)
        gone[list(plan.keep_indices.get(f"convs.{i}", range(len(gone))))] = False
        layer.weight.data[:, gone] = 0
    x = images(4).double()
    torch.testing.assert_close(small(x), masked(x))


def test_saved_loaded_shown_and_exported(tmp_path: Path) -> None:
    chain = net()
    small = apply_plan(chain, plan := make_plan(chain, 0.5, unit="macs"))
    save(small, tmp_path / "small.safetensors", plan=plan)
    again = load(tmp_path / "small.safetensors")
    assert isinstance(again, Chain) and again.config == small.config
    assert torch.equal(again(images(2)), small(images(2)))
    facts, _ = show_file(tmp_path / "small.safetensors")
    assert facts["chain"] == list(small.config.chain) and facts["macs"] == count(small).macs
    assert export_onnx(small, tmp_path / "small.onnx", image_size=16).max_abs_error < 1e-4
    assert from_state_dict({"net": small.state_dict()}).config == small.config
    del FAMILIES["Chain"]
    try:
        with pytest.raises(
            CheckpointError, match="its architecture is 'Chain', not DenseNet or Light"
        ):
            load(tmp_path / "small.safetensors")
    finally:
        register_family(CHAIN)


def test_what_its_config_does_not_say_is_refused(tmp_path: Path) -> None:
    chain = net()
    chain.convs[1] = nn.Conv2d(8, 12, 3, padding=1, stride=2)
    with pytest.raises(ConversionError, match=r"convs.1 has stride \(2, 2\), not \(1, 1\)"):
        make_plan(chain, 0.5)
    with pytest.raises(CheckpointError, match="loaded as another"):
        save(chain, tmp_path / "chain.safetensors")
    with pytest.raises(PruningError, match="no effect on a chain, which takes images of any size"):
        make_plan(net(), 0.5, example_inputs=images(1))


def test_two_families_that_files_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="'Chain' cannot be told from 'Chain'"):
        register_family(CHAIN)

    @dataclass(frozen=True)
    class Other(ChainConfig):
        """The same fields."""

    twin = dataclasses.replace(CHAIN, module=type("Twin", (Chain,), {}), config=Other)
    with pytest.raises(ConfigError, match=r"'Twin' cannot be told from 'Chain'.*other fields"):
        register_family(twin)
    assert DENSE_NET in FAMILIES.values() and "Twin" not in FAMILIES
