"""Confidence intervals of an accuracy that was measured on n images, and of what it lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959963984540054  # of a normal distribution 95 % lie within so many standard deviations


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `n` trials (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    >>> [round(bound, 4) for bound in wilson(0.5, 100)]
    [0.4038, 0.5962]
    """
    middle, weight = share + _Z**2 / (2 * n), 1 + _Z**2 / n
    spread = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    return max((middle - spread) / weight, 0.0), min((middle + spread) / weight, 1.0)


def percent(share: float, n: int) -> str:
    """An accuracy in per cent with its 95 % interval.

    >>> percent(0.5, 100)
    '50.00 % (40.4 to 59.6)'
    """
    low, high = wilson(share, n)
    return f"{100 * share:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def fell(what: str, before: float, after: float, n: int) -> str | None:
    """What to say where an accuracy fell; None where it did not."""
    if after >= before:
        return None
    sure = after < wilson(before, n)[0]
    return (
        f"{what} made the test accuracy worse: {percent(before, n)} before, {percent(after, n)} "
        f"after, on {n:,} test images"
        + ("" if sure else "; the difference is within the 95 % interval")
        + ". Try a lower learning_rate, or keep the net as it was before"
    )


def paired_drop(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean loss between two nets' scores of the same images.

    Of scores that are 0 or 1 that of Agresti and Min (2005, doi:10.1002/sim.1781), which holds for few
    images too; of others that of a normal distribution of the mean.

    >>> [round(bound, 3) for bound in paired_drop([1] * 90 + [0] * 10, [1] * 85 + [0] * 15)]
    [0.003, 0.095]
    """
    lost = [b - a for b, a in zip(before, after, strict=True)]
    total, squares, n = sum(lost), sum(x * x for x in lost), float(len(lost))
    if {*before, *after} <= {0, 1}:  # half an image more in each of the four cells
        squares, n = squares + 1, n + 2
    mean = total / n
    spread = _Z * math.sqrt(max(squares / n - mean * mean, 0.0) / n)
    return mean - spread, mean + spread
