"""Intervals of accuracies, beside scipy's."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from prune_dn.base.intervals import fell, percent, wilson


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
