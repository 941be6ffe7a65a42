"""MFM against sorting each tuple of siblings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_dn.errors import ConfigError
from prune_dn.models import MFM_KINDS, MaxFeatureMap, max_feature_map


def slow(x: torch.Tensor, kind: str) -> torch.Tensor:
    siblings, survivors = {"2/1": (2, 1), "3/2": (3, 2)}[kind]
    n = x.shape[1] // siblings
    out = torch.empty(x.shape[0], n * survivors, *x.shape[2:], dtype=x.dtype)
    for c in range(n):
        unit = torch.stack([x[:, c + n * i] for i in range(siblings)])
        ranked = torch.sort(unit, dim=0, descending=True).values
        for place in range(survivors):
            out[:, c + n * place] = ranked[place]
    return out


@pytest.mark.parametrize("kind", sorted(MFM_KINDS))
@pytest.mark.parametrize("units", [1, 2, 5])
def test_equals_sorting(kind: str, units: int) -> None:
    x = torch.randn(3, units * MFM_KINDS[kind][0], 4, 2)
    assert torch.equal(max_feature_map(x, kind), slow(x, kind))
    ties = x.round()
    assert torch.equal(MaxFeatureMap(kind)(ties), slow(ties, kind))


@pytest.mark.parametrize("kind", sorted(MFM_KINDS))
def test_gradient_goes_to_the_survivors_only(kind: str) -> None:
    siblings, survivors = MFM_KINDS[kind]
    x = torch.randn(2, 4 * siblings, 3, requires_grad=True)
    max_feature_map(x, kind).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    ranks = x.detach().reshape(2, siblings, 4, 3).argsort(1, descending=True).argsort(1)
    assert torch.equal(x.grad.reshape(2, siblings, 4, 3), (ranks < survivors).float())


@given(st.data())
def test_who_has_lost_its_sibling_passes_unchanged(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 6))
    alone = tuple(sorted(data.draw(st.sets(st.integers(0, units - 1), max_size=units))))
    x = torch.randn(2, 2 * units, 3, generator=torch.Generator().manual_seed(units)).double()
    lost = x.clone()
    lost[:, [units + unit for unit in alone]] = -torch.inf
    left = [c for c in range(2 * units) if c - units not in alone]
    found = MaxFeatureMap("2/1", units=units, alone=alone)(x[:, left])
    assert torch.equal(found, max_feature_map(lost))


def test_siblings_of_three_cannot_go_alone() -> None:
    with pytest.raises(ConfigError, match=r"mfm 3/2: siblings cannot be cut alone, only whole"):
        MaxFeatureMap("3/2", units=2, alone=(0,))


def test_its_index_is_no_weight() -> None:
    some = MaxFeatureMap("2/1", units=3, alone=(0, 2))
    assert some.rivals is not None and some.rivals.tolist() == [0, 3, 2]
    assert not some.state_dict() and some.double().rivals.dtype == torch.int64
    with torch.device("meta"):
        assert MaxFeatureMap("2/1", units=3, alone=(1,)).rivals.device.type == "cpu"


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"mfm kind '4/1' is unknown; choose one of 2/1, 3/2"):
        max_feature_map(torch.zeros(1, 4), "4/1")
    with pytest.raises(ConfigError, match=r"mfm kind 'max' is unknown; choose one of 2/1, 3/2"):
        MaxFeatureMap("max")
    with pytest.raises(
        ConfigError, match=r"needs a multiple of 3 channels, not 4; cut whole units"
    ):
        max_feature_map(torch.zeros(1, 4), "3/2")


def test_repr_names_the_kind() -> None:
    assert repr(MaxFeatureMap("3/2")) == "MaxFeatureMap('3/2')"
    some = MaxFeatureMap("2/1", units=3, alone=(1,))
    assert repr(some) == "MaxFeatureMap('2/1', 1 of 3 alone)"
