"""Channels are followed through every kind of operation; what must stay says why."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn

from prune_dn.errors import PruningError
from prune_dn.graph import NONE, Graph, trace
from prune_dn.graph.classes import channel_classes
from prune_dn.graph.flow import Flow
from prune_dn.graph.rules import RULES, Call, rule

X = torch.zeros(2, 3, 8, 8)


class Between(nn.Module):
    """Two convs `a` and `b` of six channels, whatever `function` makes of them, and a reader."""

    def __init__(self, function: Callable[..., Tensor], reads: int, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.parts = nn.ModuleDict(parts)
        self.function, self.head = function, nn.Conv2d(reads, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x), **self.parts))


def seen(net: nn.Module, layer: str = "head") -> list[str]:
    """What a layer reads at each position: the class's first producer and its place there."""
    graph = trace(net, X)
    names = {
        int(c): f"{p.layer}{i}"
        for p in reversed(graph.producers)
        for i, c in reversed(list(enumerate(graph.ties[p.channels])))
    }
    reader = next(r for r in graph.readers if r.layer == layer)
    return [names.get(int(c), "-") for c in graph.classes(reader.channels)]


def a(*numbers: int) -> list[str]:
    return [f"a{i}" for i in numbers]


def b(*numbers: int) -> list[str]:
    return [f"b{i}" for i in numbers]


