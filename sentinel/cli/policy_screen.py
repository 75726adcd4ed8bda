"""How `sentinel policy` looks: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sentinel.policy.explain import Explanation, Group
    from sentinel.policy.manifest import Manifest
    from sentinel.policy.store import LoadedPolicy
    from sentinel.terms import Evidence

    Report = dict[str, Any]

_STYLES = {"ok": "green", "error": "bold red", "warning": "yellow", "note": "dim"}
_MAX_NAMES = 6  # parameters named per group on the screen; --json names them all


def say(text: str, style: str | None = None) -> None:
    """Print one line as it is: no markup, no wrapping."""
    Console().print(harmless(text), style=style, markup=False, highlight=False, soft_wrap=True)


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table on a terminal, else one line per row, which tools can cut and search."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            say(" | ".join(row))
        return
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(Text(harmless(cell)) for cell in row))  # brackets are no markup
    console.print(shown)


def show_report(report: Report) -> None:
    """Print what became of one file."""
    cases = report.get("cases", [])
    count = f" ({len(cases)} cases)" if cases else ""
    word, style = ("ok", "ok") if report["ok"] else ("FAILED", "error")
    say(f"{report['source']}: {word}{count}", _STYLES[style])
    for case in cases:
        say(f"  {'ok    ' if case['ok'] else 'FAILED'}  {case['name']}")
        for problem in case["problems"]:
            say(f"          {problem}", _STYLES["error"])
    for finding in report["findings"]:
        show_finding(finding)


def show_finding(finding: Report) -> None:
    """Print one error, warning or note."""
    about = f'rule "{finding["rule"]}": ' if finding["rule"] else ""
    severity = finding["severity"]
    say(f"  {severity}: {about}{finding['message']}", _STYLES[severity])


def show_policy(loaded: LoadedPolicy) -> None:
    """Print a policy in plain sentences."""
    from sentinel.policy import words

    policy = loaded.policy
    say(f'Policy "{policy.name}" ({loaded.source}), for the data set "{policy.dataset}".', "bold")
    say(words.promise(policy))
    say(words.limits(policy))
    say("")
    say("The rules; where several apply, the strictest value of each knob wins:", "bold")
    for rule in policy.rules:
        say(f"  {rule.id}: {words.sentence(rule)}")
    say("")


def show_explanation(evidence: Evidence, explanation: Explanation) -> None:
    """Print what happens with the evidence, and which rule decided it."""
    from sentinel.policy import words

    state = "broken" if evidence.unhealthy else "healthy"
    say(
        f"With sensitivity score {evidence.sensitivity:g}, suspicion {evidence.suspicion:g}, "
        f"{100 * evidence.budget_spent:g} % of the budget spent and a {state} global model:",
        "bold",
    )
    say(f"  {words.outcome(explanation.action)}")
    rows = [_row(group) for group in explanation.groups]
    table(("parameters", "values", "what happens", "decided by"), rows)


def _row(group: Group) -> tuple[str, ...]:
    from sentinel.policy import words

    names = ", ".join(group.parameters[:_MAX_NAMES])
    more = len(group.parameters) - _MAX_NAMES
    what, by = [words.ACTIONS[group.action]], ["action: " + _deciders(group)]
    for knob, found in group.knobs.items():
        if knob != "action" and not group.action:
            what.append(f"{knob} {found.value:g}")
            by.append(f"{knob}: {', '.join(found.rules)}")
    return (
        names + (f" and {more} more" if more > 0 else ""),
        f"{group.coordinates:,}" if group.coordinates else "-",
        ", ".join(what),
        "; ".join(by),
    )


def _deciders(group: Group) -> str:
    """Name the rules behind an action; a parameter that no rule lets out is kept by that."""
    if "action" not in group.knobs:
        return "no rule without `when` lets it out" if group.rules else "no rule"
    return ", ".join(group.knobs["action"].rules)


def auto_lines(loaded: LoadedPolicy, given: Mapping[str, float]) -> Iterator[str]:
    """Say what `max_norm = "auto"` was taken to be."""
    for rule, limits in loaded.policy.autos.items():
        if rule in given:
            yield f'Rule "{rule}": max_norm = "auto" is taken to have come to {given[rule]:g}.'
        else:
            yield (
                f'Rule "{rule}": max_norm = "auto" is shown as in the first round, '
                f"{limits.start:g}; --auto-norm {rule}=NORM shows it at another."
            )


def noise_lines(explanation: Explanation) -> Iterator[str]:
    """Put the noise beside the clip."""
    noise = explanation.noise
    if noise is None:
        if any({"noise_ratio", "noise_multiplier"} <= set(one.knobs) for one in explanation.groups):
            yield (
                "Of noise_ratio and noise_multiplier the larger noise is added; which one that is "
                "depends on how many values the model has."
            )
        yield "Give --model FILE.safetensors to see the noise beside the clip for a real model."
        return
    if not noise.coordinates:
        yield "Nothing is released, so that there is no noise to compare."
        return
    if noise.trained:
        yield "The noise of the promise is in the update already, from every step of the training."
        if not noise.norm:
            return
    if not math.isfinite(noise.clip):
        yield f"Expected norm of the noise: {noise.norm:.3g}. No bound on the update's norm."
        return
    yield (
        f"Expected norm of the noise: {noise.norm:.3g}; bound on the update's norm: "
        f"{noise.clip:.3g}. The noise is at least {noise.ratio:.3g} times the signal, over "
        f"{noise.coordinates:,} values; on each of them {noise.multiplier:.3g} times."
    )
    if not noise.norm:
        yield "WARNING: no noise is added."
    if noise.drowns:
        yield (
            "WARNING: the noise drowns the update. Four sites were measured to learn, at a loss of "
            "2 to 3 points, under noise of up to 65 times the signal, and on each value once the "
            "signal. Averaging over more sites makes it smaller; try your own data first: sentinel "
            "stress."
        )


def left_aside(loaded: LoadedPolicy, manifest: Manifest | None) -> Iterator[str]:
    """Say what of the model is no parameter, and so is not in the table."""
    if manifest is None:
        return
    if manifest.statistics and loaded.policy.limits.statistics == "withhold":
        yield (
            f"{len(manifest.statistics)} running statistics of normalisation layers stay: the "
            "global model's own values go back."
        )
    if manifest.others:
        yield f"{len(manifest.others)} entries that are not decimal numbers stay in the same way."


def harmless(text: str) -> str:
    """Replace control characters: a server names the parameters, and could steer a terminal."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "\ufffd" for mark in text)
