"""Allowance: the steps that the ledger's budget still pays for, and what those taken cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.errors import MisuseError, Withheld
from sentinel.house import promise_of
from sentinel.mechanism import slack
from sentinel.privacy.events import DpSgdEvent
from sentinel.terms import Reason

if TYPE_CHECKING:
    from sentinel.dpsgd.plan import Plan
    from sentinel.house import House
    from sentinel.releases import RoundKey

_AHEAD = 2  # ask for this many times the steps at once: asking takes longer than a small step


class Allowance:
    """Asks the ledger, so that nobody trains for nothing; the charge itself is the release's."""

    def __init__(self, house: House, plan: Plan, coordinates: int) -> None:
        """Nothing is allowed yet."""
        self._house, self._plan = house, plan
        self._slack = slack(plan.draws(coordinates))
        self._paid = 0
        self._refused: int | None = None
        self._before = 0
        self._key: RoundKey | None = None
        self._event: DpSgdEvent | None = None

    def begin(self, key: RoundKey) -> None:
        """A round begins; others may have spent since."""
        self._paid, self._refused, self._event = 0, None, None
        self._key, self._before = key, self._house.ledger.head().seq

    def require(self, steps: int) -> None:
        """Refuse where the budget does not pay for a round of `steps` in all.

        Raises:
            Withheld: BUDGET_EXHAUSTED.
        """
        if steps <= self._paid:
            return
        if self._refused is None or steps * _AHEAD < self._refused:
            if self._affordable(steps * _AHEAD):
                self._paid = steps * _AHEAD
                return
            self._refused = steps * _AHEAD
        self._ask(steps)
        self._paid = steps

    def event(self, steps: int) -> DpSgdEvent:
        """What a round of `steps` costs."""
        plan = self._plan
        if steps < 1:
            raise MisuseError("a private round has at least one step")
        return DpSgdEvent(
            unit=plan.unit,
            adjacency=plan.adjacency,
            noise_multiplier=plan.noise_multiplier,
            sampling=plan.rate.sampling,
            sampling_rate=plan.rate.probability,
            steps=steps,
            log_ratio=steps * self._slack.log_ratio,
            mass=min(1.0, steps * self._slack.mass),
        )

    def concluded(self, steps: int) -> DpSgdEvent:
        """What the round costs, now that it has ended."""
        self._event = self.event(steps)
        return self._event

    def was_charged(self) -> bool:
        """Whether the ledger holds the charge for the round that was concluded."""
        if self._event is None or self._key is None:
            return False
        return any(
            row.seq > self._before and row.round == self._key.digest and row.event == self._event
            for row in self._house.ledger.rows(self._house.rules.dataset)
        )

    def _affordable(self, steps: int) -> bool:
        try:
            self._ask(steps)
        except Withheld as error:
            if error.reason is not Reason.BUDGET_EXHAUSTED:
                raise
            return False
        return True

    def _ask(self, steps: int) -> None:
        promise = promise_of(self._house.rules)
        assert promise is not None  # noqa: S101 - a plan comes from a promise
        self._house.ledger.require_budget(self._house.rules.dataset, self.event(steps), promise)
