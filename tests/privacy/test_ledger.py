"""The ledger never forgets, never overspends, and sees what was done to it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sentinel.errors import Withheld
from sentinel.privacy import (
    Charge,
    DpSgdEvent,
    GaussianEvent,
    Head,
    Ledger,
    Promise,
    PromisedEvent,
    UnboundedEvent,
    total,
)
from sentinel.privacy import ledger as ledger_module
from sentinel.privacy.tally import _NEW
from sentinel.terms import GENESIS, Adjacency, Reason, Unit

if TYPE_CHECKING:
    from pathlib import Path

PROMISE = Promise(Unit.SITE, Adjacency.REPLACE, epsilon=2.0, delta=1e-5)
EVENT = GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=20.0)


def charge(
    event: PromisedEvent | UnboundedEvent = EVENT,
    dataset: str = "d",
    at: int = 0,
    policy: str = "p" * 64,
    round_key: str = "r" * 64,
) -> Charge:
    return Charge(at, dataset, policy, round_key, event, Head(0, GENESIS))


def training(steps: int, noise_multiplier: float = 1.5, unit: Unit = Unit.PATIENT) -> DpSgdEvent:
    return DpSgdEvent(
        unit=unit,
        adjacency=Adjacency.ADD_OR_REMOVE,
        noise_multiplier=noise_multiplier,
        sampling="poisson",
        sampling_rate=0.02,
        steps=steps,
        log_ratio=1e-6,
        mass=1e-25,
    )


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


def test_what_is_asked_at_every_release_reads_new_rows_only(tmp_path: Path) -> None:
    """Otherwise a release would grow slower with every round of the ledger's life."""
    Ledger(tmp_path / "l")
    with sqlite3.connect(tmp_path / "l") as db:
        for query in (
            "SELECT COUNT(*) FROM event WHERE dataset = 'd' AND at > 5",
            "SELECT 1 FROM event WHERE round = 'r' LIMIT 1",
        ):
            plan = str(db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
            assert "COVERING INDEX" in plan, plan
        plan = str(db.execute(f"EXPLAIN QUERY PLAN {_NEW}", (5, 9)).fetchall())
        assert "SEARCH event USING INTEGER PRIMARY KEY" in plan, plan


PATIENTS = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, epsilon=8.0, delta=1e-5)
LIFE = [
    # A policy, a round key of its own for each federation, run and number, and what it cost.
    ("a" * 64, training(100)),
    ("a" * 64, training(100)),
    ("b" * 64, GaussianEvent(unit="site", adjacency="replace", noise_multiplier=30.0)),
    ("b" * 64, training(40, noise_multiplier=2.0)),
    ("a" * 64, training(100)),
]


def test_rounds_policies_federations_and_restarts_spend_from_one_budget(tmp_path: Path) -> None:
    """The total over a life with a restart before each charge is that of one composition."""
    for number, (policy, event) in enumerate(LIFE):
        key = f"{number:064x}"
        Ledger(tmp_path / "l").charge(charge(event, policy=policy, round_key=key), PATIENTS)
    counted: dict[PromisedEvent | UnboundedEvent, int] = {}
    for _, event in LIFE:
        counted[event] = counted.get(event, 0) + 1
    for tight in (False, True):
        lived = Ledger(tmp_path / "l").spent("d", PATIENTS, tight=tight)
        assert lived == total(counted, PATIENTS, tight=tight)
    first = total({LIFE[0][1]: 1}, PATIENTS).epsilon
    assert first < lived.epsilon < 5 * first


def test_a_ledger_of_the_first_version_is_read_and_added_to(tmp_path: Path) -> None:
    """Rows without slack keep their meaning; the count of those is said."""
    ledger = Ledger(tmp_path / "l")
    ledger.charge(charge(), PROMISE)
    with sqlite3.connect(tmp_path / "l") as db:
        text = db.execute("SELECT event FROM event").fetchone()[0]
    assert text == (
        '{"kind":"gaussian","version":1,"unit":"site","adjacency":"replace",'
        '"noise_multiplier":20.0}'
    )
    known = GaussianEvent(
        unit="site", adjacency="replace", noise_multiplier=20.0, log_ratio=1e-4, mass=1e-25
    )
    ledger.charge(charge(known), PROMISE)
    found = Ledger(tmp_path / "l").spent("d", PROMISE)
    assert found.slack_unknown == 1
    assert found.slack.log_ratio == 1e-4
    assert found.epsilon > total({EVENT: 2}, PROMISE).epsilon


