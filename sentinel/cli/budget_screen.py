"""What `sentinel budget` prints for people: figures in sentences, and their course as bars."""

from __future__ import annotations

import datetime as dt
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from sentinel.cli.console import console

_EIGHTHS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.-=+*%#"
_WIDTH, _NARROW = 40, 6  # cells of a bar
_KEY = 8  # hex digits of a digest that are shown


def print_account(report: dict[str, Any], *, named: bool) -> None:
    """Print what `budget show` found."""
    screen = console()
    screen.print(
        _datasets(report["datasets"]) if report["datasets"] else "Nothing was charged yet."
    )
    promise = report["promise"]
    if promise is None:
        for name, entry in report["datasets"].items():
            _print_spent(name, entry)
        screen.print(Text(_NO_PROMISE if named else _NO_POLICY))
        return
    _print_promise(promise)
    if not promise["curve"]:
        return
    screen.print(_curve(promise))
    screen.print(Text(f"By policy, each as if there were no others ({_asked(promise)}):"))
    screen.print(_policies(promise))
    if promise["by_round"]:
        quick = f"{_asked(promise)}, {promise['curve_accountant']}"
        screen.print(Text(f"By round, the total after each ({quick}):"))
        screen.print(_rounds(promise))


def print_forecast(report: dict[str, Any]) -> None:
    """Print what `budget forecast` found."""
    screen = console()
    promise, forecast = report["promise"], report["forecast"]
    if promise is None:
        screen.print(Text(_NO_PROMISE))
        return
    if not forecast["ledger_found"]:
        screen.print(Text(_NO_LEDGER))
    _print_promise(promise)
    screen.print(f"One round: {_event(forecast['event'])}.")
    left, more = forecast["rounds_left"], forecast["or_more"]
    if left == 0:
        screen.print("No round is left at this noise.", style="bold")
    else:
        screen.print(f"{left:,}{' or more' if more else ''} rounds are left at this noise.")
    asked, needed = forecast["rounds_asked"], forecast["noise_multiplier_needed"]
    if asked is None:
        return
    if needed is None:
        screen.print(f"No noise pays for {asked:,} more rounds: the budget is spent.", style="bold")
    else:
        screen.print(f"Noise multiplier {needed:g} pays for {asked:,} more rounds.")


_NO_POLICY = "For what is left of a promise, name a policy that has one: --policy FILE."
_NO_LEDGER = (
    "There is no ledger yet in this state folder, and no log: nothing counts as charged so far."
)
_NO_PROMISE = (
    "This policy promises nothing formal (it has no [privacy] table): there is no budget to spend, "
    "and none to forecast."
)


def _print_promise(promise: dict[str, Any]) -> None:
    screen = console()
    if promise["void"]:
        screen.print(
            "The lifetime promise is void: something was released outside it (without a promise, "
            "or under a finer unit). The epsilons below cover the rest alone.",
            style="bold",
        )
    screen.print(
        f"Promise for {promise['dataset']}: epsilon {promise['epsilon_spent']:.4g} of "
        f"{promise['epsilon']:g} is spent, {promise['epsilon_left']:.4g} left ({_terms(promise)}).",
        markup=False,
    )
    screen.print(_bar(promise["epsilon_spent"] / promise["epsilon"]))
    others = {
        name: epsilon
        for name, epsilon in promise["accountants"].items()
        if name != promise["accountant"]
    }
    for name, epsilon in others.items():
        screen.print(f"The other accountant, {name}, says {epsilon:.4g}; the smaller counts.")
    other = promise["other_adjacency"]
    screen.print(
        f"The same charges, asked another way: epsilon {other['epsilon_spent']:.4g} "
        f"({_terms(other)})."
    )
    if promise["slack_unknown"]:
        screen.print(
            f"Charges that do not say how far their noise was from ideal noise: "
            f"{promise['slack_unknown']:,}. That was counted as nothing."
        )


