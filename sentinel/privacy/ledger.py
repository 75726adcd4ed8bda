"""Ledger: the durable account of what was spent, shared by everything that trains on a dataset.

- Every charge is on disk (SQLite, WAL, synchronous=FULL) before anything can leave.
- The check against the budget and the charge are one transaction: concurrent processes on one
  ledger never overspend.
- Budget is one per dataset, over the life of the file: rounds, jobs, federations, policies and
  restarts all spend from it, and nothing resets it.
- Nothing is ever removed or refunded. Each row carries the hash of the row before it; the head
  (sequence number and hash) goes into every record of the audit log, so that a ledger put back
  from a backup is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.durable import open_private
from sentinel.errors import Withheld
from sentinel.privacy.accounting import total, weigh
from sentinel.privacy.events import (
    DpSgdEvent,
    UnboundedEvent,
    event_from_json,
    event_to_json,
)
from sentinel.privacy.mechanisms import covers
from sentinel.privacy.tally import Tally
from sentinel.terms import GENESIS, SMALLEST_NOISE_MULTIPLIER, Reason, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sentinel.privacy.accounting import Promise, Spent
    from sentinel.privacy.events import PromisedEvent

_SCHEMA_VERSION = 1
_BUSY_SECONDS = 120.0  # a check under the lock may take seconds near the end of a budget
_CREATE = """
CREATE TABLE IF NOT EXISTS event (
    seq INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    dataset TEXT NOT NULL,
    policy TEXT NOT NULL,
    round TEXT NOT NULL,
    event TEXT NOT NULL,
    log_seq INTEGER NOT NULL,
    log_head TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT
"""
# What is asked for at every release: charges of a day, charges of a round. (Totals: see `tally`.)
_INDICES = (
    "CREATE INDEX IF NOT EXISTS by_time ON event (dataset, at)",
    "CREATE INDEX IF NOT EXISTS by_round ON event (round)",
)
_DAY = 24 * 60 * 60  # seconds


@dataclass(frozen=True, slots=True)
class Head:
    """The last row: its sequence number (0: none yet) and its hash."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Charge:
    """One event to be written.

    Attributes:
        at: seconds since 1970.
        dataset: the patients behind it.
        policy: digest of the policy file.
        round: key of the round.
        event: what it costs.
        log_head: the last record of the audit log, so that a log cut short is seen.
    """

    at: int
    dataset: str
    policy: str
    round: str
    event: PromisedEvent | UnboundedEvent
    log_head: Head


@dataclass(frozen=True, slots=True)
class Row(Charge):
    """One event as it stands in the ledger, with its place."""

    seq: int


class Ledger:
    """The account in one file, shared by threads and processes.

    Guarantees:
        What the rules of this module say, as long as the disk keeps what it has synced.

    Edges:
        no file yet:                            made, for its owner alone
        a link in the place of the file:        refused
        a file that is no ledger:               LEDGER_DAMAGED; it is left as it is
        a row that was changed or removed:      LEDGER_DAMAGED, when opened and by `verify`
        an event of unknown kind or version:    LEDGER_DAMAGED
        a file put back while it is in use:     counted anew from what lies there
        a fork:                                 the child opens a connection of its own
        a database that cannot be written:      STORAGE_FAILED; nothing was written
        `require_budget`, `require_rate`:       raise what `charge` would raise now; nothing is
                                                written
        `require_rate` with `per_day` left out: any number of charges passes
    """

    def __init__(self, path: Path) -> None:
        """Open or create the ledger and check its chain.

        Raises:
            Withheld: LEDGER_DAMAGED where the file is no ledger, or its chain is broken.
        """
        self._path = path
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._owner = 0
        self._file = (0, 0)
        self._tally = Tally()
        os.close(open_private(path, os.O_RDWR | os.O_CREAT))
        with self._connection() as db:
            db.execute("PRAGMA journal_mode=WAL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise _damaged("was written by another version")
            db.execute(_CREATE)
            for index in _INDICES:
                db.execute(index)
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        self.verify()

    def head(self) -> Head:
        """The last row's sequence number and hash."""
        with self._connection() as db:
            return _head(db)

    def hash_at(self, seq: int) -> str | None:
        """The hash of one row; None where there is no such row."""
        if seq == 0:
            return GENESIS
        with self._connection() as db:
            row = db.execute("SELECT hash FROM event WHERE seq = ?", (seq,)).fetchone()
        return None if row is None else str(row[0])

    def charge(
        self, charge: Charge, promise: Promise | None, *, per_day: int | None = None
    ) -> Head:
        """Write one event, durably, if budget and rate limit allow it.

        Args:
            charge: the event.
            promise: the budget it must stay in; None where nothing is promised.
            per_day: how many events the dataset may have in 24 hours; None for any number.

        Returns:
            The new head.

        Raises:
            Withheld: BUDGET_EXHAUSTED, PROMISE_NOT_KEPT, RATE_LIMITED or LEDGER_DAMAGED; then
                nothing was written.

        Guarantees:
            What is returned is on disk. Check and charge are one transaction: processes come one
            after the other, and none sees a budget that another is spending.

        Edges:
            the total stays at or below epsilon:         written and synced before the return
            it would exceed epsilon:                     BUDGET_EXHAUSTED, nothing written
            noise multiplier below 0.05:                 BUDGET_EXHAUSTED, nothing written
            an event of a finer unit than the promise's: PROMISE_NOT_KEPT, nothing written: it would
                                                         never count against it
            an event without a promise, under a promise: PROMISE_NOT_KEPT, nothing written
            no promise:                                  written; the dataset's lifetime promises
                                                         are void from here on
            as many charges as `per_day` in 24 hours:    RATE_LIMITED, nothing written
            the last row changed under an open ledger:   LEDGER_DAMAGED, nothing written
            several processes at once:                   one after the other, check and charge
            killed at any instant:                       written whole, or not at all
        """
        if promise is not None:  # without the lock: near the end of a budget it may take seconds
            self.require_budget(charge.dataset, charge.event, promise)
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                if promise is not None:
                    _require_budget(self._counted(db, charge.dataset), charge.event, promise)
                _require_rate(db, charge.dataset, charge.at, per_day)
                head = _append(db, charge)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
        return head

    def require_budget(
        self,
        dataset: str,
        event: PromisedEvent | UnboundedEvent,
        promise: Promise,
        what: str | None = None,
    ) -> None:
        """Raise what `charge` would raise for the budget now; nothing is written.

        `what` names the event in the message, where its asker knows more than the event says.
        """
        with self._connection() as db:
            _require_budget(self._counted(db, dataset), event, promise, what)

    def counted(self, dataset: str) -> dict[PromisedEvent | UnboundedEvent, int]:
        """Each event on `dataset`, and how often it was charged."""
        with self._connection() as db:
            return dict(self._counted(db, dataset))

    def spent(self, dataset: str, promise: Promise, *, tight: bool = False) -> Spent:
        """What all events on `dataset` add up to; see `total`."""
        return total(self.counted(dataset), promise, tight=tight)

    def require_rate(self, dataset: str, at: int, per_day: int | None) -> None:
        """Raise RATE_LIMITED where a charge at the time `at` would be one too many."""
        with self._connection() as db:
            _require_rate(db, dataset, at, per_day)

    def was_charged(self, round_key: str) -> bool:
        """Whether a round has been charged before."""
        with self._connection() as db:
            query = "SELECT 1 FROM event WHERE round = ? LIMIT 1"
            return db.execute(query, (round_key,)).fetchone() is not None

    def rows(self, dataset: str | None = None) -> list[Row]:
        """All events in order, of one dataset or of all."""
        with self._connection() as db:
            found = db.execute("SELECT * FROM event ORDER BY seq").fetchall()
        rows = [_row(columns) for columns in found]
        return [row for row in rows if dataset in (None, row.dataset)]

    def last_log_head(self) -> Head:
        """The audit record that the last event names."""
        with self._connection() as db:
            query = "SELECT log_seq, log_head FROM event ORDER BY seq DESC LIMIT 1"
            row = db.execute(query).fetchone()
        return Head(0, GENESIS) if row is None else Head(*row)

    def verify(self) -> Head:
        """Recompute the chain; the head.

        Raises:
            Withheld: LEDGER_DAMAGED where a row was changed, removed or cannot be read.
        """
        with self._connection() as db:
            found = db.execute("SELECT * FROM event ORDER BY seq").fetchall()
        head = Head(0, GENESIS)
        for columns in found:
            expected = _hash(head.hash, columns[:-1])
            if columns[0] != head.seq + 1 or columns[-1] != expected:
                raise _damaged(f"has a row that was changed or removed, at {head.seq + 1}")
            _row(columns)
            head = Head(columns[0], expected)
        return head

    def _counted(
        self, db: sqlite3.Connection, dataset: str
    ) -> Mapping[PromisedEvent | UnboundedEvent, int]:
        try:
            return self._tally.counted(db, dataset)
        except ValueError:
            raise _damaged("holds an event of an unknown kind or version") from None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The connection of this process, one operation at a time.

        It is kept open, since closing the last one of a database in WAL mode copies and syncs the
        whole log. A connection must not cross a fork, so a child opens its own.
        """
        try:
            with self._lock:
                yield self._connected()
        except sqlite3.OperationalError as error:
            raise Withheld(
                Reason.STORAGE_FAILED,
                "The ledger could not be read or written; check space and permissions of the state "
                "folder.",
            ) from error
        except sqlite3.DatabaseError as error:
            raise _damaged("is no ledger, or is damaged") from error

    def _connected(self) -> sqlite3.Connection:
        if self._db is None or self._owner != os.getpid() or not self._is_the_file():
            self._db = sqlite3.connect(
                self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._owner = os.getpid()
            self._file = _identity(self._path)
            self._tally = Tally()
            self._db.execute("PRAGMA synchronous=FULL")
        return self._db

    def _is_the_file(self) -> bool:
        """Whether the connection is to what lies there now: the file may have been put back."""
        return self._file == _identity(self._path)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _damaged(problem: str) -> Withheld:
    return Withheld(
        Reason.LEDGER_DAMAGED,
        f"The ledger {problem}. Nothing is released until it is put right; do not delete it.",
    )


def _head(db: sqlite3.Connection) -> Head:
    row = db.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
    return Head(0, GENESIS) if row is None else Head(*row)


def _sound_head(db: sqlite3.Connection) -> Head:
    """The head, where its row still is what was hashed: an open ledger is not verified each time.

    Raises:
        Withheld: LEDGER_DAMAGED.
    """
    rows = db.execute("SELECT * FROM event ORDER BY seq DESC LIMIT 2").fetchall()
    if not rows:
        return Head(0, GENESIS)
    last, earlier = rows[0], GENESIS if len(rows) == 1 else rows[1][-1]
    if last[-1] != _hash(earlier, last[:-1]):
        raise _damaged(f"has a row that was changed or removed, at {last[0]}")
    return Head(last[0], last[-1])


def _append(db: sqlite3.Connection, charge: Charge) -> Head:
    before = _sound_head(db)
    values = (
        before.seq + 1,
        charge.at,
        charge.dataset,
        charge.policy,
        charge.round,
        event_to_json(charge.event),
        charge.log_head.seq,
        charge.log_head.hash,
    )
    head = Head(before.seq + 1, _hash(before.hash, values))
    db.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, head.hash))
    return head


def _hash(before: str, values: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps([before, *values]).encode()).hexdigest()


def _row(columns: tuple[object, ...]) -> Row:
    seq, at, dataset, policy, round_key, event, log_seq, log_head, _ = columns
    try:
        known = event_from_json(str(event))
    except ValueError:
        raise _damaged("holds an event of an unknown kind or version") from None
    return Row(
        seq=int(str(seq)),
        at=int(str(at)),
        dataset=str(dataset),
        policy=str(policy),
        round=str(round_key),
        event=known,
        log_head=Head(int(str(log_seq)), str(log_head)),
    )


def _require_rate(db: sqlite3.Connection, dataset: str, at: int, per_day: int | None) -> None:
    if per_day is None:
        return
    query = "SELECT COUNT(*) FROM event WHERE dataset = ? AND at > ?"
    if db.execute(query, (dataset, at - _DAY)).fetchone()[0] >= per_day:
        raise Withheld(
            Reason.RATE_LIMITED,
            f"{per_day} rounds were charged in the last 24 hours, as many as the policy allows.",
        )


def _require_budget(
    counted: Mapping[PromisedEvent | UnboundedEvent, int],
    event: PromisedEvent | UnboundedEvent,
    promise: Promise,
    what: str | None = None,
) -> None:
    _require_countable(event, promise)
    spent = weigh({**counted, event: counted.get(event, 0) + 1}, promise)
    if not spent.epsilon <= promise.epsilon:
        raise Withheld(
            Reason.BUDGET_EXHAUSTED,
            f"{what or _named(event)} would spend epsilon {spent.epsilon:.3g} of "
            f"{promise.epsilon:.3g} (delta {promise.delta:g}, unit {promise.unit}, adjacency "
            f"{promise.adjacency}, {_claimed(promise.unit)}{spent.accountant}); the budget holds "
            "for the life of the ledger. See `sentinel budget show --policy FILE`.",
        )


def _named(event: PromisedEvent | UnboundedEvent) -> str:
    """What an event is, in words."""
    if not isinstance(event, DpSgdEvent):
        return "One more release"
    return "One more private step" if event.steps == 1 else f"A round of {event.steps:,} steps"


def _claimed(unit: Unit) -> str:
    """Who answers for an epsilon per patient or record: the training process, which draws noise."""
    return "" if unit is Unit.SITE else "claimed by the training process, "


def _require_countable(event: PromisedEvent | UnboundedEvent, promise: Promise) -> None:
    """Refuse what would not count, or has no epsilon that can be computed."""
    if isinstance(event, UnboundedEvent) or not covers(event, promise.unit):
        raise Withheld(
            Reason.PROMISE_NOT_KEPT,
            f"The release does not protect a {promise.unit}, which the policy promises; it would "
            "not count against the budget.",
        )
    if event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER:
        raise Withheld(
            Reason.BUDGET_EXHAUSTED,
            f"The noise multiplier is below {SMALLEST_NOISE_MULTIPLIER}: there the accountants ask "
            "for terabytes and no epsilon worth the name exists. Use a larger one.",
        )
