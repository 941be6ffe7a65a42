"""Confidence intervals of an accuracy that was measured on n images."""

from __future__ import annotations

import math

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
