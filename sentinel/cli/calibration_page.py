"""The page of `sentinel detectors drift`: how the bets against a calibration went, as a picture."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from sentinel.detection import conformal
from sentinel.page.html import document, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sentinel.calibration import Drift

WIDTH, HEIGHT, EDGE = 560, 260, 48  # in the picture's own units
MOST_POINTS = 400  # of one line; more than that nobody sees

STYLE = """
svg.chart { max-width: 38rem; width: 100%; height: auto; font-size: 11px; }
svg.chart .axis { stroke: var(--soft); } svg.chart text { fill: var(--soft); }
svg.chart .level { stroke: var(--bad); stroke-dasharray: 4 3; }
svg.chart polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; }
"""
_INTRODUCTION = """<h1>Drift since the calibration</h1>
<p class="lead">Capital of bets that the rounds stopped looking like those of the calibration, on a
logarithmic scale. If they still look alike, it reaches 20 with probability at most 1 in 20, and 100
with at most 1 in 100, however long one watches.</p>"""


def drift_page(drifts: Sequence[Drift], report: Mapping[str, Any]) -> str:
    """One page: a sentence and a picture for each score, and the figures."""
    parts = [_INTRODUCTION]
    for drift, entry in zip(drifts, report["scores"], strict=True):
        parts += [
            f"<h2>{escape(entry['score'].capitalize())}</h2>",
            f"<p>{escape(entry['sentence'])}</p>",
            capital_svg(drift.paths),
        ]
    head = ("score", "rounds", "above the threshold", "capital", "highest")
    rows = [
        (
            entry["score"],
            str(entry["rounds"]),
            str(entry["alarms"]),
            f"{entry['capital']:.3g}",
            f"{entry['highest']:.3g}",
        )
        for entry in report["scores"]
    ]
    return document(
        "Drift since the calibration", "\n".join([*parts, table(head, rows)]), style=STYLE
    )


def capital_svg(paths: Sequence[conformal.Path]) -> str:
    """The capital after each round, to the right; one SVG element, empty without a round."""
    if len(paths) < 2:  # noqa: PLR2004 - a line takes two points
        return ""
    logs = [path.log_value for path in paths]
    low = min(*logs, math.log(0.1))
    high = max(*logs, math.log(2 * conformal.ALARM))

    def up(log: float) -> float:
        return HEIGHT - EDGE - (log - low) / (high - low) * (HEIGHT - 2 * EDGE)

    def across(place: int) -> float:
        return EDGE + place / (len(logs) - 1) * (WIDTH - 2 * EDGE)

    step = -(-len(logs) // MOST_POINTS)
    places = sorted({*range(0, len(logs), step), len(logs) - 1})
    line = " ".join(f"{across(place):.1f},{up(logs[place]):.1f}" for place in places)
    levels = "".join(
        f'<line class="{style}" x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{up(math.log(at)):.1f}" '
        f'y2="{up(math.log(at)):.1f}"/><text x="{EDGE - 6}" y="{up(math.log(at)) + 4:.1f}" '
        f'text-anchor="end">{at:g}</text>'
        for at, style in ((1.0, "axis"), (conformal.WARNING, "level"), (conformal.ALARM, "level"))
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Capital of the bets after each round">{levels}<polyline points="{line}"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        f"rounds since the calibration (0 to {len(logs) - 1})</text></svg>"
    )
