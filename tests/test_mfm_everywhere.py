"""A net with MFM in all three places, from pruning to the files that leave the house."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from oracle import masked, randomise_

import prune_dn
from prune_dn.models import DenseNet, densenet
from prune_dn.pruning import make_plan
from prune_dn.pruning.recalibrate import recalibrate_batch_norm_

FRESH = """
import sys, torch, prune_dn
net = prune_dn.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(net(x).detach(), sys.argv[3])
"""


def three_places() -> DenseNet:
    net = densenet(
        [2, 3], 6, num_init_features=7, bn_size=2, stem="cifar", num_classes=5, drop_rate=0.1,
        mfm={"denseblock1.*": "2/1", "denseblock2.denselayer1": "3/2", "transition1": "2/1"},
        mfm_skipped={"denseblock1.denselayer2": "2/1", "denseblock2.*": "2/1",
                     "transition1": "2/1", "classifier": "2/1"},
    )  # fmt: skip
    return randomise_(net, 1)


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    return list(zip(images.split(8), (torch.arange(16) % 5).split(8), strict=True))


REQUESTS = {
    "defaults": {"pruning_ratio": 0.5},
    "losers": {
        "pruning_ratio": 0.1,
        "unit": "macs",
        "criterion": "mfm_win_rate",
        "units": ["sibling"],
    },
    "all kinds": {
        "pruning_ratio": 0.3,
        "unit": "macs",
        "criterion": "reconstruction",
        "units": ["stream", "bottleneck", "edge", "sibling"],
        "compensate": "least_squares",
    },
    "local": {
        "pruning_ratio": 0.4,
        "criterion": "taylor",
        "scope": "local",
        "units": ["stream", "bottleneck", "edge", "sibling"],
    },
    "layers": {"pruning_ratio": 0.3, "unit": "params", "units": ["stream", "sibling", "layer"]},
}


@pytest.mark.parametrize("request_", list(REQUESTS))
def test_prune_train_save_load_export(request_: str, tmp_path: Path) -> None:
    request = dict(REQUESTS[request_])
    net = three_places()
    needs = prune_dn.pruning.criteria.reads_images(request.get("criterion", "bn_scale"))
    calibration = batches() if needs else None
    small = prune_dn.prune(net, calibration=calibration, input_size=8, **request)
    assert prune_dn.count(small, 8).params < prune_dn.count(net, 8).params
    small.train()
    for memory_efficient in (False, True):
        small.memory_efficient = memory_efficient
        optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
        images, labels = batches()[0]
        F.cross_entropy(small(images), labels).backward()
        silent = [name for name, p in small.named_parameters() if p.grad is None]
        assert silent == []
        optimizer.step()
        optimizer.zero_grad()
    recalibrate_batch_norm_(small, [x for x, _ in batches()])
    small.memory_efficient = False  # which is equal but for rounding
    small.eval()
    x = torch.randn(3, 3, 8, 8)
    files = [str(tmp_path / name) for name in ("net.safetensors", "x.pt", "y.pt")]
    prune_dn.save(small, files[0])
    torch.save(x, files[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, env=environment)
    expected = small(x).detach()
    assert torch.equal(torch.load(files[2], weights_only=True), expected)
    prune_dn.export_onnx(small, tmp_path / "net.onnx", image_size=8)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    prune_dn.export_torch(small, tmp_path / "net.pt2", image_size=8)
    program = torch.export.load(str(tmp_path / "net.pt2")).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


def test_one_plan_after_another_until_little_is_left() -> None:
    net, x = three_places().double().eval(), torch.randn(3, 3, 8, 8).double()
    images = [(x.double(), y) for x, y in batches()]
    for round_, criterion in enumerate(("l2", "taylor", "bn_scale")):
        plan = make_plan(
            net, 0.3, unit="macs", criterion=criterion, seed=round_, input_size=8,
            units=["stream", "bottleneck", "edge", "sibling"],
            calibration=images if criterion == "taylor" else None,
        )  # fmt: skip
        expected = masked(net, plan)(x)
        net = prune_dn.apply_plan(net, plan)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_the_latency_model_and_sensitivity_know_them(made_up_times: None) -> None:
    from prune_dn.pruning.sensitivity import sensitivity

    net = three_places().eval()
    plan = make_plan(net, 0.3, unit="latency", input_size=8, units=["stream", "edge", "sibling"])
    assert plan.achieved["after"]["latency"] < plan.achieved["before"]["latency"]
    rows = sensitivity(
        net, lambda cut: float(sum(p.numel() for p in cut.parameters())), ratios=[0.4, 0.75],
        units=["sibling"], criterion="mfm_win_rate", calibration=[x for x, _ in batches()],
        input_size=8,
    )  # fmt: skip
    by_name = {row.name: row for row in rows if row.ratio == 0.4}
    losers = {row.name: row.units_cut for row in rows if row.ratio == 0.75}
    assert losers["features.denseblock1.denselayer1.mfm"] == 3  # of 6 siblings
    first = by_name["features.denseblock1.denselayer1.mfm"]
    assert (first.kind, first.size, first.units_cut) == ("sibling", 6, 2)
    assert first.params_saved == first.drop == 2 * 12 * 9
    reads = by_name["features.denseblock2.denselayer1.read"]
    assert reads.units_cut and reads.params_saved == 0
