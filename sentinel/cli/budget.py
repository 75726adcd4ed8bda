"""`sentinel budget`: what was spent, what is left, and how far it goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import AsJson, SentinelGroup, StateDir, print_json, working

if TYPE_CHECKING:
    from sentinel.policy import Policy
    from sentinel.privacy import Promise, Row, Spent
    from sentinel.state import StateFolder

app = typer.Typer(
    cls=SentinelGroup, no_args_is_help=True, help="What was spent of the privacy budget."
)

_POINTS = 40  # of the curve over all rounds


@app.callback()
def budget() -> None:
    """What was spent of the privacy budget."""


@app.command()
def show(
    policy: Annotated[
        str | None,
        typer.Option(help="A policy with a promise: also say what is spent and left of it."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="One dataset. All where left out; with --policy, the policy's."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="How many of the last rounds to list.")] = 10,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what was charged: by dataset, by policy and by round, and what is left of a promise."""
    from sentinel.errors import MisuseError

    state = _state(state_dir)
    rules = _policy(policy)
    if rules is not None and dataset not in (None, rules.dataset):
        raise MisuseError(
            f"The policy's promise is about the dataset {rules.dataset!r}, and --dataset names "
            f"{dataset!r}: leave one of them out."
        )
    rows = state.ledger.rows(dataset)
    with working("Adding up"):
        report = {
            "datasets": _datasets(rows),
            "promise": None if rules is None else _promise(state, rules, rounds),
        }
    if as_json:
        print_json(_json(report))
        return
    from sentinel.cli.budget_screen import print_account

    print_account(report, named=policy is not None)


