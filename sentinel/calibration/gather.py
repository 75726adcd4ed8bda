"""Gather: the scores of past rounds, each round once and in order.

Rules, which depend on no score, so that they pass over a new round as they pass over an old one:

- A round counts once, with its first score: what was asked again is no second round.
- Rounds that another bundle scored do not count: another detector, another scale.
- A model taken for unhealthy does not count: it is broken, and its own rule refuses it.
- An update withheld for its score has none in the log, and counts as 1: at or above what it was.
- Suspicion reads global models alone. Sensitivity reads one dataset, as the ledger names it; where
  it is under a promise, only updates that were scored *behind* that promise: what the score of a
  raw update would set is no post-processing.

The log holds scores in twentieths, rounded up. That is a function of the score alone, so rounds
stay exchangeable; a threshold at a twentieth alarms for the same scores as it would unrounded.

Stored releases are not scored again: a rule looks at the update before it is clipped and noised
(or, under a promise for the site, at the noised one, which is what the log has).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sentinel.audit import GuardStarted, RoundOpened, RoundRefused, UpdateDecided, UpdateWithheld
from sentinel.audit.records import SCORE_STEPS
from sentinel.detection import inspect_global_model, score_update
from sentinel.detection.bundle import GLOBAL_MODEL, UPDATE_SENSITIVITY
from sentinel.errors import MisuseError
from sentinel.policy import refuses
from sentinel.privacy import UnboundedEvent
from sentinel.terms import Reason, Sharpness, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from sentinel.audit import Entry, Record
    from sentinel.policy import Policy
    from sentinel.privacy import Ledger

_STARTED_WITH = (UPDATE_SENSITIVITY, GLOBAL_MODEL)  # the order in which a guard records its bundles


class Which(enum.StrEnum):
    """A score that rules can wait for; the value is its name in a policy."""

    SUSPICION = "suspicion"
    SENSITIVITY = "sensitivity"

    @property
    def bundle(self) -> str:
        """The name of the detector that gives it."""
        return GLOBAL_MODEL if self is Which.SUSPICION else UPDATE_SENSITIVITY


@dataclass(frozen=True, slots=True)
class Scored:
    """One round.

    Attributes:
        score: 0 to 1; in twentieths where it comes from the log.
        stopped: whether the round was refused, or its update withheld, for its score.
        blind: whether its update was scored blind.
    """

    score: float
    stopped: bool = False
    blind: bool = False


@dataclass(slots=True)
class Gathered:
    """The scores of some rounds.

    Attributes:
        rounds: in their order.
        other_bundle: rounds left out, since another bundle scored them.
        unhealthy: rounds left out, since their model was broken.
        raw: rounds left out, since their update was scored raw and a promise forbids to look there.
    """

    rounds: list[Scored] = field(default_factory=list)
    other_bundle: int = 0
    unhealthy: int = 0
    raw: int = 0

    @property
    def scores(self) -> list[float]:
        """One for each round."""
        return [one.score for one in self.rounds]

    @property
    def stopped(self) -> int:
        """How many of the rounds were stopped for their score."""
        return sum(one.stopped for one in self.rounds)

    @property
    def blind(self) -> int:
        """How many of the rounds were scored blind."""
        return sum(one.blind for one in self.rounds)

    def newest(self, count: int) -> Gathered:
        """The last `count` of the rounds; what was left out stays as it is."""
        return replace(self, rounds=self.rounds[-count:])


def is_promised(policy: Policy, ledger: Ledger) -> bool:
    """Whether the policy promises something, or anything on its dataset was released so before."""
    return policy.privacy is not None or any(
        not isinstance(event, UnboundedEvent) for event in ledger.counted(policy.dataset)
    )


def require_no_promise(policy: Policy, ledger: Ledger) -> None:
    """Refuse to score updates from a folder where their dataset is under a promise.

    Raises:
        MisuseError: and what may be read instead.
    """
    if is_promised(policy, ledger):
        raise MisuseError(
            f"The dataset {policy.dataset!r} is under a promise, so that no threshold may be "
            "fitted to its updates: it would be no post-processing. Leave --updates out: the "
            "scores of updates that left behind the promise are in the log. Global models are "
            "public: --globals may stay. For updates of data outside the promise, name a policy "
            "of that dataset with --policy."
        )


def from_log(  # noqa: PLR0913 - each names one thing that the log does not say
    entries: Iterable[Entry],
    ledger: Ledger,
    policy: Policy,
    which: Which,
    bundle: str,
    *,
    after: int = 0,
) -> Gathered:
    """The scores that the log holds of rounds first scored after the record `after`.

    Args:
        entries: the whole log, in order.
        ledger: says which dataset a round trained on, and whether it was promised something.
        policy: its dataset is meant.
        which: suspicion or sensitivity.
        bundle: digest of the detector whose scores count.
        after: number of a record.
    """
    reading = _Reading(which, bundle, ledger, policy)
    for entry in entries:
        reading.read(entry, count=entry.seq > after)
    return reading.found


class _Reading:
    """One pass over the log."""

    def __init__(self, which: Which, bundle: str, ledger: Ledger, policy: Policy) -> None:
        self.found = Gathered()
        self._which, self._bundle = which, bundle
        self._place = _STARTED_WITH.index(which.bundle)
        self._bundles: dict[str, str] = {}  # process -> digest of its bundle
        self._rounds: set[str] = set()
        rows = ledger.rows(policy.dataset)
        self._promised = {row.round: not isinstance(row.event, UnboundedEvent) for row in rows}
        self._only_promised = is_promised(policy, ledger)

    def read(self, entry: Entry, *, count: bool) -> None:
        record = entry.record
        if isinstance(record, GuardStarted):
            started = dict(enumerate(record.detectors))
            self._bundles[record.process] = started.get(self._place, "")
        elif self._which is Which.SUSPICION:
            if isinstance(record, RoundOpened | RoundRefused):
                self._suspicion(record, count=count)
        elif isinstance(record, UpdateDecided | UpdateWithheld):
            self._sensitivity(record, count=count)

    def _suspicion(self, record: RoundOpened | RoundRefused, *, count: bool) -> None:
        looked_at = not isinstance(record, RoundOpened) or record.inspected
        if record.suspicion is None or not looked_at or record.round in self._rounds:
            return
        self._rounds.add(record.round)
        if record.verdict is Verdict.UNHEALTHY:
            self.found.unhealthy += count
        elif self._scored_by_the_bundle(record, count=count) and count:
            stopped = isinstance(record, RoundRefused) and record.reason is Reason.CRAFTED_MODEL
            self.found.rounds.append(Scored(record.suspicion / SCORE_STEPS, stopped))

    def _sensitivity(self, record: UpdateDecided | UpdateWithheld, *, count: bool) -> None:
        if isinstance(record, UpdateDecided):
            blind = record.sharpness is Sharpness.BLIND
            scored = Scored(record.sensitivity / SCORE_STEPS, blind=blind)
        elif record.reason is Reason.TOO_SENSITIVE:
            scored = Scored(1.0, stopped=True)
        else:
            return
        promised = self._promised.get(record.round)  # None: of another dataset, or never charged
        if promised is None or record.round in self._rounds:
            return
        self._rounds.add(record.round)
        if self._only_promised and not promised:
            self.found.raw += count
        elif self._scored_by_the_bundle(record, count=count) and count:
            self.found.rounds.append(scored)

    def _scored_by_the_bundle(self, record: Record, *, count: bool) -> bool:
        own = self._bundles.get(record.process) == self._bundle
        self.found.other_bundle += count and not own
        return own


def from_globals(states: Iterable[Mapping[str, Tensor]], policy: Policy) -> Gathered:
    """Suspicion of past global models, in round order, each inspected with the history before it.

    As at the door, a model that the policy would refuse does not enter the history. The weights
    alone are looked at: a guard that has the architecture at hand probes it besides.
    """
    found, history = Gathered(), None
    for state in states:
        seen = inspect_global_model(state, history)
        refused = refuses(policy, seen.suspicion, unhealthy=seen.unhealthy).refused
        history = history if refused else seen.history
        if seen.unhealthy:
            found.unhealthy += 1
            continue
        found.rounds.append(Scored(seen.suspicion, stopped=refused))
    return found


def from_updates(updates: Iterable[Mapping[str, Tensor]]) -> Gathered:
    """Sensitivity of updates (local - global), scored without a reference."""
    found = Gathered()
    for update in updates:
        score = score_update(update)
        found.rounds.append(Scored(score.overall, blind=score.sharpness == "blind"))
    return found
