"""Conformal: thresholds with a stated false-alarm rate, and how to notice that they have aged.

Everything here rests on one assumption, *exchangeability*: that the scores of the rounds looked at
and of the rounds to come might as well have come in any other order. No distribution is assumed,
and nothing about the detector. An alarm is a score *above* the threshold.

- **Threshold** (split-conformal). With n scores and level alpha it is the k-th smallest,
  k = ceil((n + 1)(1 - alpha)). The rank of a new score among all n + 1 is uniform where there are
  no ties, so P(new score > threshold) <= (n + 1 - k) / (n + 1) <= alpha; ties only lower it. The
  probability is over the n rounds *and* the new one. Where k > n, no threshold exists.
- **Given these n rounds**, and if rounds are independent draws of one distribution, the rate of
  alarms is at most the `confidence` quantile of Beta(n + 1 - k, k), with that confidence; where
  scores tie, the rate is smaller still (Clopper and Pearson's bound of n - k alarms in n).
- **Smoothed p-values, on-line.** Of the t-th score among the first t, itself included:
  p_t = (number above it + U_t x number equal to it) / t, with U_t uniform on (0, 1). Under
  exchangeability p_1, p_2, ... are independent and uniform (Vovk, Nouretdinov, Gammerman, ICML
  2003). Each new round is compared with *all* rounds before it, new ones too: p-values against the
  n calibration rounds alone share those n, are not independent, and a product of bets on them is no
  martingale.
- **Martingale.** A bet f >= 0 with mean 1 over (0, 1) turns capital K into K f(p). Here the capital
  is spread over no bet, bets that small p come (higher scores), f(p) = b (1 - p)^(b - 1), and bets
  that large p come, f(1 - p). Before each p-value a share `SHIFT` of all capital is spread evenly
  anew, which keeps the total, so that a change late in the day is still met with capital. Total
  M_0 = 1; given the p-values so far, the mean of M_t is M_{t-1}. Ville: P(M ever reaches c) <=
  1 / c, however often one looks and whenever one stops. No bet wins more than b in one round:
  scores tie often, and a lucky coin, or one odd round (which is the threshold's business), must not
  look like drift.

  U_t is a midpoint of one of 2^52 cells, not quite uniform: the bets are convex, so the mean over
  midpoints is at most the integral, and M is at worst a supermartingale, for which Ville holds too
  (all up to the rounding of float64).

References: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005), chapters 2, 7;
Vovk et al., Retrain or not retrain (COPA 2021), for capital that shifts between bets.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import betaincinv

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

CONFIDENCE = 0.95
SHIFT = 0.01  # of the capital, before each round
BOLDNESS = (2, 4, 10)  # b of the bets: the most that one round can multiply their capital by
WARNING, ALARM = 20.0, 100.0  # reached, ever, with probability at most 1/20 and 1/100
Way = Literal["higher", "lower"]
_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The threshold of n rounds at level alpha.

    Attributes:
        score: an alarm is a score above it.
        rank: k; the threshold is the k-th smallest score.
        rounds: n.
        expected: the most that the alarm rate can be on average: (n + 1 - k) / (n + 1) <= alpha.
        confident: the most that it is with 95 % confidence, given these n rounds, if rounds are
            independent.
    """

    score: float
    rank: int
    rounds: int
    expected: float
    confident: float


@dataclass(frozen=True, slots=True)
class Rate:
    """How often a threshold that was fixed without looking at these rounds alarms in them.

    Attributes:
        alarms: of `rounds`.
        expected: the most that the next round's alarm has as probability: (alarms + 1) / (n + 1).
        confident: the most that the rate is with 95 % confidence, if rounds are independent.
    """

    alarms: int
    rounds: int
    expected: float
    confident: float


@dataclass(frozen=True, slots=True)
class Path:
    """What betting against exchangeability has come to.

    Attributes:
        rounds: how many p-values were bet on.
        log_value: natural logarithm of the capital now; 0 before the first round.
        log_highest: of the most that it ever was.
        way: whether the scores that made the highest were higher or lower than those before.
    """

    rounds: int
    log_value: float
    log_highest: float
    way: Way

    def reached(self, capital: float) -> bool:
        """Whether the capital was ever at or above `capital`."""
        return self.log_highest >= math.log(capital)


def level(alpha: float) -> Fraction:
    """Alpha as the decimal number that was written, so that no rank is off by a rounding.

    Raises:
        MisuseError: not between 0 and 1.
    """
    if not 0.0 < alpha < 1.0:
        msg = f"alpha must lie between 0 and 1, as 0.01 for 1 in 100; got {alpha}"
        raise MisuseError(msg)
    return Fraction(repr(float(alpha)))


def rounds_needed(alpha: float) -> int:
    """The least n for which a threshold at level alpha exists: n >= 1 / alpha - 1."""
    return math.ceil(1 / level(alpha)) - 1