ALL = tuple(range(6))
FOLLOWED: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "concatenation": (lambda x, y: torch.cat([y, x], 1), b(*ALL) + a(*ALL)),
    "the same twice": (lambda x, y: torch.cat([x, y, x], 1), a(*ALL) + b(*ALL) + a(*ALL)),
    "sum": (lambda x, y: x + y, a(*ALL)),
    "product": (lambda x, y: x * y.sigmoid(), a(*ALL)),
    "in place": (lambda x, y: F.relu_(x.add_(y)), a(*ALL)),
    "gate of means": (lambda x, y: x * y.mean((2, 3), keepdim=True), a(*ALL)),
    "maximum": (lambda x, y: torch.maximum(x, y), a(*ALL)),
    "backwards": (lambda x, y: x.flip(1), a(*reversed(ALL))),
    "permuted": (lambda x, y: x.permute(0, 2, 3, 1).relu().movedim((3, 0), (1, 0)), a(*ALL)),
    "moved in memory": (lambda x, y: x.transpose(1, 2).contiguous().transpose(1, 2), a(*ALL)),
    "stacked and flat": (lambda x, y: torch.stack([x, y], 1).flatten(1, 2), a(*ALL) + b(*ALL)),
    "stacked inside": (
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
        [name for pair in zip(a(*ALL), b(*ALL), strict=True) for name in pair],
    ),
    "halves": (lambda x, y: torch.cat(x.chunk(2, 1)[::-1], 1), a(0, 1, 2) * 2),
    "shuffle": (
        lambda x, y: x.view(2, 2, -1, 8, 8).transpose(1, 2).flatten(1, 2),
        a(0, 0, 1, 1, 2, 2),
    ),
    "shuffled by torch": (lambda x, y: F.channel_shuffle(x, 3), a(0, 0, 0, 1, 1, 1)),
    "unfolded": (
        lambda x, y: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)),
        [f"a{i}" for i in ALL for _ in range(4)],
    ),
    "gated halves": (lambda x, y: F.glu(x, 1), a(0, 1, 2)),
    "pooled and resized": (
        lambda x, y: F.interpolate(F.max_pool2d(F.avg_pool2d(x, 3, 1), 2), scale_factor=2.0),
        a(*ALL),
    ),
    "padded": (lambda x, y: F.pad(x, (1, 1, 0, 2)), a(*ALL)),
    "padded with channels": (lambda x, y: F.pad(x, (0, 0, 0, 0, 1, 2)), ["-", *a(*ALL), "-", "-"]),
    "beside the input's size": (lambda x, y: torch.cat([x, torch.zeros(2, 1, 8, 8)], 1), [*a(*ALL), "-"]),
    "repeated": (lambda x, y: x.repeat(1, 2, 1, 1), a(*ALL) * 2),
    "spread out": (lambda x, y: x.mean((2, 3), True).expand(-1, -1, 4, 4), a(*ALL)),
    "dropped out": (lambda x, y: F.dropout2d(x, 0.5, True), a(*ALL)),
    "a flat map": (
        lambda x, y: F.adaptive_avg_pool2d(x, 2).flatten(1)[..., None, None],
        [f"a{i}" for i in ALL for _ in range(4)],
    ),
    "shuffle of parts of a fixed size": (
        lambda x, y: x.view(2, -1, 3, 8, 8).transpose(1, 2).flatten(1, 2),
        a(0, 3, 0, 3, 0, 3),
    ),
    "halves by their width": (
        lambda x, y: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1), a(0, 1, 2) * 2
    ),
    "a view by its width": (lambda x, y: x.view(2, x.size(1), 64)[..., None], a(*ALL)),
    "a sum of stacked tensors": (lambda x, y: torch.stack([x, y], 1).sum(1), a(*ALL)),
    "a choice among stacked tensors": (
        lambda x, y: torch.stack([x, y], 1).softmax(1).flatten(1, 2), a(*ALL) * 2
    ),
    "a blur by a constant kernel": (
        lambda x, y: F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), groups=x.shape[1]), a(*ALL)
    ),
    "pixel shuffle": (lambda x, y: F.pixel_shuffle(torch.cat([x, y], 1), 2), ["a0", "a4", "b2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWED)
def test_channels_are_followed_through(case: str) -> None:
    function, expected = FOLLOWED[case]
    assert seen(Between(function, len(expected))) == expected


def test_sums_and_products_tie() -> None:
    graph = trace(Between(lambda x, y: x + y, 6), X)
    channels = {p.layer: graph.ties[p.channels].tolist() for p in graph.producers}
    assert channels["a"] == channels["b"]
    graph = trace(Between(lambda x, y: torch.cat([x, y], 1), 12), X)
    channels = {p.layer: graph.ties[p.channels].tolist() for p in graph.producers}
    assert not set(channels["a"]) & set(channels["b"])


FIXED: dict[str, tuple[nn.Module, str, str]] = {
    "the output": (Between(lambda x, y: x, 6), "head", "an output of the net"),
    "a layer norm": (
        Between(lambda x, y, norm: norm(x), 6, norm=nn.LayerNorm((6, 8, 8))),
        "a",
        "a layer norm takes its statistics over several channels",
    ),
    "a group norm": (
        Between(lambda x, y, norm: norm(x), 6, norm=nn.GroupNorm(1, 6)),
        "a",
        "a group norm takes its statistics over several channels",
    ),
    "a group norm without weights": (
        Between(lambda x, y: F.group_norm(x, 3), 6),
        "a",
        "a group norm takes its statistics over several channels",
    ),
    "a depthwise kernel that is computed": (
        Between(lambda x, y, deep: F.conv2d(x, deep.weight * 2, groups=6), 6,
            deep=nn.Conv2d(6, 6, 3, groups=6)),
        "a",
        "parts.deep computes its weight anew in each forward; replace it by a plain layer first",
    ),
    "softmax": (Between(lambda x, y: x.softmax(1), 6), "a", "softmax over its axis reads it"),
    "a sum over channels": (
        Between(lambda x, y: x.sum(1, keepdim=True), 1),
        "a",
        "sum over an axis of channels reads it",
    ),
    "a matrix product": (
        Between(lambda x, y: (x.flatten(2) @ y.flatten(2).mT).unflatten(2, (6, 1)), 6),
        "b",
        "matmul, a product of tensors, reads it",
    ),
    "a slice": (
        Between(lambda x, y: x[:, :4], 4), "a", "the net's own code picks channels by position"
    ),
    "a split at a number": (
        Between(lambda x, y: x.split(3, 1)[1], 3),
        "a",
        "the net's own code splits it into parts of 3, a plain number; x.shape[1] // 2 would follow",
    ),
    "a view at numbers": (
        Between(lambda x, y: x.view(-1, 2, 3, 8, 8).flatten(1, 2), 6),
        "a",
        "the net's own code reshapes it to 2 x 3, plain numbers; -1 or what is computed from x.shape "
        "by whole-number arithmetic would follow",
    ),
    "a width that the code holds": (
        Between(lambda x, y: x.reshape(-1, 6, 64)[..., None], 6),
        "a",
        "the net's own code reshapes it to 6, plain numbers; -1 or what is computed from x.shape "
        "by whole-number arithmetic would follow",
    ),
    "an unequal split": (
        Between(lambda x, y: x.split([2, 4], 1)[1], 4),
        "a",
        "the net's own code splits channels by position",
    ),
    "a gate for all": (
        Between(lambda x, y, gate: x * gate(y), 6, gate=nn.Conv2d(6, 1, 1)),
        "parts.gate",
        "mul spreads it over several channels",
    ),
    "a constant for each": (
        Between(lambda x, y: x + torch.arange(6.0).view(6, 1, 1), 6),
        "a",
        "add combines it with something that is no channel (an input or a constant)",
    ),
    "pooling over channels": (
        Between(lambda x, y: F.max_pool3d(x[:, None], (2, 1, 1))[:, 0], 3),
        "a",
        "pooling over an axis of channels reads it",
    ),
    "no rule": (
        Between(lambda x, y: x.cummax(1)[0], 6), "a", "cummax, an operation without a rule, reads it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_what_must_stay_says_why(case: str) -> None:
    net, layer, reason = FIXED[case]
    assert trace(net, X).why_fixed(layer) == reason


def test_an_input_that_is_added_fixes_what_it_meets() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.conv(x))

    reason = trace(Net(), X).why_fixed("conv")
    assert reason is not None and "an input or a constant" in reason


def test_followers_and_bare_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4)
            self.norm, self.slope = nn.BatchNorm2d(8), nn.PReLU(8)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.slope(self.norm(self.deep(self.conv(x)))) * self.scale)

    graph = trace(Scaled(), X)
    followers = {f.layer: graph.ties[f.channels].tolist() for f in graph.followers}
    places = [0, 0, 1, 1, 2, 2, 3, 3]
    assert followers == {"deep": places, "norm": places, "slope": places, "scale": places}
    assert graph.unreached == ()


def test_a_weight_that_is_used_twice_ties_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.both, self.head = nn.Conv2d(4, 5, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.both(self.a(x)), self.both(self.b(x))], 1))

    graph = trace(Twice(), X)
    ids = {p.layer: graph.ties[p.channels].tolist() for p in graph.producers}
    assert ids["a"] == ids["b"]
    head = next(r for r in graph.readers if r.layer == "head")
    assert graph.classes(head.channels).tolist() == ids["both"] * 2


