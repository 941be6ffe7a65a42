"""DenseNets and MFM."""

from prune_dn.models.builders import (
    BUILDERS,
    densenet,
    densenet40,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc100,
    densenet_bc190,
)
from prune_dn.models.config import DenseNetConfig, LayerConfig, TransitionConfig
from prune_dn.models.densenet import DenseNet
from prune_dn.models.mfm import MFM_KINDS, MaxFeatureMap, max_feature_map

__all__ = [
    "BUILDERS",
    "MFM_KINDS",
    "DenseNet",
    "DenseNetConfig",
    "LayerConfig",
    "MaxFeatureMap",
    "TransitionConfig",
    "densenet",
    "densenet40",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc100",
    "densenet_bc190",
    "max_feature_map",
]
