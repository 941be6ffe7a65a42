"""Our MACs beside those of thop."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import randomise_
from other_nets import NETS
from torch import nn

from prune_dn.errors import PruneDNError
from prune_dn.measure.cross_check import cross_check
from prune_dn.measure.profiling import count
from prune_dn.models import densenet, light_cnn_9
from prune_dn.pruning import prune


@pytest.mark.parametrize("name", sorted(NETS))
def test_convs_and_linear_layers_agree(name: str) -> None:
    """But for a transposed conv with a stride: thop counts its outputs, each as if all taps were used."""
    build, example, _ = NETS[name]
    net, inputs = build(), example()
    keys = list(net.state_dict())
    found = cross_check(net, example_inputs=inputs)
    assert found.macs == count(net, example_inputs=inputs).macs
    more = 0
    if name == "u-net":  # 8 x 8 pixels in, 16 x 16 out, weights of 32 x 8 x 2 x 2
        more = 32 * 8 * 4 * (16 * 16 - 8 * 8)
    assert found.thop_layers == found.macs + more
    assert found.layers_difference_percent == pytest.approx(100 * more / found.macs, abs=1e-3)
    percent = 100 * (found.thop - found.macs) / found.macs
    assert found.difference_percent == pytest.approx(percent, abs=1e-3)
    assert list(net.state_dict()) == keys


def test_our_own_nets() -> None:
    net = prune(randomise_(densenet([2, 2], 4, stem="cifar", num_classes=3), 0), 0.5)
    found = cross_check(net, 16)
    assert found.thop_layers == found.macs < found.thop  # its own count has norms and poolings
    light = light_cnn_9(3, image_size=32, widths=(4, 4, 6, 6, 6), embedding=8)
    assert cross_check(light, 32).layers_difference_percent == 0


def test_thop_is_not_needed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(PruneDNError, match="thop is needed to verify MACs: pip install"):
        cross_check(nn.Conv2d(3, 4, 1), example_inputs=torch.zeros(1, 3, 8, 8))
