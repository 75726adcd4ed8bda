"""Tables in cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.interval import Count, wilson

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def said(hits: int, trials: int) -> str:
    """Return "hits of trials (low to high %)", the Wilson interval at 95 %."""
    if trials == 0:
        return "none tried"
    interval = wilson(Count(hits, trials))
    return f"{hits} of {trials} ({100 * interval.low:.1f} to {100 * interval.high:.1f} %)"
