"""The nets of tools/bench_training.py and the ways to train each: ours, torchvision's and timm's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prune_dn.models import DenseNet, densenet
from prune_dn.models.dense_net import DenseLayer
from prune_dn.models.shared_memory import why_not

IMAGENET = {
    "densenet121": (6, 12, 24, 16),
    "densenet169": (6, 12, 32, 32),
    "densenet201": (6, 12, 48, 32),
}
PLAIN = ("naive", "torchvision-plain")


@dataclass(frozen=True)
class Net:
    """A DenseNet with bottlenecks, and the batch that its training is measured at by default."""

    name: str
    blocks: tuple[int, ...]
    growth_rate: int
    image_size: int
    num_classes: int
    batch: int
    depth: int | None


def find_net(name: str) -> Net:
    """`bcDEPTH`: DenseNet-BC, k = 12, for 32x32 images; or one of torchvision's, for 224x224.

    From BC-190 on a naive step at batch 64 asks for more than 10 GB, so these get a batch of 8.
    """
    if name in IMAGENET:
        return Net(name, IMAGENET[name], 32, 224, 1000, 8, None)
    found = re.fullmatch(r"bc(\d+)", name)
    depth = int(found[1]) if found else 0
    if depth < 10 or (depth - 4) % 6:
        raise SystemExit(
            f"net {name!r} is unknown: choose bcDEPTH, with a depth of 6 n + 4, or one of "
            f"{', '.join(IMAGENET)}"
        )
    return Net(name, ((depth - 4) // 6,) * 3, 12, 32, 10, 64 if depth <= 100 else 8, depth)


def build(net: Net, variant: str) -> nn.Module:
    """The net in training mode as the variant has it; all variants have the same weights."""
    torch.manual_seed(0)
    weights = _ours(net).state_dict()
    model = VARIANTS[variant](net).train()
    model.load_state_dict(weights)
    if getattr(model, "memory_efficient", False) and (reason := why_not(model)):
        raise SystemExit(f"{variant} cannot be measured: {reason}")
    return model


def cannot(net: Net, variant: str) -> str | None:
    """Why a variant of a net is not measured, or None."""
    if variant == "torchvision-plain" and net.image_size == 32:
        return "would be the naive net once more"
    try:
        build(net, variant)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _ours(net: Net, memory_efficient: bool | int = False) -> DenseNet:
    return densenet(
        net.blocks,
        net.growth_rate,
        stem="cifar" if net.image_size == 32 else "imagenet",
        num_classes=net.num_classes,
        memory_efficient=memory_efficient,
    )


def _torchvision(net: Net, memory_efficient: bool) -> nn.Module:
    from torchvision.models import DenseNet as Theirs

    width, classes = 2 * net.growth_rate, net.num_classes
    model = Theirs(
        net.growth_rate, net.blocks, width, num_classes=classes, memory_efficient=memory_efficient
    )
    return _with_our_stem(model, net)


def _timm(net: Net) -> nn.Module:
    from timm.models.densenet import DenseNet as Theirs

    model = Theirs(net.growth_rate, net.blocks, net.num_classes, memory_efficient=True)
    return _with_our_stem(model, net)


def _with_our_stem(model: nn.Module, net: Net) -> nn.Module:
    """Theirs reduces the image to a quarter before the first block; for 32x32 images ours does not."""
    if net.image_size == 32:
        features = model.get_submodule("features")
        for name in ("norm0", "relu0", "pool0"):
            if hasattr(features, name):
                delattr(features, name)
        features.conv0 = nn.Conv2d(3, 2 * net.growth_rate, 3, padding=1, bias=False)
    return model


def _checkpointed(net: Net) -> nn.Module:
    """What gpleiss/efficient_densenet_pytorch recomputes: concatenation, norm, ReLU and 1x1 conv."""
    model = _ours(net)
    for layer in model.modules():
        if isinstance(layer, DenseLayer):
            layer.forward = functools.partial(_recomputing, layer)  # type: ignore[method-assign]
    return model


def _recomputing(layer: DenseLayer, sources: list[Tensor]) -> Tensor:
    def bottleneck(*sources: Tensor) -> Tensor:
        out: Tensor = layer.conv1(F.relu(layer.norm1(torch.cat(sources, 1))))
        return out

    out = checkpoint(bottleneck, *sources, use_reentrant=False)
    assert layer.norm2 is not None and layer.conv2 is not None
    made: Tensor = layer.conv2(F.relu(layer.norm2(out)))
    return made


VARIANTS: dict[str, Callable[[Net], nn.Module]] = {
    "naive": _ours,
    "torchvision-plain": lambda net: _torchvision(net, False),
    "torchvision": lambda net: _torchvision(net, True),
    "timm": _timm,
    "checkpoint": _checkpointed,
    "ours-1": lambda net: _ours(net, True),
    "ours-2": lambda net: _ours(net, 2),
}
