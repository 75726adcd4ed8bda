"""The gallery: records beside what the attacker made of them, before and after the guard."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import torch

from sentinel.page.html import table
from sentinel.page.png import data_uri
from sentinel.stress.lab.redact import error_map, error_words
from sentinel.stress.lab.subject import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sentinel.stress.lab.finding import Exhibit
    from sentinel.stress.lab.result import Result, Row, Side

STYLE = """
.verdict { font-size: 1.15rem; border-left: .3rem solid currentColor; padding-left: .8rem; }
img.map { image-rendering: pixelated; }
"""
_NOTHING = "<span>-</span>"
_SHOWN = 6  # records side by side
_COLUMNS = 24  # values of a row that are shown


def before_after(result: Result, *, redacted: bool) -> str:
    """The same records rebuilt from raw updates and from what the guard left of them."""
    shown = "".join(_compared(result, row, redacted=redacted) for row in _telling(result))
    return f"<h3>Before and after</h3>{shown}" if shown else ""


def _compared(result: Result, row: Row, *, redacted: bool) -> str:
    assert row.raw.finding is not None  # noqa: S101 - `_telling` chooses by it
    other, words = _other(row)
    pairs = [(one, _same(other, one)) for one in row.raw.finding.exhibits]
    pairs = sorted(pairs, key=lambda pair: pair[1] is None)[:_SHOWN]  # those on both sides first
    if result.kind is Kind.IMAGE:
        drawn = _pictures(pairs, words, redacted=redacted)
    else:
        drawn = _rows(pairs[:3], words, redacted=redacted)
    return f"""<p>{escape(row.item.setting.words)}, attack <code>{escape(row.item.attack)}</code>.
Records behind these updates, those that the attacker hit best without a guard first.</p>{drawn}"""


def worst_record(result: Result, *, redacted: bool) -> str:
    """The record that was hit best in anything that the guard released."""
    found = [
        (row, row.policy.finding.worst)
        for row in result.rows
        if row.policy.finding is not None and row.policy.finding.worst is not None
    ]
    best = max(found, key=lambda one: one[1].score if one[1] else 0.0, default=None)
    if best is None or best[1] is None:
        return (
            "<h3>The worst record found</h3><p>None: nothing that was released could be shown "
            "beside a record.</p>"
        )
    row, exhibit = best
    pairs: list[tuple[Exhibit, Exhibit | None]] = [(exhibit, None)]
    if result.kind is Kind.IMAGE:
        drawn = _pictures(pairs, None, redacted=redacted, first="from the released update")
    else:
        drawn = _rows(pairs, None, redacted=redacted, first="guess, released update")
    return f"""<h3>The worst record found</h3>
<p>Of everything that the policy let out, this is the record that an attacker came closest to:
likeness {exhibit.score:.2f} of 1 ({escape(row.item.setting.words)}). A likeness alone is no leak:
a typical patient is like many.</p>{drawn}"""


def _telling(result: Result) -> list[Row]:
    """The rows to show: the strongest without the guard, and the strongest that left with it."""
    shown = [row for row in result.rows if row.raw.finding and row.raw.finding.exhibits]
    both = [row for row in shown if row.policy.finding or row.alone.finding]
    worth = {id(row): row.raw.finding.main.gain for row in shown if row.raw.finding}
    chosen = [max(group, key=lambda row: worth[id(row)]) for group in (shown, both) if group]
    return chosen[:1] if chosen and chosen[0] is chosen[-1] else chosen


def _other(row: Row) -> tuple[Side, str]:
    if row.policy.finding is not None:
        return row.policy, "from the released update"
    if row.alone.finding is not None:
        return row.alone, "had the guard been fooled"
    return row.policy, "with the guard: kept in"


def _same(side: Side, one: Exhibit) -> Exhibit | None:
    """The same record on another way, where it is exhibited there."""
    exhibits = () if side.finding is None else side.finding.exhibits
    key = (one.update, one.index)
    return next((other for other in exhibits if (other.update, other.index) == key), None)


def _pictures(
    pairs: Sequence[tuple[Exhibit, Exhibit | None]],
    second: str | None,
    *,
    redacted: bool,
    first: str = "from the raw update",
) -> str:
    lines: list[tuple[str, list[str]]] = []
    if redacted:
        lines.append((f"error map, {first}", [_map(error_map(one)) for one, _ in pairs]))
        if second is not None:
            maps = [_map(error_map(two)) if two is not None else _NOTHING for _, two in pairs]
            lines.append((f"error map, {second}", maps))
    else:
        lines.append(("records", [_picture(one.truth) for one, _ in pairs]))
        lines.append((first, [_picture(one.guess) for one, _ in pairs]))
        if second is not None:
            shown = [_picture(two.guess) if two is not None else _NOTHING for _, two in pairs]
            lines.append((second, shown))
    strips = "".join(
        f'<div class="strip"><span>{escape(label)}</span>{"".join(cells)}</div>'
        for label, cells in lines
    )
    note = (
        "<figcaption>Dark blocks are right, light ones wrong; each is the mean of a sixteenth of "
        "the picture.</figcaption>"
        if redacted
        else ""
    )
    return f'<figure class="wide">{strips}{note}</figure>'


def _rows(
    pairs: Sequence[tuple[Exhibit, Exhibit | None]],
    second: str | None,
    *,
    redacted: bool,
    first: str = "read without guard",
) -> str:
    return (
        '<div class="side">'
        + "".join(_row_table(one, two, first, second, redacted=redacted) for one, two in pairs)
        + "</div>"
    )


def _row_table(
    one: Exhibit, two: Exhibit | None, first: str, second: str | None, *, redacted: bool
) -> str:
    columns = min(_COLUMNS, one.truth.numel())
    parts = [] if redacted else [("record", _values(one.truth))]
    parts.append((first, error_words(one) if redacted else _values(one.guess)))
    if second is not None:
        none = ["-"] * columns
        shown = none if two is None else error_words(two) if redacted else _values(two.guess)
        parts.append((second, shown))
    rows = [(f"{at + 1}", *(cells[at] for _, cells in parts)) for at in range(columns)]
    place = "column" if one.truth.is_floating_point() else "word"
    head = (place, *(name for name, _ in parts))
    more = one.truth.numel() - columns
    note = f"<figcaption>{more} more {place}s.</figcaption>" if more else ""
    return f"<figure>{table(head, rows)}{note}</figure>"


def _values(values: Tensor) -> list[str]:
    if not values.is_floating_point():  # words
        return [str(value) for value in values.flatten().tolist()]
    return [f"{value:.2f}" for value in values.flatten().double().tolist()]


def _picture(picture: Tensor) -> str:
    return f'<img alt="picture" src="{data_uri(_grey(picture.mean(0)))}">'


def _map(blocks: Tensor) -> str:
    return f'<img class="map" alt="error map" src="{data_uri(_grey(blocks))}">'


def _grey(picture: Tensor) -> NDArray[np.uint8]:
    """[H, W] from 0 to 1, as bytes."""
    return picture.mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
