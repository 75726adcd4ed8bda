"""Gate: step 0 of a release, and what has to hold before anything else is believed."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from sentinel.errors import Withheld
from sentinel.house import event_of, promise_of
from sentinel.releases import Fate
from sentinel.terms import Reason, Unit

if TYPE_CHECKING:
    from sentinel.house import House
    from sentinel.policy import Policy
    from sentinel.privacy import DpSgdEvent, Event
    from sentinel.releases import Ending
    from sentinel.state import StateFolder


def gate(house: House, patients: int | None, least: DpSgdEvent | None = None) -> None:
    """Step 0: whatever can be said before the update is looked at.

    Args:
        house: policy and ledger.
        patients: how many stand behind the update, as the caller says.
        least: what one step of the round's private training costs; None where it has none.

    Raises:
        Withheld: the first that does not hold, in the order of the edges below.

    Guarantees:
        The update has no part in it. It charges and writes nothing: rate and budget are asked again
        by `Ledger.charge`, where they count.

    Edges:
        the last day of the policy (UTC):                 passes
        after it, or with the clock put back:             Withheld (POLICY_EXPIRED)
        `patients` left out where they count:             Withheld (PATIENTS_UNKNOWN)
        fewer `patients` than asked for:                  Withheld (TOO_FEW_PATIENTS)
        patients that the policy itself states:           those count, whatever `patients` is
        as many rounds as the day allows:                 Withheld (RATE_LIMITED)
        a promise per patient or record, without `least`: Withheld (PROMISE_NOT_KEPT)
        a budget that does not pay for the least:         Withheld (BUDGET_EXHAUSTED)
    """
    policy = house.rules
    if policy.expired(_today(house)):
        raise Withheld(
            Reason.POLICY_EXPIRED, f"The policy expired on {policy.expires}; install a newer one."
        )
    _require_patients(policy, patients)
    house.ledger.require_rate(policy.dataset, house.now(), policy.limits.rounds_per_day)
    promise = promise_of(policy)
    if promise is not None:
        house.ledger.require_budget(policy.dataset, _least(policy, least), promise)


def _least(policy: Policy, step: DpSgdEvent | None) -> Event:
    """The least that the round can cost."""
    if policy.privacy is None or policy.privacy.unit is Unit.SITE:
        return event_of(policy)
    if step is None:
        raise Withheld(
            Reason.PROMISE_NOT_KEPT,
            f"The policy promises privacy per {policy.privacy.unit}, which the training step has "
            "to keep, and this round has no private training: wrap model, optimizer and loader "
            "with guard.private(...) before it.",
        )
    return step


def _today(house: House) -> dt.date:
    """The day (UTC) by the clock, or by the last record where the clock was put back."""
    last = house.log.last()
    latest = max(house.now(), 0 if last is None else last.record.at)
    return dt.datetime.fromtimestamp(latest, dt.UTC).date()


def _require_patients(policy: Policy, patients: int | None) -> None:
    least = policy.limits.min_patients
    if least is None:
        return
    if policy.privacy is not None and policy.privacy.patients is not None:
        patients = policy.privacy.patients
    if patients is None:
        raise Withheld(
            Reason.PATIENTS_UNKNOWN,
            f"The policy asks for at least {least} patients behind an update, and the round does "
            "not say how many there are: guard.round(..., patients=...).",
        )
    if patients < least:
        raise Withheld(
            Reason.TOO_FEW_PATIENTS,
            f"The policy asks for at least {least} patients behind an update; fewer stand behind "
            "this one.",
        )


def require_open(ending: Ending, global_model: str) -> None:
    """Refuse a round that has ended, unless it was released and can be given again.

    Raises:
        Withheld: OTHER_GLOBAL_MODEL, or the reason for which the round was withheld.

    Guarantees:
        Only a round that was released, on this global model, and still has its bytes passes.

    Edges:
        another global model:      OTHER_GLOBAL_MODEL, whatever the fate was
        withheld:                  the reason of then
        withheld without a reason: ROUND_CLOSED
        pruned:                    ROUND_CLOSED
    """
    if ending.global_model != global_model:
        raise Withheld(
            Reason.OTHER_GLOBAL_MODEL,
            "This round number has ended already, with another global model. A new job needs a new "
            "run: Guard(..., run=...).",
        )
    if ending.fate is Fate.WITHHELD:
        raise Withheld(
            ending.reason or Reason.ROUND_CLOSED,
            "This round was withheld after its update was looked at; the answer stands.",
        )
    if ending.fate is Fate.PRUNED:
        raise Withheld(
            Reason.ROUND_CLOSED,
            "This round was released, and its bytes were removed since; it is not made again.",
        )


def require_sound(house: House | StateFolder) -> None:
    """Stop everything where ledger and log do not fit together: one was put back or cut short.

    Raises:
        Withheld: LOG_DAMAGED or LEDGER_BEHIND_LOG.

    Guarantees:
        What passes has the entry of the log that the ledger's last charge names, and the charge
        that the log's last record names, each by its hash.

    Edges:
        nothing was written yet:           passes
        a log that is cut short:           LOG_DAMAGED
        a log that is rewritten whole:     LOG_DAMAGED
        a ledger put back from a backup:   LEDGER_BEHIND_LOG
        both gone, and releases are there: LEDGER_BEHIND_LOG
        both put back to the same moment:  passes; only a head noted elsewhere tells
    """
    noted = house.ledger.last_log_head()
    last = house.log.last()
    if (0 if last is None else last.seq) < noted.seq:
        raise Withheld(
            Reason.LOG_DAMAGED,
            "The audit log is shorter than the ledger says: it was cut or replaced.",
        )
    if house.log.hash_at(noted.seq) != noted.hash:
        raise Withheld(Reason.LOG_DAMAGED, "The audit log is not the one that the ledger names.")
    if last is not None and house.ledger.hash_at(last.record.ledger_seq) != last.record.ledger_head:
        raise Withheld(
            Reason.LEDGER_BEHIND_LOG,
            "The ledger lacks charges that the audit log names: it was put back from a backup, or "
            "replaced. Put the newer one back; nothing is released until then.",
        )
    if last is None and house.releases.holds_any():
        raise Withheld(
            Reason.LEDGER_BEHIND_LOG,
            "Rounds were released from this folder, and its ledger and audit log are gone. Put "
            "them back; nothing is released until then.",
        )
