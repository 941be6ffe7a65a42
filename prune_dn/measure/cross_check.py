"""MACs as thop counts them, beside our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from prune_dn.errors import PruneDNError
from prune_dn.graph.inference import call
from prune_dn.measure.profiling import count
from prune_dn.models.examples import batch_size, example_image, inference_copy
from prune_dn.models.sizes import ImageSize


@dataclass(frozen=True)
class CrossCheck:
    """The count of thop for one example, and how much more that is than `macs`, our own count.

    `thop_layers` is what it counts for convolutions and linear layers alone, as we do; it counts a
    transposed convolution by its output positions instead of those of its input, which differs with a
    stride. `thop` is what it gives by itself: norms, poolings, PReLU, softmax and upsampling are in it too, and
    layers of subclasses are not.
    """

    macs: int
    thop_layers: int
    layers_difference_percent: float
    thop: int
    difference_percent: float


def cross_check(
    model: nn.Module, image_size: ImageSize | None = None, *, example_inputs: Any = None
) -> CrossCheck:
    """Count MACs by thop as well; the arguments are those of `count`, and `model` stays as it is.

    Raises PruneDNError where thop is not installed, or a net cannot run.
    """
    ours = count(model, image_size, example_inputs=example_inputs).macs
    net = inference_copy(model)
    if example_inputs is None:
        example_inputs = example_image(net, image_size)
    layers = round(_thop(net, example_inputs, layers_only=True))
    plain = round(_thop(net, example_inputs, layers_only=False))
    percent = [100 * (theirs - ours) / max(ours, 1) for theirs in (layers, plain)]
    return CrossCheck(ours, layers, round(percent[0], 3), plain, round(percent[1], 3))


class _Called(nn.Module):
    """A net as it is called: thop knows positional arguments only."""

    def __init__(self, net: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.net, self.inputs = net, inputs

    def forward(self) -> Any:
        return call(self.net, self.inputs)


def _thop(net: nn.Module, inputs: Any, *, layers_only: bool) -> float:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports distutils
            from thop import profile
            from thop.vision.basic_hooks import count_convNd, count_linear
    except ImportError as error:
        raise PruneDNError(
            "thop is needed to verify MACs: pip install 'prune_dn[verify]'"
        ) from error
    rules: dict[type[nn.Module], Callable[..., None] | None] = {}
    if layers_only:
        for layer in net.modules():
            linear = count_linear if isinstance(layer, nn.Linear) else None
            rules[type(layer)] = count_convNd if isinstance(layer, _ConvNd) else linear
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        called = _Called(inference_copy(net), inputs)
        macs, _ = profile(called, (), custom_ops=rules, verbose=False)
    return float(macs) / batch_size(inputs)
