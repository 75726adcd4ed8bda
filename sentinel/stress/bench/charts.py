"""Pictures of an evaluation, as SVG files that a browser and a Markdown page show alike."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from sentinel.stress.bench.figures import FPRS, caught, leaking, present, sound, threshold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sentinel.stress.bench.figures import Seen

WIDTH, HEIGHT, EDGE, SIDE = 640, 320, 52, 150  # in the picture's own units
INK, SOFT, LINE, PAPER = "#1c2530", "#5b6875", "#d9dfe5", "#ffffff"
COLOURS = ("#2f7d5b", "#b3413a", "#c58a1b", "#3a6fb3", "#7a4fa3", "#1c2530", "#2a9aa8")
BINS = 20
LEAST_FPR = 0.0003  # left end of the logarithmic axis


def curves_svg(seen: Seen) -> str:
    """Share of each family that is caught, against the share of honest rounds that are refused."""
    honest = [row.suspicion for row in sound(seen)]
    low, high = math.log10(LEAST_FPR), 0.0

    def across(fpr: float) -> float:
        return EDGE + (math.log10(max(fpr, LEAST_FPR)) - low) / (high - low) * _breadth()

    rates = [10 ** (low + (high - low) * step / 60) for step in range(61)]
    cuts = [threshold(honest, rate).cut for rate in rates]
    parts = [*_grid("share of the crafted models that leak and are caught")]
    parts += [_tick(across(fpr), f"{100 * fpr:g} %") for fpr in (*FPRS, 1.0)]
    parts.append(_below("honest rounds refused (logarithmic)"))
    for place, family in enumerate(present(seen)):
        scores = [row.suspicion for row in leaking(seen, family)]
        points = " ".join(
            f"{across(rate):.1f},{_up(caught(scores, cut).share):.1f}"
            for rate, cut in zip(rates, cuts, strict=True)
        )
        colour = COLOURS[place % len(COLOURS)]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(_key(place, colour, f"family {family} ({len(scores)})"))
    return _svg(parts, "Share caught against share of honest rounds refused, by family")


def spread_svg(seen: Seen) -> str:
    """How suspicion is spread over honest rounds and over crafted models that leak."""
    groups = [
        ("honest rounds", [row.suspicion for row in sound(seen)]),
        ("handcrafted", [row.suspicion for row in leaking(seen) if row.family != "F"]),
        ("learned", [row.suspicion for row in leaking(seen) if row.family == "F"]),
    ]
    parts = [*_grid("share of the group (square root)", root=True)]
    parts += [_tick(EDGE + tick / 5 * _breadth(), f"{tick / 5:g}") for tick in range(6)]
    parts.append(_below("suspicion"))
    threshold_at = EDGE + 0.5 * _breadth()
    parts.append(
        f'<line x1="{threshold_at}" x2="{threshold_at}" y1="{EDGE - 10}" y2="{HEIGHT - EDGE}" '
        f'stroke="{SOFT}" stroke-dasharray="4 3"/>'
    )
    for place, (name, scores) in enumerate(groups):
        parts += _bars(scores, place, len(groups))
        parts.append(_key(place, COLOURS[place], f"{name} ({len(scores)})"))
    return _svg(parts, "Distribution of suspicion over honest rounds and crafted models")


def scatter_svg(dots: Sequence[tuple[float, float]]) -> str:
    """Score upwards against measured leakage, both 0 to 1; on the diagonal the two agree."""
    parts = [*_grid("sensitivity score")]
    parts += [_tick(EDGE + tick / 5 * _breadth(), f"{tick / 5:g}") for tick in range(6)]
    parts.append(_below("measured leakage: share of the records that can be read"))
    right, top = EDGE + _breadth(), _up(1.0)
    parts.append(
        f'<line x1="{EDGE}" y1="{_up(0.0):.1f}" x2="{right:.1f}" y2="{top:.1f}" stroke="{SOFT}" '
        'stroke-dasharray="4 3"/>'
    )
    parts += [
        f'<circle cx="{EDGE + min(max(leak, 0.0), 1.0) * _breadth():.1f}" cy="{_up(score):.1f}" '
        f'r="3" fill="{COLOURS[0]}" fill-opacity="0.35"/>'
        for leak, score in dots
    ]
    parts.append(_key(0, COLOURS[0], f"one update ({len(dots)})"))
    return _svg(parts, "Sensitivity score against measured leakage")


def _bars(scores: Sequence[float], place: int, groups: int) -> Iterator[str]:
    if not scores:
        return
    counts = [0] * BINS
    for score in scores:
        counts[min(BINS - 1, int(score * BINS))] += 1
    wide = _breadth() / BINS / (groups + 0.5)
    for index, count in enumerate(counts):
        if count:
            x = EDGE + index * _breadth() / BINS + place * wide
            y = _up(math.sqrt(count / len(scores)))
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                f'height="{HEIGHT - EDGE - y:.1f}" fill="{COLOURS[place]}"/>'
            )


def _breadth() -> float:
    return WIDTH - EDGE - SIDE


def _up(share: float) -> float:
    return HEIGHT - EDGE - min(max(share, 0.0), 1.0) * (HEIGHT - 2 * EDGE)


def _grid(title: str, *, root: bool = False) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0) if not root else (0.0, 0.01, 0.1, 0.25, 0.5, 1.0):
        y = _up(math.sqrt(share) if root else share)
        yield (
            f'<line x1="{EDGE}" x2="{EDGE + _breadth()}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{LINE}"/><text x="{EDGE - 8}" y="{y + 4:.1f}" text-anchor="end" '
            f'fill="{SOFT}">{share:g}</text>'
        )
    yield f'<text x="{EDGE}" y="{EDGE - 22}" fill="{INK}">{escape(title)}</text>'


def _tick(x: float, label: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{HEIGHT - EDGE + 16}" text-anchor="middle" fill="{SOFT}">'
        f"{escape(label)}</text>"
    )


def _below(label: str) -> str:
    return (
        f'<text x="{EDGE + _breadth() / 2:.1f}" y="{HEIGHT - 12}" text-anchor="middle" '
        f'fill="{INK}">{escape(label)}</text>'
    )


def _key(place: int, colour: str, label: str) -> str:
    x, y = WIDTH - SIDE + 14, EDGE + 18 * place
    return (
        f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{x + 16}" y="{y}" fill="{INK}">{escape(label)}</text>'
    )


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="11">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>{"".join(parts)}</svg>\n'
    )