@pytest.mark.parametrize(
    ("event", "reason", "says"),
    [
        (UnboundedEvent(), Reason.PROMISE_NOT_KEPT, "does not protect a site"),
        (training(1), Reason.PROMISE_NOT_KEPT, "does not protect a site"),
        (
            EVENT.model_copy(update={"noise_multiplier": 0.049}),
            Reason.BUDGET_EXHAUSTED,
            "below 0.05",
        ),
        (EVENT.model_copy(update={"noise_multiplier": 0.5}), Reason.BUDGET_EXHAUSTED, "of 2 "),
    ],
)
def test_what_would_not_count_or_has_no_epsilon_is_never_charged(
    tmp_path: Path, event, reason: Reason, says: str
) -> None:
    ledger = Ledger(tmp_path / "l")
    for spend in (
        lambda: ledger.require_budget("d", event, PROMISE),
        lambda: ledger.charge(charge(event), PROMISE),
    ):
        with pytest.raises(Withheld, match=says) as caught:
            spend()
        assert caught.value.reason is reason
    assert ledger.head().seq == 0


def test_an_old_row_with_too_little_noise_is_read_as_infinite(tmp_path: Path) -> None:
    """And from then on nothing more is charged under a promise."""
    ledger = Ledger(tmp_path / "l")
    ledger.charge(charge(EVENT.model_copy(update={"noise_multiplier": 1e-5})), None)
    assert ledger.spent("d", PROMISE).epsilon == float("inf")
    with pytest.raises(Withheld):
        ledger.charge(charge(), PROMISE)


def test_a_refusal_names_all_that_an_epsilon_needs_beside_it(tmp_path: Path) -> None:
    with pytest.raises(Withheld) as caught:
        Ledger(tmp_path / "l").charge(charge(training(80, 0.5)), PATIENTS)
    for part in ("delta 1e-05", "unit patient", "adjacency add-or-remove", "(PLD)", "of 8"):
        assert part in str(caught.value)


def test_the_tighter_accountant_pays_for_more_rounds(tmp_path: Path) -> None:
    """Where the quick one says no, the ledger asks the other: it is as valid, and smaller."""
    ledger = Ledger(tmp_path / "l")
    quick = total({training(100): 8}, PATIENTS).epsilon
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, quick * 0.97, 1e-5)
    for _ in range(8):
        ledger.charge(charge(training(100)), promise)
    assert ledger.spent("d", promise, tight=True).epsilon <= promise.epsilon
    assert ledger.spent("d", promise).epsilon > promise.epsilon


def test_counts_follow_other_processes_and_a_file_that_was_put_back(tmp_path: Path) -> None:
    """Counting goes on where it stopped, and starts anew where that row is no longer there."""
    ledger, other = Ledger(tmp_path / "l"), Ledger(tmp_path / "l")
    ledger.charge(charge(), PROMISE)
    assert ledger.counted("d") == {EVENT: 1}
    other.charge(charge(), PROMISE)
    other.charge(charge(dataset="e"), PROMISE)
    assert ledger.counted("d") == {EVENT: 2}
    assert ledger.counted("e") == {EVENT: 1}
    with sqlite3.connect(tmp_path / "l") as db:
        db.execute("DELETE FROM event WHERE seq > 1")
    assert ledger.counted("d") == {EVENT: 1}
    assert ledger.counted("e") == {}


