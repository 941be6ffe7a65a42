"""Intervals of accuracies and of their losses, beside scipy's and formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from prune_dn.base.intervals import fell, paired_drop, percent, wilson


@pytest.mark.parametrize("n", [1, 2, 50, 360, 10_000])
def test_wilson_is_scipys(n: int) -> None:
    for right in sorted({0, 1, n // 3, n - 1, n}):
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert all(0 <= bound <= 1 for bound in wilson(right / n, n))


def test_an_accuracy_stands_with_its_interval() -> None:
    assert percent(351 / 360, 360) == "97.50 % (95.3 to 98.7)"


def test_what_fell_is_said_and_how_sure_it_is() -> None:
    assert fell("fine-tuning", 0.9, 0.9, 100) is None
    assert fell("fine-tuning", 0.9, 0.95, 100) is None
    little = fell("fine-tuning", 0.9, 0.89, 100)
    assert little is not None and "within the 95 % interval" in little
    assert "90.00 % (82.6 to 94.5) before, 89.00 % (81.4 to 93.7) after, on 100 test" in little
    much = fell("fine-tuning", 0.9, 0.5, 100)
    assert much is not None and "within" not in much and "worse" in much


@pytest.mark.parametrize(
    ("both", "lost", "won", "neither"), [(40, 9, 2, 9), (1, 0, 0, 0), (900, 30, 12, 58)]
)
def test_a_paired_drop_of_right_and_wrong(both: int, lost: int, won: int, neither: int) -> None:
    """The formula of Agresti and Min, from the four cells with half an image more in each."""
    before = [1] * both + [1] * lost + [0] * won + [0] * neither
    after = [1] * both + [0] * lost + [1] * won + [0] * neither
    n, b, c = len(before) + 2, lost + 0.5, won + 0.5
    middle, spread = (b - c) / n, 1.959964 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    assert paired_drop(before, after) == pytest.approx((middle - spread, middle + spread), rel=1e-6)


def test_a_paired_drop_of_numbers_is_scipys() -> None:
    generator = np.random.default_rng(0)
    before = generator.random(200)
    after = before - 0.1 + 0.05 * generator.standard_normal(200)
    lost = before - after
    spread = lost.std() / 200**0.5
    expected = norm.interval(0.95, loc=lost.mean(), scale=spread)
    assert paired_drop(before.tolist(), after.tolist()) == pytest.approx(expected, rel=1e-9)
