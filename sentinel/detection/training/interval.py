"""How sure a measured share is."""

from __future__ import annotations

import math

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the Wilson score interval at 95 % for `hits` of `trials`; (0, 1) for none.

    Reference: Wilson, JASA 1927.

    >>> low, high = wilson(0, 400)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.0095)
    """
    if trials == 0:
        return 0.0, 1.0
    share, square = hits / trials, Z95**2
    middle = share + square / (2 * trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    scale = 1 + square / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def said(hits: int, trials: int) -> str:
    """Return "hits of trials (low to high %)"."""
    low, high = wilson(hits, trials)
    return f"{hits} of {trials} ({100 * low:.1f} to {100 * high:.1f} %)"
