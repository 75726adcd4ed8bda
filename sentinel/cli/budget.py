"""`sentinel budget`: what was spent, what is left, and how far it goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import AsJson, SentinelGroup, StateDir, print_json, working

if TYPE_CHECKING:
    from pathlib import Path

    from sentinel.policy import Policy
    from sentinel.state import StateFolder

app = typer.Typer(
    cls=SentinelGroup, no_args_is_help=True, help="What was spent of the privacy budget."
)

USUAL_DELTA = 1e-6  # where neither a policy nor --delta says one
_KEPT = ("ledger.sqlite", "audit", "releases", "history")  # in a state folder that was in use


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
    delta: Annotated[
        float | None,
        typer.Option(
            help=f"Without --policy: at which delta to add up, {USUAL_DELTA:g} where left out."
        ),
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what was charged: by dataset, by policy and by round, and what is left of a promise."""
    from sentinel.cli.budget_report import account, spending

    rules = None if policy is None else _policy(policy)
    _require_one_question(rules, dataset, delta)
    state = _state(state_dir)
    at = USUAL_DELTA if delta is None else delta
    with working("Adding up"):
        promise = None if rules is None else account(state, rules, rounds)
        told = spending(state.ledger.rows(dataset), at, told=promise is None)
        report = {"datasets": told, "promise": promise}
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
    from sentinel.cli.budget_report import outlook

    rules = _policy(policy)
    state = None if _fresh(state_dir) else _state(state_dir)
    ledger = None if state is None else state.ledger
    with working("Composing rounds"):
        report = outlook(ledger, rules, rounds, steps, sampling_rate)
    if as_json:
        print_json(_json(report))
        return
    from sentinel.cli.budget_screen import print_forecast

    print_forecast(report)


def _state(state_dir: Path | None) -> StateFolder:
    from sentinel.gate import require_sound
    from sentinel.state import StateFolder

    state = StateFolder.existing(state_dir)
    require_sound(state)
    return state


def _fresh(state_dir: Path | None) -> bool:
    """Whether nothing was ever kept there: no ledger, and nothing that goes with one."""
    from sentinel.durable import storage
    from sentinel.state import default_folder

    folder = default_folder() if state_dir is None else state_dir
    with storage():
        found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    return found.isdisjoint(_KEPT)


def _json(value: Any) -> Any:  # noqa: ANN401 - any part of a report
    """The value without infinities, which JSON does not have: null stands for one."""
    if isinstance(value, dict):
        return {key: _json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _policy(name: str) -> Policy:
    from sentinel.policy import load_policy

    return load_policy(name).policy


def _require_one_question(rules: Policy | None, dataset: str | None, delta: float | None) -> None:
    """Refuse a dataset or a delta that is not the policy's, and a delta that is none."""
    from sentinel.errors import MisuseError

    if delta is not None and not 0 < delta < 1:
        raise MisuseError("--delta is a number above 0 and below 1, as in 1e-6.")
    if rules is None:
        return
    if dataset not in (None, rules.dataset):
        raise MisuseError(
            f"The policy's promise is about the dataset {rules.dataset!r}, and --dataset names "
            f"{dataset!r}: leave one of them out."
        )
    if delta is not None:
        raise MisuseError("A policy's promise has a delta of its own: leave out --delta.")
