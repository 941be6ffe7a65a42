"""The families that are ours: DenseNets and Light CNNs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from prune_dn.models.config import DenseNetConfig
from prune_dn.models.dense_net import DenseLayer, DenseNet
from prune_dn.models.dense_net_keys import infer_config
from prune_dn.models.families import Family, Modules, Shape, register_family
from prune_dn.models.light_cnn import LightCNN
from prune_dn.models.light_cnn_config import LightCNNConfig
from prune_dn.models.light_cnn_keys import infer_light_cnn


def _told(config: Any, modules: Modules, first: str, last: str) -> dict[str, Any]:
    """Input channels and classes, by the weights of the first and the last layer."""
    found = {}
    for field, name, dims, side in (("in_channels", first, 4, 1), ("num_classes", last, 2, 0)):
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == dims:
            found[field] = weight.shape[side]
    return found


def _told_by_dense_net(config: DenseNetConfig, modules: Modules) -> dict[str, Any]:
    found = _told(config, modules, "features.conv0", "classifier")
    norms = {m.eps for m in modules.values() if isinstance(m, _BatchNorm)}
    drops = {m.drop_rate for m in modules.values() if isinstance(m, DenseLayer)}
    for field, values in (("norm_eps", norms), ("drop_rate", drops)):
        if len(values) == 1:
            found[field] = values.pop()
    return found


def _small(config: DenseNetConfig) -> Shape:
    """Two images that leave maps of 2x2 pixels, odd widths where a pooling could round otherwise."""
    scale = 2 ** (len(config.blocks) - 1)
    height, width = 2 * scale, 3 * scale - 1
    if config.stem == "imagenet":
        height, width = 4 * height - 1, 4 * width - 1
    return 2, config.in_channels, height, width


def _facts(config: DenseNetConfig) -> dict[str, Any]:
    rivals = {
        c.module: f"{len(np.unique(c.operands))} maps compete, {c.results.size} win"
        for c in config.graph().competitions
    }
    layers = [len(block) for block in config.blocks]
    return {"stem": config.stem, "layers_per_block": layers, "mfm": rivals}


DENSE_NET = register_family(
    Family(
        "DenseNet",
        DenseNet,
        DenseNetConfig,
        image_size=lambda config: 32 if config.stem == "cifar" else 224,
        shares_memory=True,
        small=_small,
        told=_told_by_dense_net,
        layers=lambda config: sum(map(len, config.blocks)),
        facts=_facts,
        assumed=lambda config: (
            f"eps {config.norm_eps}, no dropout, ReLU and the poolings of torchvision"
        ),
        firsts=("features.conv0.weight",),
        infer=infer_config,
    )
)
LIGHT_CNN = register_family(
    Family(
        "Light CNN",
        LightCNN,
        LightCNNConfig,
        image_size=lambda config: config.image_size,
        one_size=True,
        told=lambda config, modules: _told(config, modules, config.places()[0].name, "fc2"),
        layers=lambda config: len(config.layers),
        facts=lambda config: {"light_cnn": config.variant, "blocks": list(config.blocks)},
        assumed=lambda config: (
            f"a dropout of {config.drop_rate}, images of {config.image_size} pixels"
        ),
        firsts=("conv1.filter.weight", "features.0.filter.weight"),
        infer=infer_light_cnn,
    )
)
