"""Accounting: what a list of events adds up to, through dp-accounting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.privacy.events import UnboundedEvent
from sentinel.privacy.loss import LOSS, loss_epsilon
from sentinel.privacy.mechanisms import compose, covers
from sentinel.privacy.renyi import RENYI, renyi_epsilon
from sentinel.privacy.slack import loosen
from sentinel.terms import Slack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sentinel.privacy.events import PromisedEvent
    from sentinel.privacy.mechanisms import Composition
    from sentinel.terms import Adjacency, Unit

EXACT = "exact Gaussian composition"
WHOLE = "exact Gaussian composition, sampling not counted"


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised for the life of a ledger: (epsilon, delta) for one unit and adjacency."""

    unit: Unit
    adjacency: Adjacency
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Spent:
    """A total, with everything that an epsilon needs beside it.

    Attributes:
        epsilon: total loss at `delta`, slack of the noise included; 0 where nothing was charged.
        accountant: which composition gave the figure.
        void: whether an event on the dataset lies outside the promise, so that no lifetime
            promise holds.
        slack: of the drawn noise, summed over all charges that know theirs.
        slack_unknown: how many charges do not know their slack; it was counted as none.
    """

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    accountant: str
    void: bool
    slack: Slack
    slack_unknown: int


def total(
    events: Mapping[PromisedEvent | UnboundedEvent, int],
    promise: Promise,
    *,
    tight: bool = False,
) -> Spent:
    """Compose events.

    Args:
        events: each event, and how often it was charged.
        promise: the unit, adjacency and delta under which the total is asked for.
        tight: also ask the accountant that takes seconds; the smallest epsilon is taken.

    Returns:
        The total. Events of a coarser unit count for a finer one (a site's noise hides its
        patients), never the other way: those make the total void.

    Guarantees:
        Each accountant gives an upper bound, so the smallest is one. The slack of the drawn noise
        is added by `loosen`.

    Edges:
        no event:                           epsilon 0, exact
        no Poisson sampling:                exact: one Gaussian mechanism (Dong, Roth, Su 2022), its
                                            epsilon by Balle and Wang 2018
        with Poisson sampling:              RDP, or exact composition of whole batches
        with Poisson sampling, `tight`:     the smallest of these and PLD
        noise multiplier below 0.05:        infinity; no accountant is asked
        shuffled epochs (sampling "none"):  as Gaussian mechanisms: no amplification
        a coarser unit under add-or-remove: as replaced; see `neighbours`
        a finer unit, or no promise:        void; the rest is still added up
        slack not known (version 1):        counted as none, and said in `slack_unknown`
        a delta of 0:                       infinity, where anything was charged
    """
    counted = _counted(events, promise)
    void = len(counted) < len(events)
    slack, unknown = _slack(counted)
    composition = compose(counted, promise.unit, promise.adjacency)
    epsilon, accountant = math.inf, ""
    for name, found in _epsilons(composition, promise.delta, slack, tight=tight):
        if found < epsilon or not accountant:
            epsilon, accountant = found, name
    return Spent(
        epsilon, promise.delta, promise.unit, promise.adjacency, accountant, void, slack, unknown
    )


def weigh(events: Mapping[PromisedEvent | UnboundedEvent, int], promise: Promise) -> Spent:
    """The total by which a charge is allowed: the quick one where it fits, else the tightest.

    Guarantees:
        An upper bound, as every total is, and never above the quick one: a charge is refused only
        where no accountant allows it.

    Edges:
        the quick total fits the promise: it is given; nothing slower is asked
        it does not fit:                  `total` with `tight`
        no event:                         epsilon 0
    """
    quick = total(events, promise)
    return quick if quick.epsilon <= promise.epsilon else total(events, promise, tight=True)


def by_accountant(
    events: Mapping[PromisedEvent | UnboundedEvent, int], promise: Promise
) -> dict[str, float]:
    """Epsilon by each accountant that can tell, by name; `total(tight=True)` is the smallest.

    Guarantees:
        Each figure is an upper bound by itself, slack included. What makes a total void is left out
        here as well.

    Edges:
        no event:                    0, by exact composition
        no Poisson sampling:         exact composition alone: the others could only be looser
        noise multiplier below 0.05: infinity
        a finer unit, or no promise: left out
    """
    counted = _counted(events, promise)
    composition = compose(counted, promise.unit, promise.adjacency)
    return dict(_epsilons(composition, promise.delta, _slack(counted)[0], tight=True))


def _counted(
    events: Mapping[PromisedEvent | UnboundedEvent, int], promise: Promise
) -> dict[PromisedEvent, int]:
    """The events that say something about the unit of the promise."""
    return {
        event: times
        for event, times in events.items()
        if not isinstance(event, UnboundedEvent) and covers(event, promise.unit)
    }


def _slack(events: Mapping[PromisedEvent, int]) -> tuple[Slack, int]:
    """The summed slack, and how many charges do not know theirs."""
    known = [(event.slack, times) for event, times in events.items()]
    log_ratio = math.fsum(times * slack.log_ratio for slack, times in known if slack)
    mass = math.fsum(times * slack.mass for slack, times in known if slack)
    return Slack(log_ratio, mass), sum(times for slack, times in known if slack is None)


def _epsilons(
    composition: Composition, delta: float, slack: Slack, *, tight: bool
) -> Iterator[tuple[str, float]]:
    """Name and epsilon of each accountant, the quickest first."""
    if composition.too_little_noise:
        yield (RENYI if composition.sampled else EXACT), math.inf
    elif not composition.sampled:
        yield EXACT, loosen(lambda share: _exact(composition.ratio, share), delta, slack)
    else:
        bound = loosen(lambda share: renyi_epsilon(composition, share), delta, slack)
        yield RENYI, bound
        ratio = composition.unsampled_ratio
        whole = loosen(lambda share: _exact(ratio, share), delta, slack)
        if whole < bound:  # as where little noise, or next to no sampling, defeats the others
            yield WHOLE, whole
        if tight:
            yield LOSS, loosen(lambda share: loss_epsilon(composition, share, bound), delta, slack)


def _exact(ratio: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism."""
    if ratio == math.inf:
        return 0.0
    import numpy as np  # noqa: PLC0415 - with the next, a second of imports
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415 - as above

    with np.errstate(divide="ignore"):  # dp-accounting takes the logarithm of 0 near epsilon 0
        return float(get_epsilon_gaussian(ratio, delta))