def test_weights_that_two_layers_share_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1))
    net[2].weight = net[0].weight
    graph = trace(net, X)
    assert [p.layer for p in graph.producers if graph.why_fixed(p.layer) is None] == []


class Computed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_a_weight_that_is_computed_fixes_what_it_reads() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Computed(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    assert trace(net, X).why_fixed("0") == (
        "1 computes its weight anew in each forward; replace it by a plain layer first"
    )


def test_a_weight_that_is_computed_has_its_cost() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Computed(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    assert trace(net, X).uses() == {"0": 64, "1": 36, "3": 36}


def test_channels_of_a_norms_group_go_together() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    graph = trace(net, X)
    assert graph.ties[graph.producers[0].channels].tolist() == [0, 0, 2, 2, 4, 4]
    assert [f.layer for f in graph.followers] == ["1"]


def test_a_kernel_that_is_a_buffer_follows() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filt", torch.ones(4, 1, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.filt, groups=4)

    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Blur(), nn.Conv2d(4, 2, 1)), X)
    assert {f.layer: f.channels.tolist() for f in graph.followers} == {"1.filt": [0, 1, 2, 3]}
    assert graph.why_fixed("0") is None


def test_a_layer_with_two_names_has_the_one_of_named_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.layers = nn.Sequential(self.first, nn.ReLU(), self.last)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    graph = trace(Net(), X)
    assert [p.layer for p in graph.producers] == ["first", "last"]
    assert graph.unreached == ()