@app.command()
def forecast(
    policy: Annotated[str, typer.Option(help="The policy whose promise is to be kept.")],
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Which noise pays for so many more rounds?"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Private training steps a round; else as in the last one."),
    ] = None,
    sampling_rate: Annotated[
        float | None,
        typer.Option(help="Share of patients or records drawn a step, above 0, 1 for all."),
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Say how many rounds are left at the policy's noise, and which noise would pay for more."""
    state = _state(state_dir)
    rules = _policy(policy)
    with working("Composing rounds"):
        report = {
            "promise": None if rules is None else _summary(state, rules),
            "forecast": None
            if rules is None
            else _forecast(state, rules, rounds, steps, sampling_rate),
        }
    if as_json:
        print_json(_json(report))
        return
    from sentinel.cli.budget_screen import print_forecast

    print_forecast(report)


def _state(state_dir: Any) -> StateFolder:  # noqa: ANN401 - typer reads StateDir, mypy sees Path
    from sentinel.gate import require_sound
    from sentinel.state import StateFolder

    state = StateFolder.existing(state_dir)
    require_sound(state)
    return state


def _json(value: Any) -> Any:  # noqa: ANN401 - any part of a report
    """The value without infinities, which JSON does not have: null stands for one."""
    if isinstance(value, dict):
        return {key: _json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _policy(name: str | None) -> Policy | None:
    from sentinel.policy import load_policy

    return None if name is None else load_policy(name).policy


def _datasets(rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        entry = found.setdefault(
            row.dataset, {"charges": 0, "unbounded": 0, "first": row.at, "by_policy": {}}
        )
        entry["charges"] += 1
        entry["unbounded"] += row.event.kind == "unbounded"
        entry["last"] = row.at
        entry["by_policy"][row.policy] = entry["by_policy"].get(row.policy, 0) + 1
    return found


def _summary(state: StateFolder, policy: Policy) -> dict[str, Any] | None:
    """What is spent and left, under the promise's adjacency and the other; null without one."""
    from sentinel.house import promise_of
    from sentinel.privacy import by_accountant

    promise = promise_of(policy)
    if promise is None:
        return None
    spent = state.ledger.spent(policy.dataset, promise, tight=True)
    other = state.ledger.spent(policy.dataset, _other(promise), tight=True)
    return {
        "dataset": policy.dataset,
        **_told(spent),
        "epsilon": promise.epsilon,
        "epsilon_left": max(0.0, promise.epsilon - spent.epsilon),
        "accountants": by_accountant(state.ledger.counted(policy.dataset), promise),
        "other_adjacency": _told(other),
        "log_ratio": spent.slack.log_ratio,
        "mass": spent.slack.mass,
        "slack_unknown": spent.slack_unknown,
        "void": spent.void,
    }


def _told(spent: Spent) -> dict[str, Any]:
    return {
        "unit": spent.unit,
        "adjacency": spent.adjacency,
        "delta": spent.delta,
        "epsilon_spent": spent.epsilon,
        "accountant": spent.accountant,
    }


def _other(promise: Promise) -> Promise:
    from dataclasses import replace

    from sentinel.terms import Adjacency

    (other,) = set(Adjacency) - {promise.adjacency}
    return replace(promise, adjacency=other)


def _promise(state: StateFolder, policy: Policy, rounds: int) -> dict[str, Any] | None:
    from sentinel.house import promise_of

    promise, summary = promise_of(policy), _summary(state, policy)
    if promise is None or summary is None:
        return None
    rows = state.ledger.rows(policy.dataset)
    listed = set(range(max(0, len(rows) - rounds), len(rows)))
    spread = (
        {(len(rows) - 1) * point // (_POINTS - 1) for point in range(_POINTS)} if rows else set()
    )
    after = _after(rows, promise, listed | spread)
    return {
        **summary,
        "curve_accountant": state.ledger.spent(policy.dataset, promise).accountant,
        "by_policy": _by_policy(rows, promise),
        "by_round": [_round(rows[place], after[place]) for place in sorted(listed)],
        "curve": [{"charges": place + 1, "epsilon": after[place]} for place in sorted(spread)],
    }


def _after(rows: list[Row], promise: Promise, places: set[int]) -> dict[int, float]:
    """Epsilon after the charges at `places`, by the quick accountant."""
    from sentinel.privacy import total

    counted: dict[Any, int] = {}
    found = {}
    for place, row in enumerate(rows):
        counted[row.event] = counted.get(row.event, 0) + 1
        if place in places:
            found[place] = total(counted, promise).epsilon
    return found


def _by_policy(rows: list[Row], promise: Promise) -> dict[str, Any]:
    """What the charges under each policy would add up to if there were no others."""
    from sentinel.privacy import total

    events: dict[str, dict[Any, int]] = {}
    for row in rows:
        counted = events.setdefault(row.policy, {})
        counted[row.event] = counted.get(row.event, 0) + 1
    return {
        name: {
            "charges": sum(counted.values()),
            "epsilon_alone": (alone := total(counted, promise, tight=True)).epsilon,
            "accountant": alone.accountant,
        }
        for name, counted in events.items()
    }


def _round(row: Row, epsilon: float) -> dict[str, Any]:
    event = row.event.model_dump(mode="json", exclude_none=True)
    return {
        "round": row.round,
        "at": row.at,
        "policy": row.policy,
        "event": event,
        "epsilon_after": epsilon,
    }


def _forecast(
    state: StateFolder,
    policy: Policy,
    rounds: int | None,
    steps: int | None,
    sampling_rate: float | None,
) -> dict[str, Any] | None:
    from sentinel.house import promise_of
    from sentinel.privacy.forecast import (
        MANY_RELEASES,
        next_event,
        noise_multiplier_for,
        releases_left,
    )

    promise = promise_of(policy)
    if promise is None or policy.privacy is None:
        return None
    charged = [row.event for row in state.ledger.rows(policy.dataset)]
    event = next_event(promise, policy.privacy.noise_multiplier, charged, steps, sampling_rate)
    counted = state.ledger.counted(policy.dataset)
    left = releases_left(counted, event, promise)
    needed = None if rounds is None else noise_multiplier_for(counted, event, promise, rounds)
    return {
        "event": event.model_dump(mode="json", exclude_none=True),
        "rounds_left": left,
        "or_more": left == MANY_RELEASES,
        "rounds_asked": rounds,
        "noise_multiplier_needed": needed,
    }
