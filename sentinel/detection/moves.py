"""Moves: what a global model does from round to round that training does not make it do.

Rules over the history alone. A federation that moved calmly and then, in one round, moves far in
most of its layers was handed another model; a layer whose weights stand still while its thresholds
walk along them is scanned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.detection.rules import Finding, Kind, ramp
from sentinel.detection.trace import cosine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.detection.history import History, Places
    from sentinel.detection.weights import LayerStatistics

MOVES = 4  # moves that must have been seen before one can be called sudden
LEAST_PEAK = 0.004  # past move that is taken for granted: twice what a trace tells
SUDDEN_LOW, SUDDEN_HIGH = 15.0, 30.0  # times the largest past move; ten times the rate makes ten
FAR_LOW, FAR_HIGH = 0.3, 0.45  # share of its size that a layer moved; 4-bit rounding makes .15
SHRUNK = -0.03  # log10 of the size below which pruning may have been at work: of 70 % makes -.05
AGAIN = 0.98  # cosine of marks from which this is an earlier round again; rounding leaves .999
MOST = 0.6  # share of the layers that must have moved; one fresh layer of two is ordinary
STRANGE_LOW, STRANGE_HIGH = 0.5, 0.3  # cosine to the last round: chance between two models is .25
GROWN_LOW, GROWN_HIGH = 0.2, 0.1  # log10 of growth: noise or divergence that goes so far makes .3
WEAK = 0.25  # of a sudden move from where it was: noise of .05 on small weights looks the same
STILL = 0.02  # move of weights that stand still while their thresholds are changed
STEP_LOW, STEP_HIGH = 0.05, 0.15  # change of the median threshold, in row norms, in one round


def move_findings(indices: Sequence[int], history: History, now: Places) -> list[Finding]:
    """Return whether most layers moved suddenly and far, to where the model never was.

    Earlier rounds, a single fresh layer, pruning, rounding and ten times the learning rate pass.

    Args:
        indices: index of each layer.
        history: of the earlier rounds.
        now: where the layers stand.
    """
    moved = history.moved(now)
    living = [
        place
        for place, move in enumerate(moved)
        if move > 0.0 or history.peaks[place] > 0.0  # frozen layers say nothing
    ]
    if history.moves < MOVES or len(living) < 2:  # noqa: PLR2004  # one fresh layer is ordinary
        return []
    if any(cosine(now.mark, mark) > AGAIN for mark in history.marks):
        return []
    sudden = {place: _sudden(history, now, place, moved[place]) for place in living}
    strange = {place: min(sudden[place], _strange(history, now, place)) for place in living}
    for kind, strengths, weight in (
        (Kind.REPLACED, strange, 1.0),
        (Kind.RETRAINED, sudden, WEAK),
    ):
        common = sorted(strengths.values())[int((1.0 - MOST) * len(living))]
        if common > 0.0:
            worst = max(living, key=lambda place: (strengths[place], moved[place]))
            return [Finding(kind, indices[worst], weight * common)]
    return []


def _sudden(history: History, now: Places, place: int, move: float) -> float:
    """How far beyond its past a layer moved; a part of what it was is no move."""
    peak = max(history.peaks[place], LEAST_PEAK)
    if now.scales[place] - history.last.scales[place] < SHRUNK and _is_part(history, now, place):
        return 0.0
    return min(ramp(move / peak, SUDDEN_LOW, SUDDEN_HIGH), ramp(move, FAR_LOW, FAR_HIGH))


def _strange(history: History, now: Places, place: int) -> float:
    """How unlike the last round a layer of the same size is."""
    alike = abs(cosine(history.last.traces[place], now.traces[place]))
    grown = abs(now.scales[place] - history.last.scales[place])
    return min(ramp(alike, STRANGE_LOW, STRANGE_HIGH), ramp(grown, GROWN_LOW, GROWN_HIGH))


def _is_part(history: History, now: Places, place: int) -> bool:
    """Whether a layer may be what pruning leaves: its cosine is the share of the size it kept."""
    kept: float = 10.0 ** (now.scales[place] - history.last.scales[place])
    return abs(cosine(history.last.traces[place], now.traces[place]) - kept) < 0.35  # noqa: PLR2004  # by 16 numbers


def scan_findings(
    indices: Sequence[int],
    history: History,
    now: Places,
    statistics: Sequence[LayerStatistics],
) -> list[Finding]:
    """Return layers of parallel rows that stand still while their thresholds walk.

    Args:
        indices: index of each layer.
        history: of the earlier rounds.
        now: where the layers stand.
        statistics: of each layer; rows that training drew together move with their biases.
    """
    found, young = [], history.young()
    for place, move in enumerate(history.moved(now)):
        if place in young:  # its rows were one direction's as they grew from zero
            continue
        step = abs(now.offsets[place] - history.last.offsets[place])
        strength = ramp(statistics[place].parallel, 0.2, 0.4) * ramp(step, STEP_LOW, STEP_HIGH)
        if move < STILL and strength > 0.0:
            found.append(Finding(Kind.SCANNED, indices[place], strength))
    return found
