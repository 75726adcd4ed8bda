"""What the promise of a policy pays for, from a ledger without any charge; for `check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.cli.console import working

if TYPE_CHECKING:
    from sentinel.policy import Policy
    from sentinel.policy.checks import Affordable


def affordable(policy: Policy) -> Affordable | None:
    """Releases of a site, or steps of private training; None where nothing is told to count."""
    from sentinel.terms import Unit

    if policy.privacy is None:
        return None
    return _releases(policy) if policy.privacy.unit is Unit.SITE else _steps(policy)


def _releases(policy: Policy) -> Affordable | None:
    from sentinel.house import event_of, promise_of
    from sentinel.policy.checks import Affordable
    from sentinel.privacy import UnboundedEvent, weigh
    from sentinel.privacy.forecast import MANY_RELEASES, releases_left

    promise, event = promise_of(policy), event_of(policy)
    if promise is None or isinstance(event, UnboundedEvent):
        return None
    count = releases_left({}, event, promise)
    spent = weigh({event: max(count, 1)}, promise)
    return Affordable(count, count == MANY_RELEASES, spent.epsilon, spent.accountant)


def _steps(policy: Policy) -> Affordable | None:
    from sentinel.house import promise_of
    from sentinel.policy.checks import Affordable
    from sentinel.privacy.forecast import steps_paid

    promise, privacy = promise_of(policy), policy.privacy
    if promise is None or privacy is None or privacy.batch is None or privacy.cohort is None:
        return None
    with working("Counting the steps that the budget pays for"):
        rate = privacy.batch / privacy.cohort
        found = steps_paid(promise, privacy.noise_multiplier, rate)
    return Affordable(found.count, found.at_least, found.spent.epsilon, found.spent.accountant)
