"""DenseNets, Light CNNs and MFM."""

from prune_dn.models.builders import (
    BUILDERS,
    LIGHT_CNNS,
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
from prune_dn.models.dense_net import DenseNet
from prune_dn.models.light_cnn import LightCNN, light_cnn_9, light_cnn_29, light_cnn_29_v2
from prune_dn.models.light_cnn_config import LightCNNConfig, MFMConfig
from prune_dn.models.mfm import MFM_KINDS, MaxFeatureMap, max_feature_map
from prune_dn.models.state_dicts import Net

__all__ = [
    "BUILDERS",
    "LIGHT_CNNS",
    "MFM_KINDS",
    "DenseNet",
    "DenseNetConfig",
    "LayerConfig",
    "LightCNN",
    "LightCNNConfig",
    "MFMConfig",
    "MaxFeatureMap",
    "Net",
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
    "light_cnn_9",
    "light_cnn_29",
    "light_cnn_29_v2",
    "max_feature_map",
]
