"""Forecast: how many releases a budget still pays for, and which noise pays for more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.privacy.accounting import total, weigh
from sentinel.privacy.events import DpSgdEvent, GaussianEvent
from sentinel.terms import SMALLEST_NOISE_MULTIPLIER, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sentinel.privacy.accounting import Promise, Spent
    from sentinel.privacy.events import PromisedEvent, UnboundedEvent

    Account = Callable[[Mapping[PromisedEvent | UnboundedEvent, int], Promise], Spent]

MANY_RELEASES = 1_000_000  # a forecast ends here
LARGEST_NOISE_MULTIPLIER = 1e6  # as in policies
_DIGITS = 3  # of a noise multiplier, rounded up
_EXACT_STEPS = 5000  # beyond it the tight accountant takes more than two seconds to count them


@dataclass(frozen=True, slots=True)
class Steps:
    """How many steps of private training a budget pays for.

    Attributes:
        count: how many.
        at_least: whether it may pay for more.
        spent: what so many cost; where there are none, what the first one would.
    """

    count: int
    at_least: bool
    spent: Spent


def next_event(
    promise: Promise,
    noise_multiplier: float,
    charged: Sequence[PromisedEvent | UnboundedEvent],
    steps: int | None = None,
    sampling_rate: float | None = None,
) -> PromisedEvent:
    """What one more release costs.

    Args:
        promise: the unit and adjacency.
        noise_multiplier: the policy's.
        charged: the events so far, oldest first; what is not said is taken from the last of its
            kind, the slack of the noise too.
        steps: private training steps of a release; for patient and record.
        sampling_rate: probability of being drawn into a step, Poisson; 1 for all.

    Returns:
        A gaussian event for a site, else a dp-sgd event.

    Raises:
        MisuseError: steps or rate for a site, a rate outside 0 to 1, or neither said nor charged.
    """
    if promise.unit is Unit.SITE:
        if (steps, sampling_rate) != (None, None):
            raise MisuseError(
                "A promise per site has one noisy release a round, without steps or sampling: "
                "leave out --steps and --sampling-rate."
            )
        return _of_site(promise, noise_multiplier, charged)
    kin = [e for e in charged if isinstance(e, DpSgdEvent) and e.unit is promise.unit]
    last = kin[-1] if kin else None
    steps = steps if steps is not None or last is None else last.steps
    rate = sampling_rate if sampling_rate is not None or last is None else last.sampling_rate
    if steps is None or rate is None:
        said = {"--steps": steps, "--sampling-rate": rate}
        missing = " and ".join(option for option, value in said.items() if value is None)
        raise MisuseError(
            f"No private training per {promise.unit} was charged yet, from which steps and "
            f"sampling rate could be taken: name {missing}. (A policy with privacy.batch says the "
            "rate.)"
        )
    if not 0 < rate <= 1 or steps < 1:
        raise MisuseError("The sampling rate is a number above 0, up to 1; steps are 1 or more.")
    grown = 0.0 if last is None else steps / last.steps
    return DpSgdEvent(
        unit=promise.unit,
        adjacency=promise.adjacency,
        noise_multiplier=noise_multiplier,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=0.0 if last is None else grown * last.log_ratio,
        mass=0.0 if last is None else min(1.0, grown * last.mass),
    )


def _of_site(
    promise: Promise,
    noise_multiplier: float,
    charged: Sequence[PromisedEvent | UnboundedEvent],
) -> GaussianEvent:
    kin = [event for event in charged if isinstance(event, GaussianEvent)]
    return GaussianEvent(
        unit=promise.unit,
        adjacency=promise.adjacency,
        noise_multiplier=noise_multiplier,
        log_ratio=kin[-1].log_ratio if kin else None,
        mass=kin[-1].mass if kin else None,
    )


def releases_left(
    counted: Mapping[PromisedEvent | UnboundedEvent, int],
    event: PromisedEvent,
    promise: Promise,
) -> int:
    """How often `event` can still be charged.

    Args:
        counted: what was charged so far, each event with its count.
        event: what each further release costs.
        promise: the budget.

    Returns:
        A count, at most `MANY_RELEASES`.

    Guarantees:
        The ledger allows that many charges and, below `MANY_RELEASES`, not one more: both ask
        `weigh`.
    """

    def fits(count: int, account: Account) -> bool:
        after = {**counted, event: counted.get(event, 0) + count}
        return account(after, promise).epsilon <= promise.epsilon

    quick = _largest(lambda count: fits(count, total), 0)
    return _largest(lambda count: fits(count, weigh), quick)


def steps_paid(promise: Promise, noise_multiplier: float, sampling_rate: float) -> Steps:
    """How many steps of private training a budget pays for from which nothing was spent yet.

    Args:
        promise: the budget, per patient or record.
        noise_multiplier: the policy's.
        sampling_rate: probability of being drawn into a step, Poisson; 1 for all.

    Returns:
        The count, and what it costs.

    Guarantees:
        The slack of the noise counts as none: it is a matter of the model's size, and too small to
        be seen in a number of steps.

    Edges:
        the first step costs more than there is: 0
        up to 5000 by the quick accountant:      as many as the ledger charges, not one more
        more:                                    at least so many; the tight one would take long
    """
    step = next_event(promise, noise_multiplier, [], steps=1, sampling_rate=sampling_rate)
    quick = _largest(lambda count: total({step: count}, promise).epsilon <= promise.epsilon, 0)
    if quick > _EXACT_STEPS:
        return Steps(quick, at_least=True, spent=total({step: quick}, promise))
    count = releases_left({}, step, promise)
    return Steps(count, at_least=False, spent=weigh({step: max(count, 1)}, promise))


def noise_multiplier_for(
    counted: Mapping[PromisedEvent | UnboundedEvent, int],
    event: PromisedEvent,
    promise: Promise,
    releases: int,
) -> float | None:
    """The smallest noise multiplier with which the budget pays for so many more releases.

    Args:
        counted: what was charged so far.
        event: what each further release costs, but for its noise multiplier.
        promise: the budget.
        releases: how many more, at least 1.

    Returns:
        A noise multiplier, rounded up to three digits; None where no noise is enough, because the
        budget is spent.

    Guarantees:
        Found by bisection with the accountant that allows charges (`weigh`). The slack of the event
        is taken as it is: it is a matter of the number of coordinates, hardly of the noise.
    """

    def fits(noise_multiplier: float, account: Account) -> bool:
        planned = event.model_copy(update={"noise_multiplier": noise_multiplier})
        after = {**counted, planned: counted.get(planned, 0) + releases}
        return account(after, promise).epsilon <= promise.epsilon

    enough = SMALLEST_NOISE_MULTIPLIER
    while not fits(enough, total):
        enough *= 2
        if enough > LARGEST_NOISE_MULTIPLIER:
            return None
    quick = _smallest(lambda z: fits(z, total), SMALLEST_NOISE_MULTIPLIER, enough)
    low = quick
    while low > SMALLEST_NOISE_MULTIPLIER and fits(low, weigh):
        low = max(low / 1.2, SMALLEST_NOISE_MULTIPLIER)
    return _rounded_up(_smallest(lambda z: fits(z, weigh), low, quick))


def _largest(holds: Callable[[int], bool], known: int) -> int:
    """The largest count from `known` on for which `holds`, which is lost once and for all."""
    low, stride = known, max(1, known // 8)
    while low < MANY_RELEASES and holds(min(low + stride, MANY_RELEASES)):
        low, stride = min(low + stride, MANY_RELEASES), 2 * stride
    beyond = min(low + stride, MANY_RELEASES + 1)
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if holds(middle) else (low, middle)
    return low


def _smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """A value for which `holds` between `low` and `high`, within one part in 1000 of the least."""
    if holds(low):
        return low
    while high / low > 1 + 10**-_DIGITS:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded_up(value: float) -> float:
    digits = _DIGITS - 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    return round(math.ceil(value * scale * (1 - 1e-12)) / scale, max(digits, 0))
