"""Slack: what is lost because the noise that was drawn is not ideal noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.terms import Slack

_TRIES = 60
_BACK_OFF = 1e-9  # share of delta given up to end the search


def loosen(epsilon_at: Callable[[float], float], delta: float, slack: Slack) -> float:
    """Epsilon at `delta` with the noise that was drawn.

    Args:
        epsilon_at: epsilon with ideal noise at a delta; falls as delta grows.
        delta: the delta that was promised, and is kept.
        slack: of everything composed: log ratios and masses each summed over all events.

    Returns:
        Epsilon; infinite where the slack leaves nothing of delta.

    Guarantees:
        Write L for `log_ratio` and m for `mass`. With q the law of all noise that is drawn in the
        events together and p that of ideal noise: q <= e^L p everywhere, p <= e^L q outside a set
        of cut-off values on which q is 0, and p gives that set at most m (over several releases:
        ratios multiply along each course of events, and the masses add by the union bound, since
        each is at most m_i whatever came before). Coins of Poisson sampling count as part of the
        course and are the same in both. Let M(D) be the ideal output on data D and N(D) the real
        one. Outputs are functions of data and noise, so for neighbours D, D' and any set S:

            N(D)(S)  <= e^L M(D)(S)                        the drawn noise is nowhere much likelier
                     <= e^L (e^eps M(D')(S) + delta')      the ideal promise (eps, delta')
            M(D')(S) <= e^L N(D')(S) + m                   S without the cut-off values, then those

        Together N(D)(S) <= e^(eps + 2L) N(D')(S) + e^L delta' + e^(eps + L) m. So the real noise
        keeps (eps + 2L, delta) for each delta' with e^L delta' + e^(eps(delta') + L) m <= delta,
        and the largest such delta' that is found is used: its eps is the smallest.

    Edges:
        no slack:                    epsilon_at(delta), bit for bit
        any slack:                   never below epsilon_at(delta)
        e^L m >= delta:              infinity
        epsilon_at is infinite:      infinity
        e^(eps + L) m eats up delta: infinity
    """
    if slack.log_ratio == 0 and slack.mass == 0:
        return epsilon_at(delta)
    allowed = delta * math.exp(-slack.log_ratio)
    share = allowed
    for _ in range(_TRIES):
        epsilon = epsilon_at(share)
        cut_off = _times_exp(slack.mass, epsilon)
        if share + cut_off <= allowed:
            return epsilon + 2 * slack.log_ratio
        share = (allowed - cut_off) * (1 - _BACK_OFF)
        if share <= 0:
            break
    return math.inf


def _times_exp(mass: float, epsilon: float) -> float:
    """Mass x e^epsilon, without overflow."""
    if mass == 0:
        return 0.0
    exponent = math.log(mass) + epsilon
    return math.exp(exponent) if exponent < 0 else math.inf
