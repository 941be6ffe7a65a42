"""Who wins, against counting pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import randomise_
from strategies import alone, rivalries
from torch import nn

from prune_dn.data.batches import read_batches
from prune_dn.errors import PruningError
from prune_dn.models import MaxFeatureMap, densenet
from prune_dn.models.dense_net import ReadStream
from prune_dn.pruning.calibration import collect
from prune_dn.pruning.competition import competition
from prune_dn.pruning.statistics import Wins


def slow(x: torch.Tensor, units: list[tuple[int, ...]]) -> dict[int, tuple[float, float]]:
    """Per channel, wins and margin, summed over images; `units` are channels that compete."""
    found = {}
    pixels = x.shape[2] * x.shape[3]
    for unit in units:
        for channel in unit:
            wins = margin = 0.0
            for image in x.tolist():
                for y in range(x.shape[2]):
                    for z in range(x.shape[3]):
                        values = [image[c][y][z] for c in unit]
                        mine, least = image[channel][y][z], min(values)
                        tied = values.count(least)
                        wins += 1 if mine > least or len(unit) == 1 else 1 - 1 / tied
                        margin += mine - least
            found[channel] = (wins / pixels, margin / pixels)
    return found


def check(found: dict[str, torch.Tensor], expected: list[tuple[float, float]]) -> None:
    pairs = torch.tensor(expected, dtype=torch.double)
    torch.testing.assert_close(found["wins"].double(), pairs[:, 0])
    torch.testing.assert_close(found["margins"].double(), pairs[:, 1])


def maps(channels: int, seed: int) -> torch.Tensor:
    """With many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (2, channels, 2, 3), generator=generator).double()


@given(st.integers(1, 4), st.sampled_from(["2/1", "3/2"]), st.integers(0, 99))
def test_whole_units(units: int, kind: str, seed: int) -> None:
    siblings = int(kind[0])
    x = maps(units * siblings, seed)
    expected = slow(x, [tuple(range(u, units * siblings, units)) for u in range(units)])
    check(competition(MaxFeatureMap(kind), x), [expected[c] for c in range(units * siblings)])


def test_a_linear_layer_has_no_pixels() -> None:
    x = maps(6, 3)[:, :, 0, 0]
    expected = slow(x[:, :, None, None], [(c, c + 3) for c in range(3)])
    check(competition(MaxFeatureMap("2/1"), x), [expected[c] for c in range(6)])


@given(st.integers(1, 4), st.integers(0, 99), st.data())
def test_some_stand_alone(units: int, seed: int, data: st.DataObject) -> None:
    single = data.draw(alone(units, "2/1"))
    x = maps(2 * units - len(single), seed)
    second = iter(range(units, 2 * units))
    pairs = [(u,) if u in single else (u, next(second)) for u in range(units)]
    expected = slow(x, pairs)
    check(
        competition(MaxFeatureMap("2/1", units=units, alone=single), x),
        [expected[c] for c in range(x.shape[1])],
    )


@given(st.integers(2, 6), st.integers(0, 99), st.data())
def test_before_a_reader(width: int, seed: int, data: st.DataObject) -> None:
    leads, rivals = data.draw(rivalries(width))
    x = maps(width, seed)
    pairs = [tuple(dict.fromkeys(pair)) for pair in zip(leads, rivals, strict=True)]
    expected = slow(x, pairs)
    order = [*leads, *(b for a, b in zip(leads, rivals, strict=True) if a != b)]
    check(competition(ReadStream(leads, rivals), x), [expected[c] for c in order])


def test_what_lets_nothing_compete() -> None:
    for module in (ReadStream((0,)), nn.ReLU()):
        with pytest.raises(PruningError, match="lets nothing compete: it has no MFM"):
            competition(module, torch.zeros(1, 2, 1, 1))


def test_statistics_are_means_over_all_images() -> None:
    net = densenet([2], 4, bn_size=2, stem="cifar", num_classes=3,
                   mfm={"*2": "2/1"}, mfm_skipped={"classifier": "2/1"})  # fmt: skip
    randomise_(net, 1).eval()
    images = torch.randn(5, 3, 6, 6)
    names = ["features.denseblock1.denselayer2.mfm", "read"]
    found = collect(net, names, read_batches(images.split(2)), Wins)
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: inputs.update({name: args[0]})
        )
    net(images)
    for name in names:
        expected = competition(net.get_submodule(name), inputs[name].detach())
        torch.testing.assert_close(found[name].wins, expected["wins"] / 5, check_dtype=False)
        torch.testing.assert_close(found[name].margins, expected["margins"] / 5, check_dtype=False)
    pairs = found["read"].wins.reshape(2, -1)
    torch.testing.assert_close(pairs.sum(0), torch.ones(7).double())  # of 14 channels
