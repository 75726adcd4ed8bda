"""Charts: curves of leakage against utility, as SVG inside the page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from sentinel.stress.lab.knobs import Knob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.stress.lab.result import Curves, Point

WIDTH, HEIGHT, EDGE = 560, 300, 52  # in the picture's own units

STYLE = """
svg.chart { max-width: 38rem; width: 100%; height: auto; font-size: 11px; }
svg.chart .axis { stroke: var(--soft); } svg.chart .grid { stroke: var(--line); }
svg.chart text { fill: var(--ink); } svg.chart .soft { fill: var(--soft); }
svg.chart .noise_ratio { fill: var(--good); stroke: var(--good); }
svg.chart .noise_multiplier { fill: var(--good); stroke: var(--good); stroke-dasharray: 4 3; }
svg.chart .keep { fill: var(--wait); stroke: var(--wait); }
svg.chart .max_norm { fill: var(--soft); stroke: var(--soft); }
svg.chart .own { fill: var(--ink); stroke: var(--ink); }
svg.chart .raw { fill: var(--bad); stroke: var(--bad); }
svg.chart polyline { fill: none; stroke-width: 1.5; opacity: .6; }
"""
_SHORT = {
    Knob.NOISE_RATIO: "noise",
    Knob.NOISE_MULTIPLIER: "noise per value",
    Knob.KEEP: "keep",
    Knob.MAX_NORM: "norm",
}


def curve_svg(curves: Curves) -> str:
    """Leakage upwards, utility to the right: the corner below on the right is where to be.

    Returns:
        One SVG element; empty where no point has both figures.
    """
    dots = [dot for dot in map(_dot, curves.points) if dot is not None]
    if curves.raw is not None and curves.utility is not None:
        dots.append((curves.utility.mean, curves.raw.mean, "raw", "no guard"))
    if not dots:
        return ""
    low = min(dot[0] for dot in dots)
    low, high = low - 0.02, max(max(dot[0] for dot in dots) + 0.02, low + 0.05)
    drawn = [_frame(low, high, curves.metric), *_lines(curves.points, low, high)]
    drawn += [_point(dot, low, high) for dot in dots]
    label = "Leakage against utility, one dot for each turn of a knob"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(drawn)}</svg>"
    )


def _dot(point: Point) -> tuple[float, float, str, str] | None:
    if point.leak is None or point.utility is None:
        return None
    knob = point.turn.knob
    if knob is None:
        return point.utility.mean, point.leak.mean, "own", "this policy"
    return point.utility.mean, point.leak.mean, knob.value, f"{_SHORT[knob]} {point.turn.value:g}"


def _across(value: float, low: float, high: float) -> float:
    return EDGE + (value - low) / (high - low) * (WIDTH - 2 * EDGE)


def _up(value: float) -> float:
    return HEIGHT - EDGE - min(max(value, 0.0), 1.0) * (HEIGHT - 2 * EDGE)


def _frame(low: float, high: float, metric: str) -> str:
    bottom, right = HEIGHT - EDGE, WIDTH - EDGE
    parts = [
        f'<line class="grid" x1="{EDGE}" x2="{right}" y1="{_up(y):.1f}" y2="{_up(y):.1f}"/>'
        f'<text class="soft" x="{EDGE - 8}" y="{_up(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        x = _across(value, low, high)
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{value:.2f}</text>"
        )
    parts.append(f'<line class="axis" x1="{EDGE}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"what the model learns ({escape(metric)}; right is better)</text>"
        f'<text x="{EDGE}" y="{EDGE - 20}">what the attacker gets (down is better)</text>'
    )
    return "".join(parts)


def _lines(points: Sequence[Point], low: float, high: float) -> list[str]:
    """One line through the turns of each knob, in the order of their values."""
    drawn = []
    for knob in Knob:
        own = sorted((p for p in points if p.turn.knob is knob), key=lambda p: p.turn.value)
        dots = [dot for dot in map(_dot, own) if dot is not None]
        path = " ".join(f"{_across(x, low, high):.1f},{_up(y):.1f}" for x, y, _, _ in dots)
        drawn.append(f'<polyline class="{knob.value}" points="{path}"/>')
    return drawn


def _point(dot: tuple[float, float, str, str], low: float, high: float) -> str:
    x, y, style, text = dot
    across, up = _across(x, low, high), _up(y)
    return (
        f'<circle class="{style}" cx="{across:.1f}" cy="{up:.1f}" r="4"/>'
        f'<text x="{across + 7:.1f}" y="{up - 5:.1f}">{escape(text)}</text>'
    )
