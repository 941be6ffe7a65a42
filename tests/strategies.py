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
def rivalries(draw: st.DrawFn, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a reader reads of a stream of two or more, and the rivals: some pairs, some alone."""
    some = draw(st.sets(st.integers(0, width - 1), min_size=2, max_size=width))
    mixed = draw(st.permutations(sorted(some)))
    paired = 2 * draw(st.integers(1, len(mixed) // 2))
    pairs = [tuple(sorted(mixed[i : i + 2])) for i in range(0, paired, 2)]
    pairs += [(i, i) for i in mixed[paired:]]
    leads, rivals = zip(*sorted(pairs), strict=True)
    return leads, rivals


@st.composite
def alone(draw: st.DrawFn, units: int, kind: str | None) -> tuple[int, ...]:
    """The units of an MFM 2/1 that have one filter left: not all of them."""
    if kind != "2/1" or units == 1:
        return ()
    return tuple(sorted(draw(st.sets(st.integers(0, units - 1), max_size=units - 1))))


@st.composite
def pruned_configs(draw: st.DrawFn, *, edges: bool = True, mfm: bool = True) -> DenseNetConfig:
    """Small DenseNets as pruning leaves them: uneven widths, gone layers, empty blocks.

    `edges=False`: every reader reads the whole stream; `mfm=False`: no Max-Feature-Map, whatever
    it is on; with it some filters stand alone, and some readers let what they read compete.
    """
    kinds = MFM if mfm else st.none()

    def read(width: int) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        if edges and mfm and width > 1 and draw(st.booleans()):
            return draw(rivalries(width))
        return (draw(indices(width)) if edges else None), None

    width = init = draw(st.integers(1, 5))
    blocks, transitions = [], []
    count = draw(st.integers(1, 3))
    for b in range(count):
        layers = []
        for number in sorted(draw(st.sets(st.integers(1, 12), max_size=3))):
            kind = draw(kinds)
            out = draw(st.integers(1, 4)) * (2 if kind == "3/2" else 1)
            narrow = draw(st.none() | st.integers(1, 5))
            leads, rivals = read(width)
            single = draw(alone(out, kind))
            layers.append(
                LayerConfig(f"denselayer{number}", out, narrow, leads, kind, rivals, single)
            )
            width += out
        blocks.append(tuple(layers))
        if b < count - 1:
            kind = draw(kinds)
            leads, rivals = read(width)
            width = draw(st.integers(1, 4)) * (2 if kind == "3/2" else 1)
            transitions.append(
                TransitionConfig(width, leads, kind, rivals, draw(alone(width, kind)))
            )
    leads, rivals = read(width)
    return DenseNetConfig(
        num_init_features=init,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        num_classes=draw(st.integers(1, 4)),
        in_channels=draw(st.sampled_from([1, 3])),
        stem=draw(st.sampled_from(["cifar", "imagenet"])),
        classifier_indices=leads,
        classifier_rivals=rivals,
        drop_rate=draw(st.sampled_from([0.0, 0.2])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
    )
