"""Edges of the account that its docstrings name, and that no other test is about."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from sentinel.errors import Withheld
from sentinel.privacy import (
    Charge,
    DpSgdEvent,
    GaussianEvent,
    Head,
    Ledger,
    Promise,
    UnboundedEvent,
    by_accountant,
    total,
    weigh,
)
from sentinel.privacy import ledger as ledger_module
from sentinel.privacy.accounting import EXACT
from sentinel.terms import GENESIS, Adjacency, Reason, Unit

if TYPE_CHECKING:
    from pathlib import Path

    from sentinel.privacy import PromisedEvent

PROMISE = Promise(Unit.SITE, Adjacency.REPLACE, epsilon=2.0, delta=1e-5)
PATIENTS = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, epsilon=2.0, delta=1e-5)


def site(noise_multiplier: float = 20.0) -> GaussianEvent:
    return GaussianEvent(
        unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=noise_multiplier
    )


def training(noise_multiplier: float = 1.5, unit: Unit = Unit.PATIENT) -> DpSgdEvent:
    return DpSgdEvent(
        unit=unit,
        adjacency=Adjacency.ADD_OR_REMOVE,
        noise_multiplier=noise_multiplier,
        sampling="poisson",
        sampling_rate=0.02,
        steps=10,
        log_ratio=0.0,
        mass=0.0,
    )


def charge(event: PromisedEvent | UnboundedEvent | None = None) -> Charge:
    return Charge(0, "d", "p" * 64, "r" * 64, event or site(), Head(0, GENESIS))


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("event", [site(), training()], ids=["gaussian", "sampled"])
def test_without_delta_no_epsilon_is_finite(event, *, tight: bool) -> None:
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 1.0, 0.0)
    assert total({event: 1}, promise, tight=tight).epsilon == math.inf


def test_nothing_charged_weighs_nothing() -> None:
    assert weigh({}, PROMISE).epsilon == 0.0
    assert by_accountant({}, PROMISE) == {EXACT: 0.0}


def test_without_sampling_only_the_exact_accountant_is_asked() -> None:
    assert by_accountant({site(): 3}, PROMISE) == {EXACT: total({site(): 3}, PROMISE).epsilon}


def test_every_accountant_says_infinity_of_too_little_noise() -> None:
    assert set(by_accountant({site(0.01): 1}, PROMISE).values()) == {math.inf}
    assert set(by_accountant({training(0.01): 1}, PATIENTS).values()) == {math.inf}


def test_what_says_nothing_of_the_unit_is_left_out() -> None:
    alone = by_accountant({site(): 1}, PROMISE)
    others = {training(): 1, UnboundedEvent(): 1}
    assert by_accountant({site(): 1, **others}, PROMISE) == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_no_event_has_noise_that_is_no_positive_number(bad: float) -> None:
    with pytest.raises(ValidationError):
        site(bad)
    with pytest.raises(ValidationError):
        training(bad)


def test_a_forked_child_charges_through_a_connection_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge(charge(), PROMISE)
    parents = ledger._db
    child = os.fork()
    if not child:
        try:
            head = ledger.charge(charge(), PROMISE)
            os._exit(0 if head.seq == 2 and ledger._db is not parents else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ledger.charge(charge(), PROMISE).seq == 3
    assert ledger.verify().seq == 3


def test_a_ledger_that_cannot_be_written_says_so_and_holds_what_it_held(tmp_path: Path) -> None:
    """Its folder is gone, and comes back."""
    folder, away = tmp_path / "site", tmp_path / "away"
    folder.mkdir()
    ledger = Ledger(folder / "l")
    head = ledger.charge(charge(), PROMISE)
    shutil.copytree(folder, away)
    shutil.rmtree(folder)
    for attempt in (ledger.head, ledger.verify, lambda: ledger.charge(charge(), PROMISE)):
        with pytest.raises(Withheld) as caught:
            attempt()
        assert caught.value.reason is Reason.STORAGE_FAILED
    away.rename(folder)
    assert ledger.head() == head


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (site(0.5), Reason.BUDGET_EXHAUSTED),
        (training(), Reason.PROMISE_NOT_KEPT),
        (UnboundedEvent(), Reason.PROMISE_NOT_KEPT),
    ],
    ids=["too much", "finer unit", "no promise"],
)
def test_asking_for_the_budget_raises_what_a_charge_would_and_writes_nothing(
    tmp_path: Path, event, reason: Reason
) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.require_budget("d", site(), PROMISE)
    for attempt in (
        lambda: ledger.require_budget("d", event, PROMISE),
        lambda: ledger.charge(charge(event), PROMISE),
    ):
        with pytest.raises(Withheld) as caught:
            attempt()
        assert caught.value.reason is reason
    assert ledger.head() == Head(0, GENESIS)


def test_asking_for_the_rate_raises_what_a_charge_would_and_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.require_rate("d", 0, 1)
    head = ledger.charge(charge(), PROMISE, per_day=1)
    for attempt in (
        lambda: ledger.require_rate("d", 0, 1),
        lambda: ledger.charge(charge(), PROMISE, per_day=1),
    ):
        with pytest.raises(Withheld) as caught:
            attempt()
        assert caught.value.reason is Reason.RATE_LIMITED
    ledger.require_rate("d", 0, None)
    assert ledger.head() == head


def test_an_event_that_is_not_known_stops_everything_though_its_chain_is_right(
    tmp_path: Path,
) -> None:
    """As a later version may have written it."""
    ledger = Ledger(tmp_path / "l")
    ledger.charge(charge(), PROMISE)
    with sqlite3.connect(tmp_path / "l") as db:
        row = list(db.execute("SELECT * FROM event").fetchone())
        row[5] = row[5].replace('"gaussian"', '"laplace"')
        digest = ledger_module._hash(GENESIS, tuple(row[:-1]))
        db.execute("UPDATE event SET event = ?, hash = ?", (row[5], digest))
    for attempt in (ledger.verify, ledger.rows, lambda: ledger.spent("d", PROMISE)):
        with pytest.raises(Withheld) as caught:
            attempt()
        assert caught.value.reason is Reason.LEDGER_DAMAGED
