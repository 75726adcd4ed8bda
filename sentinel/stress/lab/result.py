"""Results: everything that came of a test, before anybody words it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentinel.stress.lab.finding import Finding, Tally
    from sentinel.stress.lab.knobs import Turned
    from sentinel.stress.lab.plan import Item, Skipped
    from sentinel.stress.lab.subject import Kind
    from sentinel.stress.lab.utility import Utility

CONFIDENCE = 0.95
MOST_OPEN = 0.5  # gain that a comparison may leave open and still show something
LEAST_COUNT = 6  # values from which a comparison may show something


@dataclass(frozen=True, slots=True)
class Side:
    """What came of the updates that took one way.

    Attributes:
        finding: pooled over the updates that left; None where none did.
        released: how many left.
        kept: reason code -> how many were withheld or refused.
    """

    finding: Finding | None = None
    released: int = 0
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """How many took this way, whether they left or not."""
        return self.released + sum(self.kept.values())


@dataclass(frozen=True, slots=True)
class Row:
    """One attack under one condition.

    Attributes:
        item: what was planned.
        raw: without a guard.
        policy: with the guard, as the policy says.
        alone: of the updates that the policy kept in: what would have left, had the guard been
            told of enough patients and its inspection missed the server; other rules hold.
        error: type of an error that ended the attack; None where there was none.
        diverged: updates that training on what this server sent did not give: it left no numbers.
    """

    item: Item
    raw: Side
    policy: Side
    alone: Side
    error: str | None = None
    diverged: int = 0

    @property
    def partial(self) -> bool:
        """Whether less was done than planned."""
        return self.cut or self.error is not None

    @property
    def proves_nothing(self) -> bool:
        """Whether the attack was not seen to get anything without a guard, let alone with one."""
        if self.raw.finding is None:
            return False
        return not any(tally.leaks(CONFIDENCE) for tally in self.raw.finding.tallies)

    @property
    def cut(self) -> bool:
        """Whether less was done than planned for want of time."""
        sides = (self.raw, self.policy, self.alone)
        if any(side.finding is not None and side.finding.cut for side in sides):
            return True
        return self.error is None and self.raw.updates + self.diverged < self.item.updates


@dataclass(frozen=True, slots=True)
class Point:
    """The policy with one knob turned: what leaks, and what is learned.

    Attributes:
        turn: the knob and its value.
        leak: of the curve's attack, on what leaves; None where nothing left.
        utility: of the federation; None where there was no time.
        kept: updates that were withheld.
    """

    turn: Turned
    leak: Tally | None
    utility: Utility | None
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Curves:
    """Leakage against utility.

    Attributes:
        item: the attack and the condition behind the leakage.
        raw: leakage without a guard.
        utility: without a guard.
        points: one for each turn of a knob that was tried.
        planned: how many were to be tried.
    """

    item: Item
    raw: Tally | None
    utility: Utility | None
    points: tuple[Point, ...]
    planned: int

    @property
    def empty(self) -> bool:
        """Whether there was no time for any of it."""
        return self.raw is None and self.utility is None and not self.points

    @property
    def metric(self) -> str:
        """Of the utility."""
        found = (self.utility, *(point.utility for point in self.points))
        return next((one.metric for one in found if one is not None), "utility")

    def gained(self, point: Point) -> tuple[float, ...]:
        """Utility above that without a guard, one value for each repeat that both went through.

        Repeats are paired: the parts, the start and the orders of batches are the same.
        """
        if self.utility is None or point.utility is None:
            return ()
        pairs = zip(point.utility.values, self.utility.values, strict=False)
        return tuple(guarded - plain for guarded, plain in pairs)


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that came of one test.

    Attributes:
        name: of the subject.
        kind: of its records.
        records: behind the updates, held out, and public.
        parameters: of the model.
        policy: name of the policy.
        digest: of the policy's file.
        promise: in words; None where the policy promises nothing.
        rows: what was tried, in the order of the plan.
        skipped: what was not, and why.
        curves: None where they were not asked for or there was no time.
        seconds: that the test took.
        budget: that it was given, in seconds.
        interrupted: whether somebody stopped it.
    """

    name: str
    kind: Kind
    records: tuple[int, int, int]
    parameters: int
    policy: str
    digest: str
    promise: str | None
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    curves: Curves | None
    seconds: float
    budget: float
    interrupted: bool = False

    @property
    def partial(self) -> bool:
        """Whether less was done than there is to do on this model and data."""
        return self.interrupted or self.short or any(row.partial for row in self.rows)

    @property
    def short(self) -> bool:
        """Whether more time would have more done; what cannot be tried here is no part of it."""
        curves = self.curves is not None and len(self.curves.points) < self.curves.planned
        return bool(self.dropped) or curves or any(row.cut for row in self.rows)

    @property
    def dropped(self) -> tuple[Skipped, ...]:
        """What was not tried for want of time."""
        return tuple(one for one in self.skipped if one.of_time)

    @property
    def confidence(self) -> float:
        """Of each single comparison, so that all of them together hold with 95 % (Bonferroni)."""
        sides = [side for row in self.rows for side in (row.policy, row.alone)]
        count = sum(len(side.finding.tallies) for side in sides if side.finding is not None)
        return 1.0 - (1.0 - CONFIDENCE) / max(1, count)

    @property
    def leaks(self) -> tuple[tuple[Row, Tally], ...]:
        """Where an attacker got more out of what the guard released than one who knows nothing."""
        return tuple(
            (row, tally)
            for row in self.rows
            if row.policy.finding is not None
            for tally in row.policy.finding.tallies
            if tally.leaks(self.confidence)
        )

    @property
    def withheld_entirely(self) -> bool:
        """Whether the policy let not one update out, of everything that was to be tried."""
        tried = any(row.policy.updates for row in self.rows)
        released = any(row.policy.released for row in self.rows)
        return tried and not released and not self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether something planned was not even begun."""
        return self.interrupted or any(one.why == NO_TIME for one in self.skipped)

    @property
    def inconclusive(self) -> bool:
        """Whether no leak was seen and none is excluded.

        Either no attack that works without a guard was through on a released update, or one that
        was leaves too much open.
        """
        shown = self.through and not self.unshown
        return not shown and not self.leaks and not self.withheld_entirely

    @property
    def unshown(self) -> tuple[Row, ...]:
        """Attacks on released updates that were through, and of too few records to show anything.

        Their main measure has fewer than LEAST_COUNT values, or leaves a gain above MOST_OPEN open.
        """
        return tuple(row for row in self._ended if self.leaves_open(row))

    def leaves_open(self, row: Row) -> bool:
        """Whether what was let out may have given nearly anything away, for all this row shows."""
        if row.policy.finding is None:
            return False
        tally = row.policy.finding.main
        return len(tally.values) < LEAST_COUNT or tally.open_gain(self.confidence) > MOST_OPEN

    @property
    def control(self) -> Tally | None:
        """What the controls on all raw updates come to; None where there was none."""
        found = [
            row.raw.finding.control
            for row in self.rows
            if row.raw.finding is not None and row.raw.finding.control is not None
        ]
        return sum(found[1:], found[0]) if found else None

    @property
    def blind(self) -> bool:
        """Whether an attacker with a control could not see even what was planted for it."""
        return self.control is not None and self.control.interval().low <= 0.0

    @property
    def through(self) -> tuple[Row, ...]:
        """Attacks on released updates that say something where they found nothing.

        None that was cut short, none that is blind, and none that fails without a guard too.
        """
        return tuple(row for row in self._ended if not row.proves_nothing)

    @property
    def _ended(self) -> tuple[Row, ...]:
        """Attacks on released updates that were neither cut short nor blind."""
        blind = {
            row.item.attack
            for row in self.rows
            if self.blind and row.raw.finding is not None and row.raw.finding.control is not None
        }
        return tuple(
            row
            for row in self.rows
            if row.policy.finding is not None
            and not row.policy.finding.cut
            and row.item.attack not in blind
        )


NO_TIME = "the time was up"
BEYOND = "it does not fit into the time of this test; give it more minutes"
DIVERGED = "training on what this server sent gives no finite update"
