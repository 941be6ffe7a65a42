"""The named nets: the papers' and torchvision's DenseNets, with or without MFM, and Light CNNs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from prune_dn.base import limits
from prune_dn.errors import ConfigError
from prune_dn.models.config import (
    DenseNetConfig,
    Indices,
    LayerConfig,
    Stem,
    TransitionConfig,
    pair_up,
)
from prune_dn.models.dense_net import DenseNet
from prune_dn.models.light_cnn import LightCNN, light_cnn_9, light_cnn_29, light_cnn_29_v2
from prune_dn.models.mfm import MFM_KINDS

MFM = str | Mapping[str, str] | None


def densenet(
    block_config: Sequence[int] = (6, 12, 24, 16),
    growth_rate: int = 32,
    *,
    num_init_features: int | None = None,
    bn_size: int | None = 4,
    compression: float = 0.5,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: Stem = "imagenet",
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """Any DenseNet (arXiv:1608.06993).

    `bn_size=None` makes basic layers (no bottleneck); `num_init_features=None` is twice the growth
    rate, as in the paper; `compression` is the share of channels that a transition keeps.

    `mfm` puts Max-Feature-Map on parts of the net. The convs there keep their filters, and the MFM
    thins what they pass on: of `growth_rate` newly made maps 2/1 leaves a half, 3/2 two thirds.
    A mapping goes from names or patterns to a kind, `{"denseblock3.*": "2/1", "transition1":
    "3/2"}`; the preset `"middle_and_last"` puts 2/1 on five dense layers, evenly from the middle
    of the net to its last. A transition's filters are rounded down to whole MFM units.

    `mfm_skipped` puts 2/1 on what parts *read* instead, the skipped-over maps, before their norm: of r
    stream channels number c competes with number c + ceil(r / 2), and the reader has half as many.
    The names are those of readers, with `"classifier"`; the preset takes the same five layers.

    Raises ConfigError for impossible widths, or a pattern that matches nothing.

    >>> net = densenet([2, 2], 8, stem="cifar", num_classes=10, mfm={"denseblock1.*": "2/1"})
    >>> net.config.blocks[0][0].out_channels
    4
    """
    if not 0.0 < compression <= 1.0:
        raise ConfigError(f"compression is {compression!r}; it must lie in (0, 1]")
    for name, value in (
        ("growth_rate", growth_rate),
        *((f"block_config[{i}]", n) for i, n in enumerate(block_config)),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
    width = 2 * growth_rate if num_init_features is None else num_init_features
    total = sum(block_config)
    made = width + growth_rate * total
    if total > limits.LAYERS or made > limits.CHANNELS:
        raise ConfigError(
            f"block_config and growth_rate ask for {total:,} layers and {made:,} channels; nets have at "
            f"most {limits.LAYERS:,} and {limits.CHANNELS:,}"
        )
    readers = _names(block_config)
    kinds = _mfm_kinds(readers[:-1], "mfm", mfm, tuple(MFM_KINDS))
    skipped = _mfm_kinds(readers, "mfm_skipped", mfm_skipped, ("2/1",))
    init, blocks, transitions = width, [], []
    for b, depth in enumerate(block_config, start=1):
        layers = []
        for i in range(1, depth + 1):
            kind = kinds.get(f"denseblock{b}.denselayer{i}")
            out = _after_mfm(growth_rate, kind)
            leads, rivals = _read(width, f"denseblock{b}.denselayer{i}" in skipped)
            if kind is not None and growth_rate % MFM_KINDS[kind][0]:
                raise ConfigError(
                    f"denseblock{b}.denselayer{i}: mfm {kind} needs a growth rate that is a "
                    f"multiple of {MFM_KINDS[kind][0]}, not {growth_rate}"
                )
            layers.append(
                LayerConfig(
                    f"denselayer{i}",
                    out,
                    None if bn_size is None else bn_size * growth_rate,
                    leads,
                    kind,
                    rivals,
                )
            )
            width += out
        blocks.append(tuple(layers))
        if b < len(block_config):
            kind = kinds.get(f"transition{b}")
            leads, rivals = _read(width, f"transition{b}" in skipped)
            width = _after_mfm(int(width * compression), kind)
            transitions.append(TransitionConfig(width, leads, kind, rivals))
    leads, rivals = _read(width, "classifier" in skipped)
    config = DenseNetConfig(
        num_init_features=init,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        num_classes=num_classes,
        in_channels=in_channels,
        stem=stem,
        classifier_indices=leads,
        drop_rate=drop_rate,
        classifier_rivals=rivals,
    )
    return DenseNet(config, memory_efficient=memory_efficient)


def _after_mfm(filters: int, kind: str | None) -> int:
    if kind is None:
        return filters
    siblings, survivors = MFM_KINDS[kind]
    return filters // siblings * survivors


def _read(width: int, competes: bool) -> tuple[Indices, Indices]:
    """What a reader of a whole stream reads, and the rivals of that."""
    if not competes:
        return None, None
    leads, rivals = pair_up(tuple(range(width)))
    return (leads, rivals) if rivals != leads else (None, None)


def _names(block_config: Sequence[int]) -> list[str]:
    """All readers: layers, transitions, the classifier."""
    layers = [
        f"denseblock{b}.denselayer{i}"
        for b, depth in enumerate(block_config, start=1)
        for i in range(1, depth + 1)
    ]
    return [*layers, *(f"transition{b}" for b in range(1, len(block_config))), "classifier"]


def _mfm_kinds(
    names: list[str], argument: str, mfm: MFM, allowed: tuple[str, ...]
) -> dict[str, str]:
    """Which part gets which MFM."""
    layers = [name for name in names if "denselayer" in name]
    if mfm is None:
        return {}
    if mfm == "middle_and_last":
        if len(layers) < 9:
            raise ConfigError(
                f"{argument}='middle_and_last' takes five layers of the second half; {len(layers)} "
                "layers are too few (at least 9): name the layers in a mapping instead"
            )
        middle, last = len(layers) // 2, len(layers) - 1
        return {layers[round(middle + i * (last - middle) / 4)]: "2/1" for i in range(5)}
    if not isinstance(mfm, Mapping):
        raise ConfigError(
            f"{argument} is {mfm!r}; use None, 'middle_and_last' or a mapping like "
            f"{{'transition1': '2/1'}}"
        )
    kinds: dict[str, str] = {}
    for pattern, kind in mfm.items():
        if kind not in allowed:
            raise ConfigError(
                f"{argument} kind {kind!r} is unknown; choose one of {', '.join(allowed)}"
            )
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(
                f"{argument} pattern {pattern!r} matches no part; the parts are {', '.join(names)}"
            )
        kinds.update(dict.fromkeys(matched, kind))
    return kinds


def _cifar(
    block_config: Sequence[int],
    growth_rate: int,
    bn_size: int | None,
    compression: float,
    num_classes: int,
    drop_rate: float,
    mfm: MFM,
    mfm_skipped: MFM,
    memory_efficient: bool | int,
) -> DenseNet:
    return densenet(
        block_config,
        growth_rate,
        bn_size=bn_size,
        compression=compression,
        stem="cifar",
        num_classes=num_classes,
        drop_rate=drop_rate,
        mfm=mfm,
        mfm_skipped=mfm_skipped,
        memory_efficient=memory_efficient,
    )


def densenet40(
    num_classes: int = 10,
    *,
    growth_rate: int = 12,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-40 for 32x32 images: basic layers, no compression, 24 initial maps (as in the
    Network Slimming port), 1.06 M parameters and 288 MMACs at growth rate 12."""
    return _cifar(
        (12, 12, 12),
        growth_rate,
        None,
        1.0,
        num_classes,
        drop_rate,
        mfm,
        mfm_skipped,
        memory_efficient,
    )


