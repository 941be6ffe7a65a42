"""Auxiliary heads and branches for training keep fitting the pruned net, or are refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from oracle import randomise_
from torch import nn

from prune_dn import prune
from prune_dn.errors import PruningError
from prune_dn.graph import trace

X = torch.randn(2, 3, 16, 16)


def stage(read: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU())


class Net(nn.Module):
    """Two stages and a head; an auxiliary head reads the first in training. `way` says how."""

    def __init__(self, way: str = "tuple") -> None:
        super().__init__()
        self.way = way
        self.first, self.second = stage(3, 8), stage(8, 10)
        self.aux_conv, self.aux_head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.head = nn.Linear(10, 4)

    def auxiliary(self, x):
        return self.aux_head(self.aux_conv(x).relu().mean((2, 3)))

    def forward(self, x, targets=None):
        maps = self.first(x)
        out = self.head(self.second(maps).mean((2, 3)))
        if not self.training or self.way == "never":
            return out
        if self.way == "targets":
            out = out + targets
        side = self.auxiliary(maps)
        if self.way == "dict":
            return {"out": out, "side": [side]}
        if self.way == "sum":
            return out + side
        return out, side


class Deep(nn.Module):
    """Deep supervision: each stage has a head of its own, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(3, 8), stage(8, 8), stage(8, 8)])
        self.heads = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])

    def forward(self, x):
        outs = []
        for part, head in zip(self.stages, self.heads, strict=True):
            x = part(x)
            outs.append(head(x.mean((2, 3))))
        return outs if self.training else outs[-1]


class TrainedPath(nn.Module):
    """A residual path that only training takes (dropped by eval, as in a re-parametrised net)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.path, self.last = stage(3, 8), stage(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x = x + self.path(x)
        return self.last(x.mean((2, 3)))


NETS = {
    "tuple": Net,
    "dict": lambda: Net("dict"),
    "sum": lambda: Net("sum"),
    "deep": Deep,
    "path": TrainedPath,
}


def answers(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [y for y in torch.utils._pytree.tree_leaves(net(x)) if isinstance(y, torch.Tensor)]


@pytest.mark.parametrize("criterion", ["l2", "bn_scale", "taylor"])
@pytest.mark.parametrize("name", NETS)
def test_the_branch_fits_after_pruning(name, criterion) -> None:
    net = randomise_(NETS[name](), 0)
    before = copy.deepcopy(net.state_dict())
    images = [(X, torch.tensor([0, 1]))] if criterion == "taylor" else None
    small = prune(
        net,
        0.3,
        criterion=criterion,
        unit="params",
        input_size=16,
        compensate="none",
        calibration=images,
    )
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    want = [y.shape for y in answers(net.train(), X)]
    found = answers(small.train(), X)
    assert [y.shape for y in found] == want
    sum(y.sum() for y in found).backward()
    assert small.eval()(X).shape == (2, 4)
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.weight.numel() for c in convs) < sum(
        m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d)
    )


def test_the_branch_equals_the_masked_one() -> None:
    """Which channels stayed is recognised by their norm's bias, all of which differ."""
    net = randomise_(Net(), 0).double()
    small = prune(net, 0.3, criterion="l2", unit="params", input_size=16)
    kept = [
        torch.isin(part[1].bias, small.get_submodule(name)[1].bias).double()
        for name, part in (("first", net.first), ("second", net.second))
    ]
    assert any(mask.sum() < len(mask) for mask in kept)
    dense = copy.deepcopy(net)
    for layer in (dense.aux_conv, dense.second[0]):
        layer.register_forward_pre_hook(lambda _, x: x[0] * kept[0][:, None, None])
    dense.head.register_forward_pre_hook(lambda _, x: x[0] * kept[1])
    for model in (dense, small):
        model.train()
        for part in (model.first, model.second):
            part.eval()
    for ours, masked in zip(small(X.double()), dense(X.double()), strict=True):
        torch.testing.assert_close(ours, masked)


def test_channels_of_the_branch_stay_and_it_judges_none() -> None:
    net = randomise_(Net(), 0)
    with torch.no_grad():  # the branch would keep the channels that the net needs least
        net.second[0].weight.copy_(torch.arange(8.0, 0, -1).view(1, 8, 1, 1).expand(10, 8, 3, 3))
        net.aux_conv.weight.copy_(1e3 * torch.arange(8.0).view(1, 8, 1, 1).expand(6, 8, 1, 1))
    small = prune(net, 0.3, criterion="l2", unit="macs", input_size=16, protect=["head"])
    assert small.aux_conv.out_channels == 6
    kept = small.first[0].out_channels
    assert kept < 8
    assert torch.equal(small.first[0].weight, net.first[0].weight[:kept])


def test_googlenet_trains_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False)
    assert {"aux1.fc2", "aux2.fc2"} <= {
        r.layer for r in trace(net, torch.randn(1, 3, 64, 64)).readers
    }
    small = prune(net, 0.7, unit="macs", input_size=64)
    assert small.inception4a.branch1.conv.out_channels <= net.inception4a.branch1.conv.out_channels
    assert small.aux1.conv.conv.in_channels < net.aux1.conv.conv.in_channels
    out = small.train()(torch.randn(2, 3, 64, 64))
    assert [y.shape for y in out] == [(2, 4)] * 3


def forward_elsewhere() -> nn.Module:
    """Its forward stays bound to this net: copies would answer with its weights."""
    net = Net()
    forward = net.forward
    net.forward = lambda x: forward(x)
    return net


def hidden_loss() -> nn.Module:
    net = Net()
    net.register_forward_hook(
        lambda net, x, y: setattr(net, "loss", y[1].mean()) or y[0] if net.training else None
    )
    return net


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            forward_elsewhere,
            r"what first, second.* reads cannot be .*\(the model has a forward of its",
        ),
        (lambda: Net("never"), "what aux_conv, aux_head reads cannot be followed: no forward of"),
        (lambda: Net("targets"), r"aux_conv, aux_head .*in training mode .* TypeError"),
    ],
)
def test_what_no_forward_reaches_is_refused_by_name(make, text) -> None:
    with pytest.raises(PruningError, match=text):
        prune(make(), 0.3, criterion="l2", input_size=16)


def test_a_branch_whose_answer_a_hook_takes_fits_too() -> None:
    small = prune(hidden_loss(), 0.3, criterion="l2", unit="params", input_size=16)
    assert small.train()(X).shape == (2, 4)
    assert small.aux_conv.in_channels == small.first[0].out_channels


@pytest.mark.parametrize("instead", [None, nn.Identity()])
def test_the_remedy_that_is_named(instead: nn.Module | None) -> None:
    net = Net("never")
    with pytest.raises(PruningError, match=r"never uses it, put nn.Identity\(\) in its place"):
        prune(net, 0.3, criterion="l2", input_size=16)
    net.aux_conv = net.aux_head = instead
    small = prune(net, 0.3, criterion="l2", unit="params", input_size=16)
    assert small(X).shape == (2, 4)


def test_nets_without_such_branches() -> None:
    image = torch.randn(1, 3, 32, 32)
    tied = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    tied[1].weight = tied[0].weight
    # The second has stochastic depth in training.
    for net in (torchvision.models.resnet18(), torchvision.models.efficientnet_b0(), tied):
        graph = trace(net, image)
        assert graph.unreached == ()
        assert all(reader.layer in graph.uses() for reader in graph.readers)
