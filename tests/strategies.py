"""Hypothesis strategies that several tests share."""

from __future__ import annotations

import copy
from typing import Any

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


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 10**18, -(10**30)]),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["2/1", "3/2", "macs", "denselayer1", "imagenet"]),
    st.lists(st.integers(-1, 12), max_size=6),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """A copy of a JSON document with one thing changed, at any depth: a value, a key or an order."""
    found = copy.deepcopy(document)
    place, steps = found, draw(st.integers(1, 8))
    for step in range(steps):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if step == steps - 1 or not isinstance(inner, dict | list) or not inner:
            break
        place = inner
    near = [inner + 1, inner - 1, float(inner)] if type(inner) is int else [inner]
    how = draw(st.sampled_from(["value", "near", "remove", "swap", "repeat", "add"]))
    if how == "remove":
        del place[key]
    elif how == "swap":
        other = draw(st.sampled_from(keys))
        place[key], place[other] = place[other], place[key]
    elif how == "repeat" and isinstance(place, list):
        place.insert(draw(st.integers(0, len(place))), copy.deepcopy(inner))
    elif how == "add" and isinstance(place, list):
        place.append(draw(VALUES))
    elif how == "add":
        place[draw(st.text(max_size=3))] = draw(VALUES)
    else:
        place[key] = draw(st.sampled_from(near) if how == "near" else VALUES)
    return found