def test_auxiliary_heads_are_reached_by_the_branches_for_training() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.aux, self.never = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.stem(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    graph = trace(Deep(), X)
    readers = {r.layer: r.channels.tolist() for r in graph.readers}
    assert readers["aux"] == readers["head"]
    assert graph.why_fixed("aux") == "an output of the net"
    assert graph.unreached == ("never",)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_volumes_and_sequences(dimensions: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    net = nn.Sequential(conv(1, 4, 3), norm(4), nn.ReLU(), up(4, 5, 2, 2), norm(5), conv(5, 2, 1))
    graph = trace(net, torch.zeros(2, 1, *[6] * dimensions))
    assert [(r.layer, r.select) for r in graph.readers] == [("0", None), ("3", "1"), ("5", "4")]
    assert [group.name for group in channel_classes(graph)[1]] == ["0", "3"]


def test_several_inputs_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

        def forward(self, image: Tensor, facts: Tensor) -> dict[str, Tensor]:
            return {"score": self.left(image) * self.right(facts)[..., None, None]}

    image, facts = X, torch.zeros(2, 5)
    for inputs in ((image, facts), {"facts": facts, "image": image}):
        graph = trace(Two(), inputs)
        ids = {p.layer: graph.ties[p.channels].tolist() for p in graph.producers}
        assert ids["left"] == ids["right"]
        assert graph.why_fixed("left") == "an output of the net"
        assert all((r.channels == NONE).all() for r in graph.readers)


def test_the_model_is_untouched_and_modes_do_not_matter() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net[1].eval()
    first = trace(net, X)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert np.array_equal(trace(net.eval(), X).ties, first.ties)


def test_what_cannot_be_followed_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    with pytest.raises(
        PruningError, match=r"cannot follow this Branches on inputs .*\(2, 3, 8, 8\)"
    ):
        trace(Branches(), X)
    with pytest.raises(PruningError, match=r"does not run on .*give example_inputs that it takes"):
        trace(Branches(), X[:, :2])


def test_a_net_that_takes_only_torchs_own_shapes_is_followed_too() -> None:
    def halves(x: Tensor, y: Tensor) -> Tensor:
        if type(x.shape) is not torch.Size:
            raise TypeError("no torch.Size")
        return torch.cat(x.split(3, 1), 1)

    assert seen(Between(halves, 6)) == a(0, 1, 2, 0, 1, 2)


def test_what_cannot_be_copied_is_refused() -> None:
    net = nn.Conv2d(3, 4, 1)
    net.kept = net.weight * 2  # no leaf, which torch does not copy
    with pytest.raises(PruningError, match="this Conv2d cannot be copied"):
        trace(net, X)


def pruned_by_torch(net: nn.Module, x: Tensor) -> set[object]:
    """Torch-Pruning's groups of conv outputs: size, and per layer and side how many channels."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(net.eval(), x)
    names, found = {m: n for n, m in net.named_modules()}, set()
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
        places = {
            (names[item.dep.target.module], item.dep.handler.__name__ == "prune_out_channels")
            for item in group.items
            if item.dep.target.module in names
        }
        if not any(layer == head(net) for layer, out in places if out):
            found.add((len(group[0].idxs), frozenset(layer for layer, _ in places)))
    return found


def head(net: nn.Module) -> str:
    return [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]


def ours(graph: Graph) -> set[object]:
    """Size and layers of each group."""
    owner, groups = channel_classes(graph)
    layers = [(x.layer, x.channels) for x in (*graph.producers, *graph.readers, *graph.followers)]
    return {
        (
            group.rows.size,
            frozenset(name for name, ids in layers if np.isin(owner[ids], group.rows).any()),
        )
        for group in groups
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mnasnet0_5", "regnet_y_400mf"])
def test_groups_equal_torch_prunings_where_it_is_right(name: str) -> None:
    """(It also reports linear layers only through the convs that they touch.)"""
    net, x = getattr(zoo, name)(num_classes=5), torch.zeros(1, 3, 64, 64)
    found, oracle = ours(trace(net, x)), pruned_by_torch(net, x)
    assert len(oracle) > 10
    assert oracle == found


def test_grouped_convolutions_keep_their_groups_equal() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)
    )
    groups = {g.name: (g.rows.size, len(g.rows)) for g in channel_classes(trace(net, X))[1]}
    assert groups == {"0": (8, 4), "2": (12, 4)}


def test_blocks_that_also_lie_elsewhere_are_tied_by_their_place() -> None:
    """Two grouped convs of different groups read the same channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 1)
            self.two, self.three = nn.Conv2d(12, 2, 1, groups=2), nn.Conv2d(12, 3, 1, groups=3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return self.two(x), self.three(x)

    graph = trace(Net(), X)
    owner, groups = channel_classes(graph)
    (group,) = [g for g in groups if g.name == "stem"]
    assert len(group.rows) == 1
    (reader,) = [r for r in graph.readers if r.layer == "three"]
    units = owner[reader.channels].reshape(3, 4)
    assert all(sorted(row) == sorted(units[0].tolist()) for row in units.tolist()), (
        "equally many in each"
    )


@torch.library.custom_op("prune_dn_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@swish.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_new_operation_is_one_rule() -> None:
    """As CONTRIBUTING shows it."""
    net = Between(lambda x, y: swish(x), 6)
    reason = "prune_dn_tests.swish, an operation without a rule, reads it"
    assert trace(net, X).why_fixed("a") == reason

    @rule("prune_dn_tests.swish")
    def follow(call: Call) -> Flow:
        return call.flow(0)

    try:
        assert seen(net) == a(*ALL)
        with pytest.raises(PruningError, match=r"'prune_dn_tests\.swish' has a rule already"):
            rule("prune_dn_tests.swish")(follow)
    finally:
        del RULES["prune_dn_tests.swish"]
