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


GOOD = torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"image": GOOD},
            "recalibration batch: .* keyword argument 'image'; a dict is read as the",
        ),
        ((GOOD * 100).byte(), r"batch 1 is a tensor \(6, 3, 8, 8\) of torch.uint8; each batch"),
        ((torch.arange(6), GOOD), r"batch 1 is a tensor \(6,\) of torch.int64; each batch must"),
        (GOOD[0], r"batch 1 is a tensor \(3, 8, 8\)"),
        ((), "batch 1 is a tuple"),
        (GOOD * torch.nan, "recalibration batch 1 holds NaN or infinity"),
        (GOOD / 0, "recalibration batch 1 holds NaN or infinity"),
        (GOOD[:, :1], "recalibration images have 1 channels; the model takes 3"),
        (GOOD[:1, :, :1, :1], r"cannot run on recalibration images of shape \(1, 3, 1, 1\)"),
        (GOOD[:0], "recalibration batch 1 holds no images"),
    ],
)
def test_batches_that_are_refused_change_nothing(bad, message) -> None:
    net, _ = net_and_batches()
    net.features.norm5.momentum = 0.3
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [m.training for m in net.modules()]
    with pytest.raises(PruningError, match=message):
        recalibrate_batch_norm_(net, [GOOD, bad])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert net.features.norm5.momentum == 0.3
    with pytest.raises(PruningError, match="recalibration is one tensor; give an iterable"):
        recalibrate_batch_norm_(net, GOOD)


def test_what_is_not_finite() -> None:
    """Statistics may be damaged, for they are replaced; weights may not, and results are looked at."""
    net, batches = net_and_batches()
    net.features.norm5.running_var.fill_(torch.nan)
    assert recalibrate_batch_norm_(net, batches) == 4
    assert net.features.norm5.running_var.isfinite().all()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.features.conv0.weight.data.fill_(1e30)
    with pytest.raises(PruningError, match=r"features.denseblock1.denselayer1.norm1.running_var h"):
        recalibrate_batch_norm_(net, batches)
    net.features.conv0.weight.data.copy_(before["features.conv0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.features.conv0.weight.data[0] = torch.nan
    with pytest.raises(PruningError, match=r"features.conv0.weight holds 27 NaN"):
        recalibrate_batch_norm_(net, batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_are_cast_and_half_precision_averages_in_float32(dtype: torch.dtype) -> None:
    """Three hundred batches: averages in bfloat16 would stop moving after some."""
    net, _ = net_and_batches()
    batches = [torch.randn(2, 3, 4, 4) + i / 100 for i in range(300)]
    net.to(dtype)
    wide, _ = net_and_batches()
    wide.double().load_state_dict(net.state_dict())
    assert recalibrate_batch_norm_(net, batches) == 300
    assert recalibrate_batch_norm_(wide, [x.double() for x in batches]) == 300
    for key, value in net.state_dict().items():
        if "running_" in key:
            assert value.dtype == dtype
            torch.testing.assert_close(
                value.double(), wide.state_dict()[key], rtol=4 * torch.finfo(dtype).eps, atol=1e-4
            )


def test_autograd_may_be_off_around_it_and_other_norms_are_reached() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(144))
    with torch.inference_mode():
        assert recalibrate_batch_norm_(net, [GOOD, GOOD]) == 2
    maps = net[0](GOOD)
    torch.testing.assert_close(net[1].running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(
        net[3].running_mean,
        nn.functional.batch_norm(maps, None, None, training=True).flatten(1).mean(0),
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_torch_cannot_copy() -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    net(GOOD)
    with pytest.raises(PruningError, match=r"cannot be copied: 0.weight .*remove_weight_norm"):
        recalibrate_batch_norm_(net, [GOOD])
