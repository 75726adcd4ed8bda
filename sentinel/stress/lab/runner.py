"""The runner: takes the plan through the guard and the attacks, and keeps to its time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.crew import one_thread
from sentinel.errors import MisuseError
from sentinel.house import promise_of
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.curves import draw_curves, worth_drawing
from sentinel.stress.lab.deadline import Deadline, OutOfTimeError
from sentinel.stress.lab.exchange import GuardedDoor, Site, norm_of, raw
from sentinel.stress.lab.home import scratch
from sentinel.stress.lab.plan import Skipped, leading, make_plan, unmade
from sentinel.stress.lab.result import BEYOND, DIVERGED, NO_TIME, Result, Row, Side
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.slowness import slowness_of
from sentinel.stress.lab.words import failure
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.deadline import Stop
    from sentinel.stress.lab.exchange import Sent, Update
    from sentinel.stress.lab.finding import Finding
    from sentinel.stress.lab.plan import Item, Plan
    from sentinel.stress.lab.result import Curves
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject

CURVES_FIRST = 3  # conditions that come before the curves
CURVES_SHARE = 0.5  # of the time left when their turn comes
_CURVES = "curves of leakage against utility"
SPARE = 3.0  # times its estimate must be left for an item beyond the plan


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for.

    Attributes:
        attacks: names; all where empty.
        seconds: that the test may take.
        curves: whether the knobs are turned.
        seed: of the attacker, the draws of records and the orders of batches; never of the
            guard's noise.
    """

    attacks: tuple[str, ...] = ()
    seconds: float = 600.0
    curves: bool = True
    seed: int = 0


def run_lab(
    subject: Subject,
    loaded: LoadedPolicy,
    options: Options,
    on_step: Callable[[int, int], None] | None = None,
    stop: Stop | None = None,
) -> Result:
    """Test one subject under one policy.

    Args:
        subject: model and records; unchanged.
        loaded: the policy.
        options: what is asked for.
        on_step: called with the steps done and the steps in all.
        stop: whether somebody asked for the end; looked at wherever the time is.

    Returns:
        What came of it; partial where the time was short, or where Ctrl-C was pressed, be it while
        the plan was made.

    Raises:
        MisuseError: no such attack, or a policy that this test is not for.
        Withheld: the guard could not be opened.

    Guarantees:
        Every update that counts as released came out of `Round.release`. Ledger, log and releases
        lie in a scratch folder that is gone afterwards; no other state is opened. The plan, the
        training and the curves are within the time. After it is up nothing new is begun but what
        takes a moment, and whatever was planned and not tried is listed. What cannot be cut is
        finished: a step of training, the guard's work on one update, one server's trial crafting,
        and a search that was expected to fit.
    """
    if loaded.policy.privacy is not None and loaded.policy.privacy.unit is not Unit.SITE:
        raise MisuseError(
            "This test is for policies without a promise, or with one for the site. A promise per "
            "patient or record is made inside private training; test it with canaries "
            "(sentinel.stress.inference.canaries.audit)."
        )
    begun = time.monotonic()
    lab = _Lab(subject, loaded, options, Deadline.after(options.seconds, stop), on_step)
    try:
        with one_thread(), scratch() as home:
            lab.run(home)
    except KeyboardInterrupt:
        lab.interrupted = True
    return lab.result(time.monotonic() - begun)


