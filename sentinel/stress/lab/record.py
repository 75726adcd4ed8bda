"""The record: a test as figures, for a machine. No record of anybody, no name from data.

Format 1. Keys are only ever added; a change of meaning takes a new number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import sentinel
from sentinel.stress.lab import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.stress.lab.finding import Finding, Tally
    from sentinel.stress.lab.result import Curves, Result, Row, Side
    from sentinel.stress.lab.utility import Utility

SCHEMA = 1


def record(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, as JSON values.

    Guarantees:
        Figures, and the lab's own words; no input, label, guess or name out of the data.
    """
    return {
        "schema": SCHEMA,
        "sentinel": sentinel.__version__,
        "partial": any(result.partial for result in results),
        "subjects": [_subject(result) for result in results],
    }


def _subject(result: Result) -> dict[str, Any]:
    train, held_out, public = result.records
    return {
        "name": result.name,
        "kind": result.kind.value,
        "records": {"train": train, "held_out": held_out, "public": public},
        "parameters": result.parameters,
        "policy": {"name": result.policy, "digest": result.digest, "promise": result.promise},
        "verdict": words.verdict(result),
        "leaks": len(result.leaks),
        "confidence_each": result.confidence,
        "withheld_entirely": result.withheld_entirely,
        "inconclusive": result.inconclusive,
        "control_missed": result.blind,
        "partial": result.partial,
        "more_time_would_help": result.short,
        "interrupted": result.interrupted,
        "seconds": round(result.seconds, 1),
        "budget_seconds": result.budget,
        "attacks": [_row(result, row) for row in result.rows],
        "not_tried": not_tried(result),
        "never_tried": list(words.NEVER_TRIED),
        "curves": None if result.curves is None else _curves(result.curves),
    }


def not_tried(result: Result) -> list[dict[str, Any]]:
    """What was not tried, why, and whether more time would have it tried."""
    return [
        {"what": one.what, "why": one.why, "for_want_of_time": one.of_time}
        for one in result.skipped
    ]


def _row(result: Result, row: Row) -> dict[str, Any]:
    setting = row.item.setting
    return {
        "attack": row.item.attack,
        "server": setting.server,
        "stage": setting.stage.value,
        "records": setting.records,
        "epochs": setting.epochs,
        "lopsided": setting.lopsided,
        "updates_planned": row.item.updates,
        "updates_diverged": row.diverged,
        "partial": row.partial,
        "error": row.error,
        "error_kind": None if row.error is None else words.failure(row.error),
        "proves_nothing": row.proves_nothing,
        "shows_too_little": result.leaves_open(row),
        "raw": _side(row.raw),
        "released": _side(row.policy),
        "had_the_guard_been_fooled": _side(row.alone),
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "released": side.released,
        "kept_in": dict(side.kept),
        "control": None
        if side.finding is None or side.finding.control is None
        else tally_record(side.finding.control),
        "measures": [] if side.finding is None else _measures(side.finding),
    }


def _measures(finding: Finding) -> list[dict[str, Any]]:
    return [tally_record(tally) for tally in finding.tallies]


def tally_record(tally: Tally) -> dict[str, Any]:
    """One measure as figures."""
    found = tally.interval()
    return {
        "measure": tally.measure,
        "count": len(tally.values),
        "of": tally.of,
        "mean": _number(tally.mean),
        "beside": tally.beside,
        "yardstick": _number(tally.chance),
        "gain_95": [_number(found.low), _number(found.high)],
        "margin": tally.margin,
    }


def _curves(curves: Curves) -> dict[str, Any]:
    return {
        "attack": curves.item.attack,
        "setting": curves.item.setting.words,
        "planned": curves.planned,
        "without_guard": {
            "leak": None if curves.raw is None else tally_record(curves.raw),
            "utility": _utility(curves.utility),
        },
        "points": [
            {
                "knob": None if point.turn.knob is None else point.turn.knob.value,
                "value": None if point.turn.knob is None else point.turn.value,
                "leak": None if point.leak is None else tally_record(point.leak),
                "kept_in": point.kept,
                "utility": _utility(point.utility),
                "above_no_guard": [round(one, 6) for one in curves.gained(point)],
            }
            for point in curves.points
        ],
    }


def _utility(utility: Utility | None) -> dict[str, Any] | None:
    if utility is None:
        return None
    values = [round(value, 6) for value in utility.values]
    return {"metric": utility.metric, "mean": round(utility.mean, 6), "repeats": values}


def _number(value: float) -> float | None:
    """A figure as JSON has it: no NaN, no infinity."""
    return round(value, 6) if math.isfinite(value) else None
