"""What a prune keeps of other people's nets: class, head, wrappers, buffers, hooks, modes, dtype."""

from __future__ import annotations

import pytest
import torch
from oracle import randomise_
from other_nets import Layer
from torch import nn
from torch.nn import functional as F

from prune_dn import prune

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Owned(nn.Module):
    """A net in a net, with a head, a method, an attribute and thresholds of its own."""

    def __init__(self, name: str = "mine") -> None:
        super().__init__()
        self.name = name
        self.model = nn.Sequential(nn.Conv2d(3, 12, 3), *(Layer(12 + 8 * i) for i in range(3)))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(36, 5))
        self.register_buffer("op_threshs", torch.linspace(0.1, 0.9, 5))

    def scores(self, x):
        return self.head(F.relu(self.model(x)).mean((2, 3))).sigmoid()

    def forward(self, x):
        return self.scores(x) / self.op_threshs


def owned() -> Owned:
    return randomise_(Owned(), 0)


def pruned(net: nn.Module, **options):
    return prune(net, 0.4, unit="macs", criterion="l2", example_inputs=X, **options)


def test_class_attributes_methods_and_buffers() -> None:
    net = owned()
    small = pruned(net)
    assert type(small) is Owned and small.name == "mine"
    assert torch.equal(small.op_threshs, net.op_threshs)
    assert small.op_threshs.data_ptr() != net.op_threshs.data_ptr()
    assert small.head[1].out_features == 5
    torch.testing.assert_close(small.eval().scores(X), small(X) * net.op_threshs)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_hooks_outside_the_cut_part() -> None:
    net, seen = owned(), []
    net.head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    small = pruned(net)
    seen.clear()
    answer = small.eval()(X)
    assert seen == [(2, 5)]
    small._forward_pre_hooks.clear()
    torch.testing.assert_close(small(2 * X), answer)


def test_modes_of_each_module_and_what_is_trained() -> None:
    net = owned().train()
    net.model[2].eval()
    net.model[1].norm.weight.requires_grad_(False)
    net.head.requires_grad_(False)
    small = pruned(net)
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    net = owned().to(dtype)
    small = pruned(net)
    assert {p.dtype for p in small.parameters()} == {dtype} == {small.op_threshs.dtype}
    kept = torch.isin(net.model[1].conv.weight, small.model[1].conv.weight)
    assert (
        kept.sum() >= small.model[1].conv.weight.numel()
    )  # the numbers themselves, not rounded anew


def test_memory_format() -> None:
    small = pruned(owned().to(memory_format=torch.channels_last))
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert not any(w.is_contiguous() for w in weights[1:])
