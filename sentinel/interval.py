"""How sure a share or a mean is: score intervals for one proportion, for two, and Student's.

Everything a stress test claims is a count out of a count. Both intervals here stay honest where
counts are small or zero, which is where a defence wants to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

from scipy.special import stdtrit

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Count:
    """`hits` out of `trials`.

    Raises:
        MisuseError: no trials, or hits outside 0 to trials.
    """

    hits: int
    trials: int

    def __post_init__(self) -> None:
        """Refuse a share of nothing."""
        if self.trials < 1 or not 0 <= self.hits <= self.trials:
            msg = "a count needs at least one trial, and hits from 0 to trials"
            raise MisuseError(msg)

    @property
    def share(self) -> float:
        """Hits by trials."""
        return self.hits / self.trials


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends of a two-sided confidence interval."""

    low: float
    high: float


def wilson(count: Count, *, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval for one share.

    Args:
        count: what was seen; the trials are taken as independent.
        confidence: of the two-sided interval, between 0 and 1.

    Returns:
        Ends within 0 to 1; exactly 0 at the low end without hits, and exactly 1 at the
        high end without misses.

    Reference: Wilson, JASA 22 (1927) 209-212.
    """
    z = _quantile(confidence)
    n, share = count.trials, count.share
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    low = (middle - half) / shrink if count.hits > 0 else 0.0
    high = (middle + half) / shrink if count.hits < n else 1.0
    return Interval(low, high)


def difference(first: Count, second: Count, *, confidence: float = 0.95) -> Interval:
    """Return Newcombe's hybrid score interval for `first.share - second.share`.

    Args:
        first: one sample.
        second: another, independent of it.
        confidence: of the two-sided interval, between 0 and 1.

    Returns:
        Ends within -1 to 1, around the observed difference.

    Reference: Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.
    """
    observed = first.share - second.share
    one, other = wilson(first, confidence=confidence), wilson(second, confidence=confidence)
    below = math.hypot(first.share - one.low, other.high - second.share)
    above = math.hypot(one.high - first.share, second.share - other.low)
    return Interval(max(-1.0, observed - below), min(1.0, observed + above))


def of_mean(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of independent values.

    Args:
        values: two or more.
        confidence: of the two-sided interval, between 0 and 1.
    """
    middle, spread = fmean(values), stdev(values) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * spread
    return Interval(middle - reach, middle + reach)


def _quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        msg = f"confidence must lie between 0 and 1, got {confidence}"
        raise MisuseError(msg)
    return NormalDist().inv_cdf(0.5 + confidence / 2)
