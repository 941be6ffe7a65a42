"""Nets by name: what the libraries build themselves, but for weights that are to come from a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from oracle import randomise_

from prune_dn.checkpoints.checkpoint import load, save
from prune_dn.errors import ConversionError
from prune_dn.models.named import Named, candidates, other_make, usual_image_size
from prune_dn.pruning import prune


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("torchvision/regnet_y_400mf", lambda n: torchvision.models.get_model(n, num_classes=5)),
        (
            "torchvision/fcn_resnet50",
            lambda n: torchvision.models.get_model(n, weights_backbone=None, num_classes=5),
        ),
        ("timm/test_vit", lambda n: timm.create_model(n, num_classes=5)),
        ("timm/test_efficientnet", lambda n: timm.create_model(n, num_classes=5)),
    ],
)
def test_the_same_modules_and_shapes_in_little_memory(name: str, make) -> None:
    built, wanted = Named(name, {"num_classes": 5}).build(), make(name.partition("/")[2])
    assert other_make(wanted, built) is None
    shapes = [(n, t.shape) for n, t in wanted.state_dict().items()]
    assert [(n, t.shape) for n, t in built.state_dict().items()] == shapes
    large = [p for p in built.parameters() if p.numel() > 10_000]
    assert large and all(p.is_meta for p in large)
    assert name in [found.name for found in candidates(wanted)]


def test_constants_that_no_state_dict_holds_are_made(tmp_path: Path) -> None:
    """The kernels of blurs; also where their channels were cut."""
    net = randomise_(timm.create_model("resnetblur18", num_classes=3), 0).eval()
    built = Named("timm/resnetblur18", {"num_classes": 3}).build()
    kernels = {n: b for n, b in built.named_buffers() if n.endswith("filt")}
    assert kernels
    for name, kernel in kernels.items():
        assert torch.equal(kernel, net.get_buffer(name))
    x = torch.randn(1, 3, 64, 64)
    for model in (net, prune(net, 0.3, criterion="l2", input_size=64).eval()):
        save(model, tmp_path / "net")
        assert torch.equal(load(tmp_path / "net")(x), model(x))


def test_what_differs_is_named() -> None:
    one, other = (torchvision.models.resnet18(num_classes=2) for _ in range(2))
    assert other_make(one, other) is None
    other.layer1[0].bn1.eps = 1e-3
    assert other_make(one, other) == "layer1.0.bn1.eps is 1e-05, not 0.001"
    other.layer1[0].bn1 = torch.nn.Identity()
    found = other_make(one, other)
    assert found is not None and found.startswith("layer1.0.bn1 is a torch.nn.modules.batchnorm")
    assert other_make(one, torchvision.models.resnet34(num_classes=2)) is not None


def test_sizes_and_timm_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_image_size(timm.create_model("test_resnet")) == 160
    assert usual_image_size(torch.nn.Conv2d(3, 4, 1)) == 224
    assert list(candidates(torch.nn.Conv2d(3, 4, 1))) == []
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConversionError, match="timm is needed to build this net: pip install timm"):
        Named("timm/resnet18")