def test_a_check_reads_no_old_row_again(tmp_path: Path) -> None:
    """However long the ledger is: SQLite does as many steps at 5000 rows as at 50."""
    work: list[int] = []
    for rows in (50, 5000):
        ledger = Ledger(tmp_path / str(rows))
        with ledger._connection() as db:
            db.execute("BEGIN")
            for _ in range(rows):
                ledger_module._append(db, charge(training(1, noise_multiplier=50.0)))
            db.execute("COMMIT")
        ledger.counted("d")
        steps = [0]
        with ledger._connection() as db:

            def count(steps: list[int] = steps) -> int:
                steps[0] += 1
                return 0

            db.set_progress_handler(count, 1)
            ledger.require_budget("d", training(1, noise_multiplier=50.0), PATIENTS)
            db.set_progress_handler(None, 0)
        work.append(steps[0])
    assert work[1] <= work[0] + 5
    assert work[0] > 0


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


MIXED_SPENDER = """
import pathlib, sys
from sentinel.errors import Withheld
from sentinel.privacy import *
from sentinel.terms import Adjacency, Unit
path, name, z, steps = sys.argv[1:]
promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 1.2, 1e-5)
event = DpSgdEvent(unit="patient", adjacency="add-or-remove", noise_multiplier=float(z),
    sampling="poisson", sampling_rate=0.02, steps=int(steps), log_ratio=1e-6, mass=1e-25)
ledger = Ledger(pathlib.Path(path))
print("ready", flush=True)
sys.stdin.readline()
made = 0
try:
    while True:
        ledger.charge(Charge(0, "d", name * 64, f"{name}{made}", event, Head(0, "0" * 64)), promise)
        made += 1
except Withheld as refused:
    print(made, refused.reason.value, flush=True)
"""


def test_processes_of_several_policies_spend_exactly_what_the_budget_pays(tmp_path: Path) -> None:
    """Three at once, one with another event: the total stays within, and nothing is left."""
    shared = tmp_path / "shared"
    plans = [("a", "2", "90"), ("a", "2", "90"), ("b", "2.5", "100")]
    workers = [
        subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-c", MIXED_SPENDER, str(shared), *plan],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for plan in plans
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    answers = [worker.communicate("go\n", timeout=120)[0].split() for worker in workers]
    assert [answer[1] for answer in answers] == ["budget-exhausted"] * 3
    ledger = Ledger(shared)
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 1.2, 1e-5)
    assert sum(int(answer[0]) for answer in answers) == ledger.head().seq > 4
    assert ledger.spent("d", promise, tight=True).epsilon <= 1.2
    for _, z, steps in plans:
        with pytest.raises(Withheld):
            ledger.charge(charge(training(int(steps), float(z))), promise)


def test_a_charge_waits_for_the_disk_and_holds_the_ledger_while_it_checks(tmp_path: Path) -> None:
    """synchronous=FULL, and the lock is taken before the budget is read, not after."""
    ledger = Ledger(tmp_path / "l")
    with ledger._connection() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        statements: list[str] = []
        db.set_trace_callback(statements.append)
    ledger.charge(charge(), PROMISE, per_day=5)
    locked = statements[statements.index("BEGIN IMMEDIATE") :]
    order = [statement.split()[0] for statement in locked]
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


@pytest.mark.parametrize("change", ["event = replace(event, '20.0', '90.0')", "dataset = 'd2'"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_is_changed_while_the_ledger_is_open_ends_all_charges(
    tmp_path: Path, change: str, rows: int
) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path)
    for _ in range(rows):
        ledger.charge(charge(), PROMISE)
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE event SET {change} WHERE seq = {rows}")  # noqa: S608 - a test's own
    for _ in range(2):
        with pytest.raises(Withheld) as caught:
            ledger.charge(charge(), None)
        assert caught.value.reason is Reason.LEDGER_DAMAGED
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM event").fetchone() == (rows,)


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


def test_a_killed_process_leaves_every_charge_that_it_was_told_of(tmp_path: Path) -> None:
    """And at most one more: a charge is written whole, or not at all."""
    code = SPENDER.replace("        ledger.charge(", "        print(1, flush=True); ledger.charge(")
    code = code.replace("20.0)", "900.0)")
    written = 0
    for wait in (1, 7, 23):
        with subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-c", code, str(tmp_path / "l")], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            for _ in range(wait):
                worker.stdout.readline()
            worker.kill()
            begun = wait + len(worker.stdout.read().split())
        found = Ledger(tmp_path / "l").head().seq - written
        assert begun - 1 <= found <= begun
        written += found
