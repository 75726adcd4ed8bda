"""What `sentinel budget` finds out, as plain values: the screen and JSON show the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sentinel.terms import Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sentinel.policy import Policy
    from sentinel.privacy import Ledger, Promise, PromisedEvent, Row, Spent, UnboundedEvent
    from sentinel.state import StateFolder

    Counted = Mapping[PromisedEvent | UnboundedEvent, int]

_POINTS = 40  # of the curve over all rounds


def spending(rows: list[Row], delta: float, *, told: bool) -> dict[str, Any]:
    """What was charged, by dataset.

    Args:
        rows: of the ledger, in order.
        delta: at which epsilon is told.
        told: also what it adds up to, for each unit and adjacency under which something was
            charged; it may take seconds.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row.dataset for row in rows):
        own = [row for row in rows if row.dataset == name]
        counted = Counter(row.event for row in own)
        found[name] = {
            "charges": len(own),
            "unbounded": sum(row.event.kind == "unbounded" for row in own),
            "first": own[0].at,
            "last": own[-1].at,
            "by_policy": dict(Counter(row.policy for row in own)),
            "spent": _by_unit(counted, delta) if told else None,
        }
    return found


def account(state: StateFolder, policy: Policy, rounds: int) -> dict[str, Any] | None:
    """What is spent and left of a policy's promise, by policy and by round; None without one."""
    from sentinel.house import promise_of

    promise = promise_of(policy)
    if promise is None:
        return None
    ledger = state.ledger
    rows = ledger.rows(policy.dataset)
    numbers = _numbers(state) if rounds else {}
    listed = set(range(max(0, len(rows) - rounds), len(rows)))
    spread = (
        {(len(rows) - 1) * point // (_POINTS - 1) for point in range(_POINTS)} if rows else set()
    )
    after = _after(rows, promise, listed | spread)
    curve = [{"charges": place + 1, "epsilon": after[place].epsilon} for place in sorted(spread)]
    return {
        **_summary(ledger.counted(policy.dataset), policy.dataset, promise),
        "curve_accountant": ledger.spent(policy.dataset, promise).accountant,
        "by_policy": _by_policy(rows, promise),
        "by_round": [_round(rows[place], after[place], numbers) for place in sorted(listed)],
        "curve": curve,
    }


def outlook(
    ledger: Ledger | None,
    policy: Policy,
    rounds: int | None,
    steps: int | None,
    sampling_rate: float | None,
) -> dict[str, Any]:
    """What is left of a policy's promise, and how many rounds it pays for.

    Args:
        ledger: None where there is none yet, so that nothing was charged.
        policy: whose promise is to be kept.
        rounds: how many more rounds are to be paid for; None where nobody asks.
        steps: private training steps of a round; None as in the last one.
        sampling_rate: None as the policy says, else as in the last round.
    """
    from sentinel.house import promise_of

    promise = promise_of(policy)
    if promise is None:
        return {"promise": None, "forecast": None}
    charged = [] if ledger is None else [row.event for row in ledger.rows(policy.dataset)]
    event = _next(policy, promise, charged, steps, sampling_rate)
    counted = Counter(charged)
    return {
        "promise": _summary(counted, policy.dataset, promise),
        "forecast": {"ledger_found": ledger is not None, **_left(counted, event, promise, rounds)},
    }


def _left(
    counted: Counted, event: PromisedEvent, promise: Promise, rounds: int | None
) -> dict[str, Any]:
    from sentinel.privacy.forecast import MANY_RELEASES, noise_multiplier_for, releases_left

    left = releases_left(counted, event, promise)
    needed = None if rounds is None else noise_multiplier_for(counted, event, promise, rounds)
    return {
        "event": event.model_dump(mode="json", exclude_none=True),
        "rounds_left": left,
        "or_more": left == MANY_RELEASES,
        "rounds_asked": rounds,
        "noise_multiplier_needed": needed,
    }


def _next(
    policy: Policy,
    promise: Promise,
    charged: list[PromisedEvent | UnboundedEvent],
    steps: int | None,
    sampling_rate: float | None,
) -> PromisedEvent:
    """What the next round costs; the rate is the policy's where nobody says another."""
    from sentinel.privacy.forecast import next_event

    privacy = policy.privacy
    assert privacy is not None  # noqa: S101 - a promise comes from it
    if sampling_rate is None and privacy.batch is not None and privacy.cohort is not None:
        sampling_rate = privacy.batch / privacy.cohort
    return next_event(promise, privacy.noise_multiplier, charged, steps, sampling_rate)


def _summary(counted: Counted, dataset: str, promise: Promise) -> dict[str, Any]:
    """What is spent and left, under the promise's adjacency and the other."""
    from sentinel.privacy import by_accountant, total

    spent = total(counted, promise, tight=True)
    other = total(counted, _other(promise), tight=True)
    return {
        "dataset": dataset,
        **_told(spent),
        "epsilon": promise.epsilon,
        "epsilon_left": max(0.0, promise.epsilon - spent.epsilon),
        "accountants": by_accountant(counted, promise),
        "other_adjacency": _told(other),
        "log_ratio": spent.slack.log_ratio,
        "mass": spent.slack.mass,
        "slack_unknown": spent.slack_unknown,
    }


def _told(spent: Spent) -> dict[str, Any]:
    """An epsilon with all that has to stand beside it."""
    return {
        "unit": spent.unit,
        "adjacency": spent.adjacency,
        "delta": spent.delta,
        "epsilon_spent": spent.epsilon,
        "accountant": spent.accountant,
        "void": spent.void,
        **_assurance(spent.unit),
    }


def _assurance(unit: Unit) -> dict[str, str | None]:
    """Who answers for the noise: per patient and record the training process claims it."""
    from sentinel.audit.records import LEVEL

    return {"assurance": None if unit is Unit.SITE else "claimed", "level": LEVEL}


def _other(promise: Promise) -> Promise:
    (other,) = set(Adjacency) - {promise.adjacency}
    return replace(promise, adjacency=other)


def _by_unit(counted: Counted, delta: float) -> list[dict[str, Any]]:
    """What the charges add up to, for each unit and adjacency under which one was made."""
    from sentinel.privacy import Promise, UnboundedEvent, total

    asked = {
        (event.unit, event.adjacency) for event in counted if not isinstance(event, UnboundedEvent)
    }
    return [
        _told(total(counted, Promise(unit, adjacency, math.inf, delta), tight=True))
        for unit, adjacency in sorted(asked)
    ]


def _after(rows: list[Row], promise: Promise, places: set[int]) -> dict[int, Spent]:
    """What was spent after the charges at `places`, by the quick accountant."""
    from sentinel.privacy import total

    counted: Counter[PromisedEvent | UnboundedEvent] = Counter()
    found = {}
    for place, row in enumerate(rows):
        counted[row.event] += 1
        if place in places:
            found[place] = total(counted, promise)
    return found


def _by_policy(rows: Iterable[Row], promise: Promise) -> dict[str, Any]:
    """What the charges under each policy would add up to if there were no others.

    One charge that the promise does not cover makes it infinite: the policy released something
    about which nothing is promised to this unit.
    """
    from sentinel.privacy import total

    events: dict[str, Counter[PromisedEvent | UnboundedEvent]] = {}
    for row in rows:
        events.setdefault(row.policy, Counter())[row.event] += 1
    found = {}
    for name, counted in events.items():
        alone = _told(total(counted, promise, tight=True))
        epsilon = alone.pop("epsilon_spent")
        found[name] = {
            **alone,
            "charges": counted.total(),
            "epsilon_alone": math.inf if alone["void"] else epsilon,
        }
    return found


def _numbers(state: StateFolder) -> dict[str, int]:
    """What the federation called each round that the audit log names, by the ledger's key."""
    from sentinel.audit import read_log
    from sentinel.audit.records import RoundOpened

    records = (entry.record for entry in read_log(state.audit, torn_end=True))
    return {one.round: one.number for one in records if isinstance(one, RoundOpened)}


def _round(row: Row, after: Spent, numbers: Mapping[str, int]) -> dict[str, Any]:
    return {
        "number": numbers.get(row.round),
        "round": row.round,
        "at": row.at,
        "policy": row.policy,
        "event": row.event.model_dump(mode="json", exclude_none=True),
        "epsilon_after": after.epsilon,
        "void": after.void,
    }
