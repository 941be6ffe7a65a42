"""What comes out follows from model and data, not from PyTorch's defaults for new tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise_
from torchvision.models import resnet18

import prune_dn
from prune_dn.base.defaults import usual_defaults
from prune_dn.models import densenet, light_cnn_9
from prune_dn.pruning import compensate_plan, make_plan, prune, settling_plan


def net() -> torch.nn.Module:
    made = densenet([2, 2], 4, bn_size=2, stem="cifar", num_classes=4, mfm={"transition1": "2/1"})
    return randomise_(made, 0).eval()


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = {"net": net(), "light": light_cnn_9(5, image_size=16).eval()}
    made |= {"resnet": randomise_(resnet18(num_classes=4), 1).eval()}
    return made | {
        "x": torch.randn(8, 3, 8, 8, generator=generator),
        "faces": torch.randn(4, 1, 16, 16, generator=generator),
        "y": torch.arange(8) % 4,
        "plan": make_plan(made["net"], 0.3),
    }


CALLS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    **{
        name: lambda g, _, name=name: (
            make_plan(g["net"], 0.3, criterion=name, calibration=[(g["x"], g["y"])]).keep_indices
        )
        for name in ("reconstruction", "taylor", "fisher", "activation")
    },
    "random": lambda g, _: make_plan(g["net"], 0.3, criterion="random").keep_indices,
    "settle": lambda g, _: settling_plan(g["net"], [g["x"]]).keep_indices,
    "apply": lambda g, _: prune_dn.apply_plan(g["net"], g["plan"]).state_dict(),
    "compensate": lambda g, _: compensate_plan(
        prune_dn.apply_plan(g["net"], g["plan"]), g["net"], g["plan"], [g["x"]]
    ).state_dict(),
    "resnet": lambda g, _: prune(g["resnet"], 0.3, input_size=32).state_dict(),
    "light": lambda g, _: prune(
        g["light"], 0.3, criterion="activation", calibration=[g["faces"]]
    ).state_dict(),
    "count": lambda g, _: {"count": prune_dn.count(g["resnet"], 32)},
    "save and load": lambda g, path: (
        prune_dn.save(g["net"], path / "a.safetensors")
        or prune_dn.load(path / "a.safetensors").state_dict()
    ),
    "measure": lambda g, _: {
        "n": prune_dn.measure_latency(g["net"], batch_size=2, image_size=8, repeats=1).n
    },
}


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")],
)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_under_other_defaults(given, call, dtype, device, tmp_path) -> None:
    expected = CALLS[call](given, tmp_path)
    with defaults(dtype, device):
        found = CALLS[call](given, tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].device == value.device
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
        else:
            assert found[key] == value


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta")])
def test_export_under_other_defaults(given, dtype, device, tmp_path) -> None:
    with defaults(dtype, device):
        report = prune_dn.export_onnx(given["net"], tmp_path / "a.onnx", image_size=8)
        again = prune_dn.export_torch(given["net"], tmp_path / "a.pt2", image_size=8)
    assert report.size_bytes and again.size_bytes
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(loaded(given["x"]), given["net"](given["x"]))


def test_the_callers_defaults_come_back_after_an_error() -> None:
    @usual_defaults()
    def fails() -> None:
        assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).device.type == "cpu"
        raise ZeroDivisionError

    with defaults(torch.float64, "meta"):
        with pytest.raises(ZeroDivisionError):
            fails()
        assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).is_meta