def _print_spent(name: str, entry: dict[str, Any]) -> None:
    """What a dataset's charges add up to, where nobody named a promise."""
    screen = console()
    for told in entry["spent"]:
        rest = "; void, something else was released outside it" if told["void"] else ""
        screen.print(
            Text(
                f"Spent on {name}: epsilon {told['epsilon_spent']:.4g} ({_terms(told)}){rest}.",
            )
        )
    if not entry["spent"]:
        screen.print(Text(f"Spent on {name}: nothing was promised to anybody, so no epsilon."))


def _terms(told: dict[str, Any]) -> str:
    """All that has to stand beside an epsilon."""
    return f"{_asked(told)}, {told['accountant']}"


def _asked(told: dict[str, Any]) -> str:
    """The same, but for the accountant."""
    claimed = f", {told['assurance']} (level {told['level']})" if told["assurance"] else ""
    return f"delta {told['delta']:g}, unit {told['unit']}, adjacency {told['adjacency']}{claimed}"


def _datasets(found: dict[str, Any]) -> Table:
    table = Table("dataset", "charges", "without a promise", "first", "last", box=SIMPLE)
    for name, entry in found.items():
        days = (_day(entry[at]) for at in ("first", "last"))
        table.add_row(Text(name), str(entry["charges"]), str(entry["unbounded"]), *days)
    return table


def _policies(promise: dict[str, Any]) -> Table:
    table = Table("policy", "charges", "epsilon alone", "accountant", box=SIMPLE)
    for name, entry in promise["by_policy"].items():
        table.add_row(
            name[:_KEY],
            str(entry["charges"]),
            "void" if entry["void"] else f"{entry['epsilon_alone']:.4g}",
            Text("" if entry["void"] else entry["accountant"]),
        )
    return table


def _rounds(promise: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("round", "day", "charged", "noise", "steps", "epsilon", ""):
        table.add_column(column, no_wrap=True)
    for entry in promise["by_round"]:
        event, epsilon = entry["event"], entry["epsilon_after"]
        table.add_row(
            entry["round"][:_KEY] if entry["number"] is None else str(entry["number"]),
            _day(entry["at"]),
            _kind(event),
            f"{event['noise_multiplier']:g}" if "noise_multiplier" in event else "",
            f"{event['steps']:,}" if "steps" in event else "",
            f"{epsilon:.4g}{', void' if entry['void'] else ''}",
            _bar(epsilon / promise["epsilon"], _NARROW),
        )
    return table


def _curve(promise: dict[str, Any]) -> Text:
    """Epsilon after the first charge, the last, and evenly between them."""
    heights = _levels()
    points = [
        heights[min(int(min(point["epsilon"] / promise["epsilon"], 1) * len(heights)), 7)]
        for point in promise["curve"]
    ]
    last = promise["curve"][-1]["charges"]
    return Text(
        f"Epsilon from charge 1 to {last:,}: {''.join(points)} (full height: the budget). Here and "
        f"by round it is that of the quick accountant, {promise['curve_accountant']}."
    )


def _bar(share: float, width: int = _WIDTH) -> Text:
    full = round(min(share, 1.0) * width)
    on, off = ("█", "░") if _unicode() else ("#", ".")
    return Text(f"{on * full}{off * (width - full)} {min(share, 9.99):.0%}")


def _levels() -> str:
    return _EIGHTHS if _unicode() else _PLAIN


def _unicode() -> bool:
    return console().encoding.lower().startswith("utf")


def _kind(event: dict[str, Any]) -> str:
    return "no promise" if event["kind"] == "unbounded" else f"{event['kind']} {event['unit']}"


def _event(event: dict[str, Any]) -> str:
    """What one more round costs, in words."""
    what = f"a {event['kind']} event per {event['unit']}, noise multiplier "
    what += f"{event['noise_multiplier']:g}"
    if event["kind"] != "dp-sgd":
        return what
    how = "Poisson-sampled" if event["sampling"] == "poisson" else "all of them, no sampling"
    return f"{what}, {event['steps']:,} steps at rate {event['sampling_rate']:g} ({how})"


def _day(at: int) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).date().isoformat()
