"""Running statistics after recalibration against statistics computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_dn.errors import PruningError
from prune_dn.models import densenet
from prune_dn.pruning import recalibrate_batch_norm_


def net_and_batches():
    net = densenet([2], 4, stem="cifar", num_classes=3, drop_rate=0.5)
    net.train()
    net.features.norm5.eval()
    return net, [torch.randn(6, 3, 8, 8) for _ in range(4)]


def test_statistics_are_averages_over_batches() -> None:
    net, batches = net_and_batches()
    seen: list[torch.Tensor] = []
    norm = net.features.denseblock1.denselayer1.norm1
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert recalibrate_batch_norm_(net, [(b, None) for b in batches], max_batches=3) == 3
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen])
    variances = torch.stack([x.var(dim=(0, 2, 3)) for x in seen])
    assert len(seen) == 3
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    for key, value in net.state_dict().items():
        assert "running" in key or torch.equal(value, before[key])


def test_flags_and_momenta_are_restored() -> None:
    net, batches = net_and_batches()
    net.features.norm5.momentum = 0.3
    flags = [m.training for m in net.modules()]
    recalibrate_batch_norm_(net, batches)
    assert [m.training for m in net.modules()] == flags
    assert net.features.norm5.momentum == 0.3
    assert net.features.denseblock1.denselayer1.norm1.momentum == 0.1


def test_dropout_is_off() -> None:
    net, batches = net_and_batches()
    recalibrate_batch_norm_(net, batches)
    first = net.features.norm5.running_mean.clone()
    recalibrate_batch_norm_(net, batches)
    assert torch.equal(net.features.norm5.running_mean, first)


def test_memory_efficient_nets_are_recalibrated_too() -> None:
    net, batches = net_and_batches()
    recalibrate_batch_norm_(net, batches)
    plain = net.features.denseblock1.denselayer2.norm1.running_mean.clone()
    net.memory_efficient = True
    recalibrate_batch_norm_(net, batches)
    torch.testing.assert_close(net.features.denseblock1.denselayer2.norm1.running_mean, plain)


def test_nothing_to_do_is_an_error() -> None:
    net, _ = net_and_batches()
    net.features.norm5.running_mean.fill_(7.0)
    with pytest.raises(PruningError, match="no batches"):
        recalibrate_batch_norm_(net, [])
    assert (net.features.norm5.running_mean == 7.0).all()
    with pytest.raises(PruningError, match="no batch norm"):
        recalibrate_batch_norm_(nn.Linear(2, 2), [torch.zeros(1, 2)])