class _Lab:
    """One test under way; what it has can be asked for at any time."""

    def __init__(
        self,
        subject: Subject,
        loaded: LoadedPolicy,
        options: Options,
        deadline: Deadline,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self._subject, self._loaded, self._options = subject, loaded, options
        self._on_step = on_step or (lambda _done, _total: None)
        self._deadline = deadline
        self._plan = unmade(options.attacks)
        self._generator = torch.Generator().manual_seed(options.seed)
        self._site = Site(subject, self._generator, deadline)
        self._made: dict[Setting, list[tuple[Update, Sent, Sent | None] | None]] = {}
        self._rows: list[Row] = []
        self._late: list[Skipped] = []
        self._curves: Curves | None = None
        self._spent = 0.0
        self.interrupted = False

    def run(self, home: Path) -> None:
        """Make the plan and work through it, with the guards' state in `home`."""
        policy = GuardedDoor(self._loaded, home / "policy")
        alone = GuardedDoor(self._loaded, home / "alone", alone=True)
        self._doors, self._home = (policy, alone), home
        self._plan = self._made_plan()
        items, core = self._plan.items, self._plan.core
        before = leading(items, CURVES_FIRST)
        drawn = False
        waiting = self._options.curves and before < len(items)
        early = self._deadline.share(CURVES_SHARE) if waiting else self._deadline
        for at, item in enumerate(items):
            if at == before:
                self._draw()
                drawn = True
            self._on_step(at, len(items) + 1)
            if at < core:
                self._try(item, items[at:core], early if at < before else self._deadline)
            elif self._fits(item):
                self._try(item, (item,), self._deadline)
        if not drawn:
            self._draw()
        self._on_step(len(items) + 1, len(items) + 1)

    def _made_plan(self) -> Plan:
        return make_plan(
            self._subject,
            self._loaded,
            self._options.attacks,
            self._options.seconds,
            self._generator,
            deadline=self._deadline,
            slowness=slowness_of(self._subject, self._deadline),
        )

    def result(self, seconds: float) -> Result:
        """What there is so far."""
        subject, policy = self._subject, self._loaded.policy
        tried = {id(row.item) for row in self._rows}
        late = {one.what for one in self._late}
        for at, item in enumerate(self._plan.items):
            what = _what(item)
            if id(item) not in tried and what not in late:
                why = NO_TIME if at < self._plan.core else BEYOND
                self._late.append(Skipped(what, why, of_time=True))
        public = 0 if subject.public is None else len(subject.public)
        promise = promise_of(policy)
        return Result(
            name=subject.name,
            kind=subject.kind,
            records=(len(subject.train), len(subject.held_out), public),
            parameters=sum(p.numel() for p in subject.model.parameters()),
            policy=policy.name,
            digest=self._loaded.digest,
            promise=None if promise is None else str(promise.unit),
            rows=tuple(self._rows),
            skipped=(*self._plan.skipped, *self._late),
            curves=self._curves,
            seconds=seconds,
            budget=self._options.seconds,
            interrupted=self.interrupted or self._deadline.stop.asked,
        )

    def _fits(self, item: Item) -> bool:
        """Whether an item beyond the plan can be done in the time left, at the pace so far."""
        expected = sum(row.item.seconds for row in self._rows)
        pace = self._spent / expected if expected else 1.0
        return SPARE * pace * item.seconds < self._deadline.left

    def _try(self, item: Item, rest: Sequence[Item], limit: Deadline) -> None:
        """One attack under one condition, within its share of the time and never after `limit`."""
        if limit.passed:
            return
        ahead = sum(one.seconds for one in rest)
        if not self._curves and self._options.curves:
            ahead *= 1.0 + CURVES_SHARE
        # At least what it is expected to take: the first items are worth most.
        share = max(item.seconds / ahead, min(1.0, 2 * item.seconds / max(self._deadline.left, 1)))
        deadline = self._deadline.share(min(1.0, share)).before(limit)
        row = Row(item, Side(), Side(), Side())
        begun = time.monotonic()
        for number in range(item.updates):
            if deadline.passed and number:
                break
            try:
                row = self._attacked(row, number, deadline)
            except OutOfTimeError:
                break
            if row.error is not None:
                break
        self._spent += time.monotonic() - begun
        if row.diverged and row.raw.updates == 0:
            self._late.append(Skipped(_what(item), DIVERGED))
        if row.raw.updates or row.error is not None:
            self._rows.append(row)

    def _attacked(self, row: Row, number: int, deadline: Deadline) -> Row:
        """One more update, on all its ways."""
        try:
            exchange = self._exchange(row.item.setting, number)
            if exchange is None:
                return replace(row, diverged=row.diverged + 1)
            update, policy, alone = exchange
            return replace(
                row,
                raw=self._side(row, row.raw, update, raw(update), deadline),
                policy=self._side(row, row.policy, update, policy, deadline),
                alone=row.alone
                if alone is None
                else self._side(row, row.alone, update, alone, deadline),
            )
        except OutOfTimeError:
            raise
        except Exception as error:  # noqa: BLE001 - of an attack; told by type, its text may hold values
            return replace(row, error=type(error).__name__)

    def _side(self, row: Row, side: Side, update: Update, back: Sent, deadline: Deadline) -> Side:
        if back.delta is None:
            reason = str(back.reason)
            return replace(side, kept={**side.kept, reason: side.kept.get(reason, 0) + 1})
        case = self._site.case(update, back)
        attack = ATTACKS[row.item.attack]
        found = attack.run(case, update.behind, self._generator, deadline)
        stamped = tuple(replace(one, update=side.updates) for one in found.exhibits)
        found = replace(found, exhibits=stamped)
        pooled: Finding = found if side.finding is None else side.finding + found
        return replace(side, finding=pooled, released=side.released + 1)

    def _exchange(self, setting: Setting, number: int) -> tuple[Update, Sent, Sent | None] | None:
        """The n-th update under this condition, None where training diverged; attacks share it."""
        made = self._made.setdefault(setting, [])
        while len(made) <= number:
            update = self._site.update(setting, SERVERS[setting.server])
            if not math.isfinite(norm_of(update)):
                made.append(None)
                continue
            self._deadline.require()
            policy, alone = self._doors
            first = policy.send(update, self._site.model, setting.records)
            second = None
            if first.delta is None:
                self._deadline.require()
                second = alone.send(update, self._site.model, setting.records)
            made.append((update, first, second))
        return made[number]

    def _draw(self) -> None:
        """The curves, within their share of the time."""
        failed = [id(row.item) for row in self._rows if row.error is not None]
        item = worth_drawing([one for one in self._plan.items if id(one) not in failed])
        if not self._options.curves or item is None:
            return
        deadline = self._deadline.share(CURVES_SHARE)
        folder, seed = self._home / "curves", self._options.seed
        try:
            curves = draw_curves(self._subject, self._loaded, item, folder, seed, deadline)
        except Exception as error:  # noqa: BLE001 - of the site's own model; told by type
            why = f"drawing them failed: {failure(type(error).__name__)}"
            self._late.append(Skipped(_CURVES, why))
            return
        if curves.empty:
            self._late.append(Skipped(_CURVES, NO_TIME, of_time=True))
        else:
            self._curves = curves


def _what(item: Item) -> str:
    return f"{item.attack}: {item.setting.words}"