def densenet_bc100(
    num_classes: int = 10,
    *,
    growth_rate: int = 12,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-BC-100 for 32x32 images: bottlenecks, compression 0.5, 0.8 M parameters at k=12."""
    return _cifar(
        (16, 16, 16),
        growth_rate,
        4,
        0.5,
        num_classes,
        drop_rate,
        mfm,
        mfm_skipped,
        memory_efficient,
    )


def densenet_bc190(
    num_classes: int = 10,
    *,
    growth_rate: int = 40,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-BC-190 for 32x32 images: bottlenecks, compression 0.5, 25.6 M parameters at k=40."""
    return _cifar(
        (31, 31, 31),
        growth_rate,
        4,
        0.5,
        num_classes,
        drop_rate,
        mfm,
        mfm_skipped,
        memory_efficient,
    )


def _imagenet(
    block_config: Sequence[int],
    growth_rate: int,
    num_classes: int,
    in_channels: int,
    drop_rate: float,
    mfm: MFM,
    mfm_skipped: MFM,
    memory_efficient: bool | int,
) -> DenseNet:
    return densenet(
        block_config,
        growth_rate,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_rate=drop_rate,
        mfm=mfm,
        mfm_skipped=mfm_skipped,
        memory_efficient=memory_efficient,
    )


def densenet121(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-121 for 224x224 images, as torchvision's."""
    return _imagenet(
        (6, 12, 24, 16), 32, num_classes, in_channels, drop_rate, mfm, mfm_skipped, memory_efficient
    )


def densenet161(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-161 for 224x224 images, as torchvision's."""
    return _imagenet(
        (6, 12, 36, 24), 48, num_classes, in_channels, drop_rate, mfm, mfm_skipped, memory_efficient
    )


def densenet169(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-169 for 224x224 images, as torchvision's."""
    return _imagenet(
        (6, 12, 32, 32), 32, num_classes, in_channels, drop_rate, mfm, mfm_skipped, memory_efficient
    )


def densenet201(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-201 for 224x224 images, as torchvision's."""
    return _imagenet(
        (6, 12, 48, 32), 32, num_classes, in_channels, drop_rate, mfm, mfm_skipped, memory_efficient
    )


def densenet264(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    mfm: MFM = None,
    mfm_skipped: MFM = None,
    memory_efficient: bool | int = False,
) -> DenseNet:
    """DenseNet-264 for 224x224 images (paper, table 1)."""
    return _imagenet(
        (6, 12, 64, 48), 32, num_classes, in_channels, drop_rate, mfm, mfm_skipped, memory_efficient
    )


LIGHT_CNNS: dict[str, Callable[..., LightCNN]] = {
    f.__name__: f for f in (light_cnn_9, light_cnn_29, light_cnn_29_v2)
}
BUILDERS: dict[str, Callable[..., DenseNet | LightCNN]] = LIGHT_CNNS | {
    f.__name__: f
    for f in (
        densenet,
        densenet40,
        densenet_bc100,
        densenet_bc190,
        densenet121,
        densenet161,
        densenet169,
        densenet201,
        densenet264,
    )
}
