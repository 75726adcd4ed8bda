"""One run: what right guesses at many coins say about epsilon, from a single training.

Each of m canaries is in the training data or not, by a fair coin of its own. Whoever sees the
output guesses some of the coins. Under a promise only so many guesses can be right; more of them
refute the promise. Everything here is a function of scores and coins; nothing is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LARGEST_EPSILON = 64.0  # e^64 times as likely: no count of guesses that fits a computer says more
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Guesses:
    """How an attacker did.

    Attributes:
        canaries: m, coins that were tossed, those without a guess included.
        made: r, coins that were guessed; fixed before anything was seen.
        right: v, guesses that were right.

    Raises:
        MisuseError: not 0 <= right <= made <= canaries, or no guess.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        if not (0 <= self.right <= self.made <= self.canaries and self.made > 0):
            raise MisuseError(
                "Guesses need at least one guess, no more right ones than were made, and no more "
                "made than there are canaries."
            )


def guess(scores: Tensor, made: int) -> Tensor:
    """Guess "in" for the highest scores, "out" for the lowest, and nothing between.

    Args:
        scores: (m,), larger where a canary looks more like having been trained on.
        made: guesses in all, even; half of them "in".

    Returns:
        (m,) int8: 1 in, -1 out, 0 no guess. Of equal scores the canary that comes first counts as
        the lower one, which says nothing about its coin.

    Raises:
        MisuseError: an odd number, none, more than there are canaries, or a score that is NaN.

    Guarantees:
        As many guesses as were asked for, whatever the scores are: their number says nothing.

    Edges:
        equal scores:                                told apart by their place, which says nothing
                                                     about a coin
        a score of NaN:                              MisuseError
        scores of Inf:                               the highest, or the lowest
        an odd number of guesses, none, or too many: MisuseError
    """
    if made < 2 or made % 2 or made > len(scores):  # noqa: PLR2004 - one of each kind
        raise MisuseError("made must be an even number, from 2 to the number of canaries.")
    if bool(scores.isnan().any()):
        raise MisuseError("A score is NaN; score every canary with a number.")
    order = torch.argsort(scores, stable=True)
    guessed = torch.zeros(len(scores), dtype=torch.int8)
    guessed[order[: made // 2]] = -1
    guessed[order[-(made // 2) :]] = 1
    return guessed


def count(guessed: Tensor, coins: Tensor) -> Guesses:
    """Compare guesses, (m,) of 1, -1 and 0, with the coins, (m,) bool.

    Guarantees:
        Canaries without a guess count among the canaries and in nothing else.

    Edges:
        no guess at all: MisuseError: there is nothing to count
    """
    truth = torch.where(coins, 1, -1)
    return Guesses(len(coins), int((guessed != 0).sum()), int((guessed == truth).sum()))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, were the training (epsilon, delta)-private.

    Args:
        guesses: what came of the attack.
        epsilon: of the promise that is tested, 0 or more.
        delta: of the promise that is tested, 0 to 1.

    Returns:
        min(1, beta + 2 m delta alpha), where with X ~ Binomial(r, e^epsilon / (1 + e^epsilon)):
        beta = P[X >= v], and alpha = max over i = 1 .. v of P[v - i <= X < v] / i.

    Guarantees:
        For a training whose output is (epsilon, delta)-indistinguishable under the change of one
        coin, P[p_value <= p] <= p for every p, whatever the attacker does, as long as coins are
        fair and independent and r is chosen before the coins are looked at.

    Edges:
        no right guess:          1
        delta = 0:               the binomial tail alone
        all right, delta = 0:    (e^epsilon / (1 + e^epsilon))^r
        2 m delta alpha above 1: 1

    Reference: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", 2023, arXiv
        2305.08846, theorem 5.2 and corollary 5.4.
    """
    made, right = guesses.made, guesses.right
    if right == 0:
        return 1.0
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, made, chance))
    if delta == 0.0:
        return min(1.0, beta)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), made, chance))
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * guesses.canaries * delta * alpha)


def lower_bound(
    guesses: Sequence[Guesses], delta: float = 0.0, *, confidence: float = 0.95
) -> float:
    """The epsilon that the training has at least, at `delta`.

    Args:
        guesses: one or more attacks on the same output, their numbers of guesses all fixed
            beforehand. With n of them each is held to (1 - confidence) / n.
        delta: at which epsilon is asked for.
        confidence: probability with which the bound is right, between 0 and 1.

    Returns:
        The largest epsilon for which every smaller one is refuted, rounded down; 0 where none is.

    Guarantees:
        If the training is (epsilon, delta)-private, the bound exceeds epsilon with probability at
        most 1 - confidence: the union bound pays for looking at several numbers of guesses.

    Edges:
        as many right as wrong, or fewer:         0
        all r right, delta = 0, one attack:       ln(x / (1 - x)), x = (1 - confidence)^(1 / r)
        more attacks:                             never above the best of them alone
        no attack:                                MisuseError
        confidence or delta out of range, or NaN: MisuseError

    Raises:
        MisuseError: no attack, or a confidence or delta out of range.
    """
    if not guesses or not 0.0 < confidence < 1.0 or not 0.0 <= delta <= 1.0:
        raise MisuseError(
            "lower_bound needs at least one attack, a confidence between 0 and 1, and a delta from "
            "0 to 1."
        )
    level = (1.0 - confidence) / len(guesses)
    return max(_refuted(attack, delta, level) for attack in guesses)


def _refuted(guesses: Guesses, delta: float, level: float) -> float:
    """The lower end of a bisection for p_value = level; p_value rises with epsilon up to there."""
    low, high = 0.0, _LARGEST_EPSILON
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if p_value(guesses, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low
