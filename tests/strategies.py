"""Hypothesis strategies that several tests share."""

from __future__ import annotations

from hypothesis import strategies as st

from prune_dn.models import DenseNetConfig, LayerConfig, TransitionConfig

MFM = st.sampled_from([None, None, "2/1", "3/2"])


@st.composite
def indices(draw: st.DrawFn, width: int) -> tuple[int, ...] | None:
    """What a reader reads of a stream: everything, or some positions."""
    if draw(st.booleans()):
        return None
    some = draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width))
    return tuple(sorted(some))


@st.composite
def pruned_configs(draw: st.DrawFn, *, edges: bool = True, mfm: bool = True) -> DenseNetConfig:
    """Small DenseNets as pruning leaves them: uneven widths, gone layers, empty blocks.

    `edges=False`: every reader reads the whole stream; `mfm=False`: no Max-Feature-Map.
    """
    kinds = MFM if mfm else st.none()

    def read(width: int) -> tuple[int, ...] | None:
        return draw(indices(width)) if edges else None

    width = init = draw(st.integers(1, 5))
    blocks, transitions = [], []
    count = draw(st.integers(1, 3))
    for b in range(count):
        layers = []
        for number in sorted(draw(st.sets(st.integers(1, 12), max_size=3))):
            kind = draw(kinds)
            out = draw(st.integers(1, 4)) * (2 if kind == "3/2" else 1)
            narrow = draw(st.none() | st.integers(1, 5))
            layers.append(LayerConfig(f"denselayer{number}", out, narrow, read(width), kind))
            width += out
        blocks.append(tuple(layers))
        if b < count - 1:
            kind, before = draw(kinds), width
            width = draw(st.integers(1, 4)) * (2 if kind == "3/2" else 1)
            transitions.append(TransitionConfig(width, read(before), kind))
    return DenseNetConfig(
        num_init_features=init,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        num_classes=draw(st.integers(1, 4)),
        in_channels=draw(st.sampled_from([1, 3])),
        stem=draw(st.sampled_from(["cifar", "imagenet"])),
        classifier_indices=read(width),
        drop_rate=draw(st.sampled_from([0.0, 0.2])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
    )
