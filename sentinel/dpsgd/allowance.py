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

_MOST_COUNTED = 5000  # steps; to count those left of more would take long
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
        if not self._pays(steps):
            self._ask(steps)

    def require_epoch(self, taken: int, batches: int) -> None:
        """Refuse where the budget does not pay for `batches` steps more than the round has `taken`.

        Raises:
            Withheld: BUDGET_EXHAUSTED; it says how many of these steps would still fit.
        """
        steps = taken + batches
        if not self._pays(steps):
            fit = f"; {self._fitting(taken, steps):,} still fit" if steps <= _MOST_COUNTED else ""
            plural = "" if batches == 1 else "s"
            epoch = f"{batches:,} private step{plural} after {taken:,} in this round"
            self._ask(steps, f"One more epoch ({epoch}{fit})")

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

    def _pays(self, steps: int) -> bool:
        """Whether the budget pays for a round of `steps`, by an earlier answer where it can."""
        if steps <= self._paid:
            return True
        if self._refused is None or steps * _AHEAD < self._refused:
            if self._affordable(steps * _AHEAD):
                self._paid = steps * _AHEAD
                return True
            self._refused = steps * _AHEAD
        if not self._affordable(steps):
            return False
        self._paid = steps
        return True

    def _fitting(self, taken: int, refused: int) -> int:
        """How many more steps than `taken` the budget pays for, where not for `refused` in all."""
        low, beyond = taken, refused
        while beyond - low > 1:
            middle = (low + beyond) // 2
            low, beyond = (middle, beyond) if self._affordable(middle) else (low, middle)
        return low - taken

    def _affordable(self, steps: int) -> bool:
        try:
            self._ask(steps)
        except Withheld as error:
            if error.reason is not Reason.BUDGET_EXHAUSTED:
                raise
            return False
        return True

    def _ask(self, steps: int, what: str | None = None) -> None:
        promise = promise_of(self._house.rules)
        assert promise is not None  # noqa: S101 - a plan comes from a promise
        rules, event = self._house.rules, self.event(steps)
        self._house.ledger.require_budget(rules.dataset, event, promise, what)
