"""`sentinel budget`: what was spent, and what is left."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sentinel.cli.console import AsJson, SentinelGroup, StateDir, console, print_json

if TYPE_CHECKING:
    from sentinel.policy import Policy
    from sentinel.privacy import Row
    from sentinel.state import StateFolder

app = typer.Typer(
    cls=SentinelGroup, no_args_is_help=True, help="What was spent of the privacy budget."
)


@app.callback()
def budget() -> None:
    """What was spent of the privacy budget."""


@app.command()
def show(
    policy: Annotated[
        str | None,
        typer.Option(help="A policy with a promise: also say what is spent and left of it."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="One dataset; all where left out.")] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the charges per dataset and, with a policy, what is spent and left of its promise."""
    from sentinel.gate import require_sound
    from sentinel.policy import load_policy
    from sentinel.state import StateFolder

    state = StateFolder.existing(state_dir)
    require_sound(state)
    rules = load_policy(policy).policy if policy is not None else None
    report = {
        "datasets": _datasets(state.ledger.rows(dataset)),
        "promise": None if rules is None else _promise(state, rules),
    }
    if as_json:
        print_json(report)
        return
    _print(report)


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


def _promise(state: StateFolder, policy: Policy) -> dict[str, Any] | None:
    from sentinel.house import promise_of

    promise = promise_of(policy)
    if promise is None:
        return None
    spent = state.ledger.spent(policy.dataset, promise)
    return {
        "dataset": policy.dataset,
        "unit": spent.unit,
        "adjacency": spent.adjacency,
        "delta": spent.delta,
        "epsilon": promise.epsilon,
        "epsilon_spent": spent.epsilon,
        "epsilon_left": max(0.0, promise.epsilon - spent.epsilon),
        "accountant": spent.accountant,
        "void": spent.void,
    }


def _print(report: dict[str, Any]) -> None:
    screen = console()
    table = Table("dataset", "charges", "without a promise", "first", "last")
    for name, entry in report["datasets"].items():
        days = (
            dt.datetime.fromtimestamp(entry[at], dt.UTC).date().isoformat()
            for at in ("first", "last")
        )
        table.add_row(name, str(entry["charges"]), str(entry["unbounded"]), *days)
    screen.print(table if report["datasets"] else "Nothing was charged yet.")
    promise = report["promise"]
    if promise is None:
        screen.print("No promise to compare with: name a policy that has one with --policy.")
        return
    screen.print(
        f"Promise for {promise['dataset']}: epsilon {promise['epsilon_spent']:.3g} of "
        f"{promise['epsilon']:.3g} is spent, {promise['epsilon_left']:.3g} left "
        f"(delta {promise['delta']:g}, unit {promise['unit']}, adjacency {promise['adjacency']}, "
        f"{promise['accountant']})."
    )
    if promise["void"]:
        screen.print(
            "The lifetime promise is void: something was released outside it (without a promise, "
            "or under a finer unit)."
        )
