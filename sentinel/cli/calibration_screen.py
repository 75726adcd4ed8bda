"""What `sentinel detectors calibrate` and `drift` tell: one report, in JSON or in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from sentinel.calibration import advise
from sentinel.cli.console import console
from sentinel.detection import conformal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sentinel.calibration import Advice, Calibration, Drift, Gathered, Kept, Which
    from sentinel.policy import Policy

_WITHIN_EXP = 690.0  # natural logarithms beyond it are no float64
_KEY = 12  # hex digits of a digest that are shown


def calibration_report(
    calibration: Calibration | None,
    gathered: Mapping[Which, Gathered],
    alpha: float,
    policy: Policy,
    room: float,
) -> dict[str, Any]:
    """What a calibration came to, one entry for each score."""
    kept = {} if calibration is None else {one.which: one for one in calibration.kept}
    scores = [
        _score(which, found, kept.get(which)) | _advised(kept.get(which), policy, room)
        for which, found in gathered.items()
    ]
    return {
        "alpha": alpha,
        "rounds_needed": conformal.rounds_needed(alpha),
        "confidence": conformal.CONFIDENCE,
        "dataset": policy.dataset,
        "scores": scores,
    }


def _score(which: Which, found: Gathered, kept: Kept | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "score": which.value,
        "rounds": len(found.rounds),
        "stopped": found.stopped,
        "blind": found.blind,
        "left_out": _left_out(found),
        "calibrated": kept is not None,
    }
    if kept is None:
        return entry
    return entry | {
        "bundle": kept.bundle,
        "source": kept.source,
        "threshold": kept.threshold,
        "rank": kept.found.rank,
        "rate_expected": kept.expected,
        "rate_confident": kept.confident,
        "order_capital": _capital(kept.order),
        "order_holds": kept.order < math.log(conformal.WARNING),
    }


def _advised(kept: Kept | None, policy: Policy, room: float) -> dict[str, Any]:
    if kept is None:
        return {}
    advice = advise(kept.which, kept.scores, kept.found, policy, room=room)
    return {
        "standing": _standing(advice),
        "least_threshold": min(advice.least, 1.0),
        "rule_threshold": advice.at if advice.rule else None,
        "rule": advice.rule,
    }


def _standing(advice: Advice) -> dict[str, Any]:
    return {
        "threshold": advice.standing,
        "alarms": advice.rate.alarms,
        "rate_expected": advice.rate.expected,
        "rate_confident": advice.rate.confident,
        "exceeded": advice.exceeded,
    }


def _left_out(found: Gathered) -> dict[str, int]:
    return {
        "other_bundle": found.other_bundle,
        "unhealthy_model": found.unhealthy,
        "raw_under_a_promise": found.raw,
    }


def _capital(log: float) -> float:
    return math.exp(min(log, _WITHIN_EXP))


def print_calibration(report: Mapping[str, Any]) -> None:
    """Print what `detectors calibrate` found."""
    screen = console()
    _print_policy(report)
    if any(entry["calibrated"] for entry in report["scores"]):
        screen.print(_table(report))
    for entry in report["scores"]:
        for sentence in _sentences(entry, report):
            screen.print(Text(sentence), soft_wrap=True)
    rules = [entry["rule"] for entry in report["scores"] if entry.get("rule")]
    if rules:
        screen.print(Text(_RULES), soft_wrap=True)
        for rule in rules:
            screen.print(Text("\n" + rule), soft_wrap=True)


def _print_policy(report: Mapping[str, Any]) -> None:
    if not report["policy_in_force"]:
        console().print(
            "Note: the guard that started last runs another policy file than the one named.",
            soft_wrap=True,
        )


_RULES = (
    "A rule with `when` only tightens. To put these thresholds in force, add this to the "
    "policy file (the rules that it outdoes may stay; `sentinel policy check` names them):"
)


def _table(report: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE)
    sure = f"{report['confidence']:.0%} sure"
    heads = ("score", "rounds", "alarm above", "rate at most", sure, "now at", "alarms")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=not place)
    for entry in report["scores"]:
        if entry["calibrated"]:
            standing = entry["standing"]
            table.add_row(
                entry["score"],
                str(entry["rounds"]),
                f"{entry['threshold']:.4f}",
                f"{entry['rate_expected']:.2%}",
                f"{entry['rate_confident']:.2%}",
                f"{standing['threshold']:g}",
                f"{standing['alarms']} of {entry['rounds']}",
            )
    return table


def _sentences(entry: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    name, rounds = entry["score"].capitalize(), entry["rounds"]
    yield from _passed_over(name, entry["left_out"])
    if not entry["calibrated"]:
        yield (
            f"{name}: not calibrated. A rate of {report['alpha']:g} takes at least "
            f"{report['rounds_needed']} rounds, and there are {rounds}."
        )
        return
    yield (
        f"{name}: an alarm above {entry['threshold']:.4f} meets a new round with probability at "
        f"most {entry['rate_expected']:.2%}, as long as it is exchangeable with these {rounds}."
    )
    if not entry["order_holds"]:
        yield (
            f"{name}: the rounds do not look exchangeable even among themselves (bets against "
            f"their order reached {_figure(entry['order_capital'])}; exchangeable rounds reach 20 "
            "at most once in 20 sites), so the rate is not guaranteed. Calibrate on rounds of one "
            "model and one stage of training, for instance with --newest."
        )
    if entry["stopped"]:
        yield (
            f"{name}: {entry['stopped']} of these rounds were stopped for their score and count as "
            "ordinary. If one was an attack, the threshold is higher than it need be."
        )
    if entry["blind"]:
        yield f"{name}: {entry['blind']} of these updates were scored blind; see docs/detectors.md."
    yield _meaning(name, entry, report["alpha"])


def _passed_over(name: str, left_out: Mapping[str, int]) -> Iterator[str]:
    because = {
        "other_bundle": "another version of the detector scored them",
        "unhealthy_model": "the model was broken",
        "raw_under_a_promise": "they were scored raw, and the dataset is under a promise",
    }
    for reason, count in left_out.items():
        if count:
            yield f"{name}: rounds left out, since {because[reason]}: {count}."


def _meaning(name: str, entry: Mapping[str, Any], alpha: float) -> str:
    """What it means for the threshold that stands."""
    standing, rounds = entry["standing"], entry["rounds"]
    at, alarms = standing["threshold"], standing["alarms"]
    least = entry["least_threshold"]
    if standing["exceeded"]:
        return _exceeded(name, entry, alpha)
    if least == at:
        return f"{name}: the threshold that stands, {at:g}, keeps that rate; leave it."
    advised = (
        f"the rule below is at {entry['rule_threshold']:.4f}, with room for slow trends (--room)"
        if entry["rule"]
        else "with the room that was asked for (--room) no rule is below what stands; leave it"
    )
    return (
        f"{name}: any threshold from {least:.4f} to {at:g} keeps that rate; at {at:g} the policy "
        f"alarmed in at most {alarms} of these {rounds} rounds; {advised}."
    )


def _exceeded(name: str, entry: Mapping[str, Any], alpha: float) -> str:
    standing, rounds = entry["standing"], entry["rounds"]
    at, alarms = standing["threshold"], standing["alarms"]
    return (
        f"{name}: the threshold that stands, {at:g}, alarms in up to {alarms} of these {rounds} "
        f"rounds ({alarms / rounds:.1%}; with 95 % confidence at most "
        f"{standing['rate_confident']:.1%}), and {alpha:.2%} was asked for. No looser one is "
        "advised: a calibration may only tighten. Either these rounds do reveal that much (few "
        "records, few local steps, columns that nobody scaled), or the detector does not fit this "
        "model. The security team decides; docs/detectors.md says what lowers the scores."
    )


def _figure(capital: float) -> str:
    return f"{capital:,.0f}" if capital < 1e6 else f"{capital:.0e}"  # noqa: PLR2004 - readable


def drift_report(
    found: Sequence[tuple[Kept, Gathered, Drift]], current: Mapping[Which, str]
) -> dict[str, Any]:
    """How the rounds since a calibration stand to it, one entry for each score."""
    entries = [_drift(kept, since, drift, current[kept.which]) for kept, since, drift in found]
    return {"scores": [entry | {"sentence": _told(entry)} for entry in entries]}


def _drift(kept: Kept, since: Gathered, drift: Drift, bundle: str) -> dict[str, Any]:
    last = drift.last
    warned, alarmed = last.reached(conformal.WARNING), last.reached(conformal.ALARM)
    return {
        "score": kept.which.value,
        "rounds": drift.rounds,
        "calibration_rounds": len(kept.scores),
        "capital": _capital(last.log_value),
        "highest": _capital(last.log_highest),
        "way": last.way if warned else None,
        "level": "1 in 100" if alarmed else "1 in 20" if warned else None,
        "alarms": drift.alarms,
        "rate_expected": kept.expected,
        "replaced": bundle != kept.bundle,
        "bundle": kept.bundle,
        "bundle_now": bundle,
        "left_out": _left_out(since),
    }


def spoiled(report: Mapping[str, Any]) -> bool:
    """Whether any score has to be calibrated again."""
    return any(entry["replaced"] or entry["level"] == "1 in 100" for entry in report["scores"])


def print_drift(report: Mapping[str, Any]) -> None:
    """Print what `detectors drift` found: a line for each score."""
    screen = console()
    _print_policy(report)
    for entry in report["scores"]:
        screen.print(Text(entry["sentence"]), soft_wrap=True)


def _told(entry: Mapping[str, Any]) -> str:
    name, rounds = entry["score"].capitalize(), entry["rounds"]
    if entry["replaced"]:
        return (
            f"{name}: the detector was replaced since the calibration "
            f"({entry['bundle'][:_KEY]}, now {entry['bundle_now'][:_KEY]}), and scores on another "
            "scale. Calibrate again, once there are rounds enough."
        )
    if not rounds:
        return f"{name}: no round since the calibration."
    seen = (
        f"{rounds} rounds since the calibration, {entry['alarms']} above its threshold; bets "
        f"against the calibration stand at {entry['capital']:.2g} and reached "
        f"{_figure(entry['highest'])}"
    )
    if entry["level"] is None:
        return f"{name}: {seen}. Nothing says that the calibration stopped describing these rounds."
    how = f"the new rounds score {entry['way']}"
    if entry["level"] == "1 in 20":
        return (
            f"{name}: {seen}: the calibration may no longer describe these rounds ({how}; this "
            "comes about by chance at no more than 1 site in 20, ever). Watch it."
        )
    return (
        f"{name}: {seen}: the calibration no longer describes these rounds ({how}; this comes "
        "about by chance at no more than 1 site in 100, ever). Its rate is void: find out what "
        "changed, then calibrate again on rounds since then."
    )
