"""The ledger never forgets, never overspends, and sees what was done to it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sentinel.errors import Withheld
from sentinel.privacy import Charge, GaussianEvent, Head, Ledger, Promise, UnboundedEvent
from sentinel.terms import GENESIS, Adjacency, Reason, Unit

if TYPE_CHECKING:
    from pathlib import Path

PROMISE = Promise(Unit.SITE, Adjacency.REPLACE, epsilon=2.0, delta=1e-5)
EVENT = GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=20.0)


def charge(
    event: GaussianEvent | UnboundedEvent = EVENT, dataset: str = "d", at: int = 0
) -> Charge:
    return Charge(at, dataset, "p" * 64, "r" * 64, event, Head(0, GENESIS))


def spend_all(ledger: Ledger) -> int:
    count = 0
    while True:
        try:
            ledger.charge(charge(), PROMISE)
        except Withheld:
            return count
        count += 1


def test_the_budget_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    count = spend_all(ledger)
    assert count > 1
    assert ledger.spent("d", PROMISE).epsilon <= 2.0
    assert ledger.head().seq == count
    for spend in (
        lambda: ledger.require_budget("d", EVENT, PROMISE),
        lambda: ledger.charge(charge(), PROMISE),
    ):
        with pytest.raises(Withheld) as caught:
            spend()
        assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert ledger.head().seq == count


def test_totals_over_restarts_equal_one_run(tmp_path: Path) -> None:
    for _ in range(5):
        Ledger(tmp_path / "restarted").charge(charge(), PROMISE)
    straight = Ledger(tmp_path / "straight")
    for _ in range(5):
        straight.charge(charge(), PROMISE)
    restarted = Ledger(tmp_path / "restarted")
    assert restarted.spent("d", PROMISE) == straight.spent("d", PROMISE)
    assert restarted.head() == straight.head()


def test_each_dataset_has_a_budget_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    spend_all(ledger)
    ledger.charge(charge(dataset="other"), PROMISE)
    assert ledger.spent("other", PROMISE).epsilon < ledger.spent("d", PROMISE).epsilon
    assert [row.dataset for row in ledger.rows("other")] == ["other"]


def test_an_unbounded_event_is_never_stopped_and_makes_the_total_void(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge(charge(UnboundedEvent()), None)
    assert ledger.spent("d", PROMISE).void


def test_the_rate_limit_counts_the_last_day_of_one_dataset(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    day = 24 * 60 * 60
    for at in (0, 10):
        ledger.charge(charge(at=at), PROMISE, per_day=2)
    for at, allowed in [(20, False), (day - 1, False), (day, True)]:
        if allowed:
            ledger.require_rate("d", at, 2)
            continue
        with pytest.raises(Withheld) as caught:
            ledger.charge(charge(at=at), PROMISE, per_day=2)
        assert caught.value.reason is Reason.RATE_LIMITED
    assert ledger.head().seq == 2
    ledger.charge(charge(at=20, dataset="other"), PROMISE, per_day=2)


def test_a_round_that_was_charged_is_known(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    assert not ledger.was_charged("r" * 64)
    ledger.charge(charge(), PROMISE)
    assert ledger.was_charged("r" * 64)


def test_what_is_asked_at_every_release_is_found_by_an_index(tmp_path: Path) -> None:
    """Without one, a release would grow slower with every round of the ledger's life."""
    Ledger(tmp_path / "l")
    with sqlite3.connect(tmp_path / "l") as db:
        for query in (
            "SELECT event, COUNT(*) FROM event WHERE dataset = 'd' GROUP BY event",
            "SELECT COUNT(*) FROM event WHERE dataset = 'd' AND at > 5",
            "SELECT 1 FROM event WHERE round = 'r' LIMIT 1",
        ):
            plan = str(db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
            assert "COVERING INDEX" in plan, plan


SPENDER = """
import sys
from sentinel.errors import Withheld
from sentinel.privacy import *
from sentinel.terms import Adjacency, Unit
promise = Promise(Unit.SITE, Adjacency.REPLACE, 2.0, 1e-5)
event = GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=20.0)
ledger = Ledger(__import__("pathlib").Path(sys.argv[1]))
try:
    while True:
        ledger.charge(Charge(0, "d", "p", "r", event, Head(0, "0" * 64)), promise)
except Withheld:
    pass
"""


def test_concurrent_processes_never_overspend(tmp_path: Path) -> None:
    alone = spend_all(Ledger(tmp_path / "alone"))
    shared = tmp_path / "shared"
    workers = [
        subprocess.Popen([sys.executable, "-c", SPENDER, str(shared)])  # noqa: S603 - our own code
        for _ in range(3)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert Ledger(shared).head().seq == alone


def test_a_charge_waits_for_the_disk_and_holds_the_ledger_while_it_checks(tmp_path: Path) -> None:
    """synchronous=FULL, and the lock is taken before the budget is read, not after."""
    ledger = Ledger(tmp_path / "l")
    with ledger._connection() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        statements: list[str] = []
        db.set_trace_callback(statements.append)
    ledger.charge(charge(), PROMISE, per_day=5)
    order = [statement.split()[0] for statement in statements]
    assert statements[0] == "BEGIN IMMEDIATE"
    assert order[-2:] == ["INSERT", "COMMIT"]
    assert order.count("BEGIN") == 1
    assert "SELECT" in order[1:-2]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE event SET event = replace(event, '20.0', '90.0') WHERE seq = 2",
        "DELETE FROM event WHERE seq = 2",
        "UPDATE event SET dataset = 'elsewhere' WHERE seq = 1",
        "UPDATE event SET event = '{}' WHERE seq = 3",
    ],
)
def test_a_row_that_was_changed_or_removed_stops_everything(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path)
    for _ in range(3):
        ledger.charge(charge(), PROMISE)
    with sqlite3.connect(path) as db:
        db.execute(damage)
    with pytest.raises(Withheld) as caught:
        Ledger(path)
    assert caught.value.reason is Reason.LEDGER_DAMAGED


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(Withheld) as caught:
        Ledger(path)
    assert caught.value.reason is Reason.LEDGER_DAMAGED
    assert path.read_bytes() == b"something else" * 1000


def test_the_ledger_is_readable_by_its_owner_alone_and_not_reached_through_a_link(
    tmp_path: Path,
) -> None:
    path = tmp_path / "l"
    old = os.umask(0)
    try:
        Ledger(path).charge(charge(), PROMISE)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o077 == 0
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises((OSError, Withheld)):
        Ledger(link)
