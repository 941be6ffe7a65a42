"""What surgery keeps beside the weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
from oracle import randomise_

from prune_dn.models import densenet, densenet201
from prune_dn.pruning import apply_plan, make_plan, prune


def small_net(**changes):
    arguments = {"bn_size": 2, "stem": "imagenet", "num_classes": 5, **changes}
    return randomise_(densenet([2, 3], 8, **arguments), 0)


def test_modes_dtypes_flags_and_momenta_stay() -> None:
    net = small_net(drop_rate=0.2, memory_efficient=True).double().train()
    net.features.denseblock1.eval()
    net.features.norm5.momentum = None
    net.features.denseblock2.denselayer1.conv1.weight.requires_grad_(False)
    small = prune(net, 0.4)
    old = dict(net.named_modules())
    assert {n: m.training for n, m in small.named_modules()} == {
        n: old[n].training for n, _ in small.named_modules()
    }
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert small.features.norm5.momentum is None
    assert not small.features.denseblock2.denselayer1.conv1.weight.requires_grad
    assert small.classifier.weight.requires_grad
    assert small.memory_efficient and small.config.drop_rate == 0.2
    assert small.features.norm0.num_batches_tracked.dtype == torch.int64


def test_nothing_is_shared_and_the_model_stays() -> None:
    net = small_net().eval()
    x = torch.randn(2, 3, 32, 32)
    before = net(x)
    small = prune(net, 0.4)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert torch.equal(net(x), before)


def test_channels_last_stays() -> None:
    net = small_net().to(memory_format=torch.channels_last)
    weight = prune(net, 0.4).features.denseblock1.denselayer1.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_every_parameter_of_the_pruned_net_learns() -> None:
    net = prune(small_net().train(), 0.5, units=["stream", "bottleneck", "edge"])
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None]
    assert silent == []


def test_a_layer_that_nobody_reads_goes_whole() -> None:
    net = small_net().eval()
    with torch.no_grad():
        # What layer 2 makes is read by transition 1 alone; let those edges be the least of all.
        net.features.transition1.norm.weight[-8:] = 0.0
    plan = make_plan(net, 0.1, units=["edge"])
    small = apply_plan(net, plan)
    assert [layer.name for layer in small.config.blocks[0]] == ["denselayer1"]
    assert "denselayer2" not in dict(small.features.denseblock1.named_children())
    assert plan.keep_indices["features.denseblock1.denselayer2.conv2"] == ()


def test_one_line_on_torchvision() -> None:
    model = torchvision.models.densenet121()
    small = prune(model, 0.5)
    assert small.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    channels = sum(m.num_features for m in small.modules() if hasattr(m, "running_mean"))
    whole = sum(m.num_features for m in model.modules() if hasattr(m, "running_mean"))
    assert channels == pytest.approx(0.5 * whole, rel=0.01)


def test_the_largest_net_can_be_cut_without_running_it() -> None:
    with torch.device("meta"):
        config = densenet201().config
    from prune_dn.models import DenseNet

    plan = make_plan(DenseNet(config), 0.5, unit="params", units=["stream", "bottleneck", "edge"])
    assert plan.achieved["ratio"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    net = small_net().cuda().eval()
    small = prune(net, 0.4, units=["edge"])
    assert small(torch.zeros(2, 3, 32, 32, device="cuda")).is_cuda
