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
from prune_dn.models.families import Family, register_family
from prune_dn.models.light_cnn import LightCNN, light_cnn_9, light_cnn_29, light_cnn_29_v2
from prune_dn.models.light_cnn_config import LightCNNConfig, MFMConfig
from prune_dn.models.mfm import MFM_KINDS, MaxFeatureMap, max_feature_map
from prune_dn.models.registered import DENSE_NET, LIGHT_CNN

__all__ = [
    "BUILDERS",
    "DENSE_NET",
    "LIGHT_CNN",
    "LIGHT_CNNS",
    "MFM_KINDS",
    "DenseNet",
    "DenseNetConfig",
    "Family",
    "LayerConfig",
    "LightCNN",
    "LightCNNConfig",
    "MFMConfig",
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
    "light_cnn_9",
    "light_cnn_29",
    "light_cnn_29_v2",
    "max_feature_map",
    "register_family",
]