def threshold(scores: Sequence[float], alpha: float) -> Threshold:
    """The split-conformal threshold.

    Args:
        scores: of the calibration rounds, in any order.
        alpha: the most that the alarm rate may be, between 0 and 1.

    Raises:
        MisuseError: fewer scores than `rounds_needed(alpha)`, or one that is not finite.

    Guarantees:
        Under exchangeability a new round's score lies above it with probability at most alpha.

    Edges:
        ties, or scores that are all alike: the rate is smaller than alpha, maybe 0
        n + 1 an exact multiple of 1/alpha: that multiple counts; alpha is read as a decimal
    """
    ordered = sorted(_finite(scores))
    n = len(ordered)
    allowed = math.floor((n + 1) * level(alpha))  # n + 1 - k
    if allowed < 1:
        msg = (
            f"at alpha {alpha:g} a threshold takes {rounds_needed(alpha)} rounds; there are {n}. "
            "Wait for more, or ask for a larger alpha"
        )
        raise MisuseError(msg)
    rank = n + 1 - allowed
    return Threshold(
        score=ordered[rank - 1],
        rank=rank,
        rounds=n,
        expected=allowed / (n + 1),
        confident=_upper(n - rank, n),
    )


def rate_at(scores: Sequence[float], least: float) -> Rate:
    """How often scores are at or above `least`, a threshold that these scores had no part in.

    Edges:
        no scores: nothing is known, so both rates are 1
    """
    n = len(_finite(scores))
    alarms = sum(score >= least for score in scores)
    return Rate(alarms, n, (alarms + 1) / (n + 1), _upper(alarms, n))


def p_value(score: float, scores: Sequence[float]) -> float:
    """Conservative p-value of one new round: (1 + number at or above it) / (n + 1).

    Guarantees:
        Under exchangeability it is at most t with probability at most t, for every t; ties
        included, and without a coin. Those of several rounds are not independent.
    """
    return (1 + sum(other >= score for other in _finite(scores))) / (len(scores) + 1)


def coins(seed: bytes) -> Callable[[int], float]:
    """Numbers strictly between 0 and 1 that break ties, the same for the same seed and place.

    The seed must be drawn without looking at the scores. Asked again later, the same rounds get the
    same coins, so that nobody can toss until the answer suits.
    """

    def coin(place: int) -> float:
        digest = hashlib.sha256(seed + place.to_bytes(8, "big")).digest()
        return ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52

    return coin


def smoothed_p_values(
    before: Sequence[float], new: Sequence[float], coin: Callable[[int], float]
) -> list[float]:
    """Smoothed on-line p-values of new rounds, each among all rounds before it and itself.

    Args:
        before: scores of the rounds that are not to be judged; may be empty.
        new: scores in the order in which the rounds came.
        coin: place of a round among all (from 0) -> a number between 0 and 1.

    Returns:
        One for each new score, above 0 and below 1; small where a score is high.
    """
    seen = sorted(_finite(before))
    found = []
    for score in _finite(new):
        place = len(seen)
        insort(seen, score)
        above = len(seen) - bisect_right(seen, score)
        equal = len(seen) - above - bisect_left(seen, score)
        found.append(min((above + coin(place) * equal) / len(seen), _BELOW_ONE))
    return found


def bet(p_values: Sequence[float]) -> list[Path]:
    """Bet against p-values being independent and uniform; where the capital stood after each.

    Args:
        p_values: in order, each above 0 and below 1.

    Returns:
        The path after 0, 1, 2, ... p-values: one more than there are p-values.

    Raises:
        MisuseError: a p-value outside (0, 1).

    Guarantees:
        Under exchangeability the capital ever reaches c with probability at most 1 / c.
    """
    if not all(0.0 < p < 1.0 for p in p_values):
        msg = "p-values must lie between 0 and 1, as smoothed_p_values gives them"
        raise MisuseError(msg)
    count = 2 * len(BOLDNESS) + 1
    logs = np.full(count, -math.log(count))  # capital of each bet: none, on small p, on large p
    path = [Path(0, 0.0, 0.0, "higher")]
    for rounds, p in enumerate(p_values, 1):
        total = float(np.logaddexp.reduce(logs))
        kept, spread = math.log1p(-SHIFT), math.log(SHIFT / count) + total
        logs = np.logaddexp(logs + kept, spread) + _log_bets(p)
        value = float(np.logaddexp.reduce(logs))
        last = path[-1]
        if value > last.log_highest:
            path.append(Path(rounds, value, value, _way(logs)))
        else:
            path.append(Path(rounds, value, last.log_highest, last.way))
    return path


def _log_bets(p: float) -> NDArray[np.float64]:
    bold = np.array(BOLDNESS)
    high = np.log(bold) + (bold - 1) * math.log1p(-p)
    low = np.log(bold) + (bold - 1) * math.log(p)
    return np.concatenate(([0.0], high, low))


def _way(logs: NDArray[np.float64]) -> Way:
    higher, lower = logs[1 : 1 + len(BOLDNESS)], logs[1 + len(BOLDNESS) :]
    return "higher" if np.logaddexp.reduce(higher) >= np.logaddexp.reduce(lower) else "lower"


def _upper(alarms: int, rounds: int) -> float:
    """Clopper and Pearson's one-sided upper bound at `CONFIDENCE`."""
    if alarms >= rounds:
        return 1.0
    return float(betaincinv(alarms + 1, rounds - alarms, CONFIDENCE))


def _finite(scores: Sequence[float]) -> Sequence[float]:
    if not all(map(math.isfinite, scores)):
        msg = "scores must be finite numbers"
        raise MisuseError(msg)
    return scores
