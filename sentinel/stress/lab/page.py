"""The page: a test as one HTML file, for an expert and for a security officer."""

from __future__ import annotations

import math
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING

from sentinel.interval import of_mean
from sentinel.page.html import document, table
from sentinel.stress.lab import words
from sentinel.stress.lab.charts import STYLE as CHART_STYLE
from sentinel.stress.lab.charts import curve_svg
from sentinel.stress.lab.gallery import STYLE as GALLERY_STYLE
from sentinel.stress.lab.gallery import before_after, worst_record
from sentinel.stress.lab.result import CONFIDENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.stress.lab.finding import Tally
    from sentinel.stress.lab.result import Curves, Point, Result, Row, Side

_INTRODUCTION = """<p>In federated learning a hospital never sends records. It sends an
<em>update</em>: the change that its records made to a shared model. This test plays the server that
receives updates and tries to get the records back. It does so twice: with the updates as they are,
and with what the guard lets out under the policy. The first says how strong the attack is; the
second what the policy is worth against it.</p>"""

_FIGURES = """<details><summary>How to read the figures</summary><p>Each figure stands beside what
somebody gets who knows nothing of the update: patients resemble one another, so that some guesses
fit by luck. Only the difference counts. <em>Read exactly</em> is a relative error under 1 %,
<em>closely</em> under 30 %. SSIM compares two pictures: 1 is identical. A <em>prior</em> is what
public pictures teach about all pictures of a kind. <em>n</em> counts appearances: all updates draw
on the same records of this site, so that one record may count several times. The 95 % intervals
take records as independent, and are wider where several comparisons are made
(Bonferroni).</p></details>"""


_LONG = 12  # lines from which a list is folded


def page(results: Sequence[Result], where: str, *, redacted: bool) -> str:
    """The report.

    Args:
        results: one for each subject.
        where: the folder that the report lies in, for the reader.
        redacted: put error maps in the place of records and of guesses at them.

    Guarantees:
        One file that needs nothing else: no script, no address. Redacted, it holds no value of a
        record and no guess at one.
    """
    body = [
        "<h1>What could the server rebuild?</h1>",
        _INTRODUCTION,
        _privacy_note(where, redacted=redacted),
        *(_subject(result, redacted=redacted) for result in results),
        _FIGURES,
    ]
    style = CHART_STYLE + GALLERY_STYLE
    return document("Gradient Sentinel: stress test", "\n".join(body), style=style)


def _privacy_note(where: str, *, redacted: bool) -> str:
    folder = f"<code>{escape(where)}</code>"
    if redacted:
        return (
            f'<p class="note">Redacted: this report ({folder}) shows how wrong the attacker was, '
            "block by block and value by value, and neither records nor guesses at them.</p>"
        )
    return (
        f'<p class="note"><strong>This report holds records of patients</strong> and lies in '
        f"{folder}, readable by its owner alone. It was sent nowhere. To show it to others, make "
        "it again with <code>--redact</code>.</p>"
    )


def _subject(result: Result, *, redacted: bool) -> str:
    unclear = result.inconclusive or result.withheld_entirely
    found = "bad" if result.leaks else "" if unclear else "good"
    said = "".join(f"<li>{escape(line)}</li>" for line in words.sentences(result))
    parts = [
        f"<h2>{escape(result.name)}: policy <code>{escape(result.policy)}</code></h2>",
        _partial(result),
        f'<p class="verdict {found}">{escape(words.verdict(result))}</p>',
        f"<ul>{said}</ul>",
        before_after(result, redacted=redacted),
        _figures(result),
        "" if result.curves is None else _curves(result.curves),
        worst_record(result, redacted=redacted),
        _what_was_tried(result),
        _what_was_not(result),
    ]
    return "\n".join(part for part in parts if part)


def _partial(result: Result) -> str:
    said = words.partial(result)
    return "" if said is None else f'<p class="note"><strong>{escape(said)}</strong></p>'


def _figures(result: Result) -> str:
    rows = [
        (
            _condition(result, at) if index == 0 else "",
            _measure(result, row, index),
            _cell(row.raw, index),
            _cell(row.policy, index, result.confidence),
            _cell(row.alone, index, result.confidence) if row.alone.updates else "-",
        )
        for at, row in enumerate(result.rows)
        for index in range(_measures(row))
    ]
    if (control := result.control) is not None:
        found = f"{_of(control)} ({control.chance:.2f}), n = {len(control.values)}"
        rows.append(("all of these without guard", control.measure, found, "-", "-"))
    head = (
        "condition",
        "measure",
        "without guard",
        "with the policy",
        "had the guard been fooled",
    )
    return f"""<h3>Every figure</h3>
<p>In brackets what somebody gets who knows nothing; for members, the share of others that were
called members, and .50 of each is chance. "From ... to ..." is the interval of the difference, at
95 % for all comparisons together: above what passes, it is a leak. "Had the guard been fooled" is
what would have left of an update that was kept in, with the inspection of models off and enough
patients named; the policy's other rules hold there as well.</p>{table(head, rows)}"""


def _condition(result: Result, at: int) -> str:
    """The condition of a row, told once for all rows that follow one another under it."""
    setting = result.rows[at].item.setting
    told = at > 0 and result.rows[at - 1].item.setting == setting
    return "" if told else setting.words


def _measures(row: Row) -> int:
    found = [side.finding for side in (row.raw, row.policy, row.alone) if side.finding is not None]
    return max((len(finding.tallies) for finding in found), default=1)


def _measure(result: Result, row: Row, index: int) -> str:
    shows = words.mark(result, row)
    mark = " (partial)" * row.partial + (f" ({shows}: {words.MARKS[shows]})" if shows else "")
    if row.error is not None:
        return f"{row.item.attack} failed: {words.failure(row.error)}"
    for side in (row.raw, row.policy, row.alone):
        if side.finding is not None:
            return side.finding.tallies[index].measure + mark
    return row.item.attack + mark


def _cell(side: Side, index: int, confidence: float | None = None) -> str:
    if side.finding is None:
        return words.outcome(side)
    tally = side.finding.tallies[index]
    kept = f"; {words.outcome(side)}" if side.kept else ""
    cut = "; cut short" if side.finding.cut else ""
    open_ = "" if confidence is None else f"; {_gain(tally, confidence)}"
    return f"{_of(tally)} ({tally.chance:.2f}), n = {len(tally.values)}{open_}{cut}{kept}"


def _gain(tally: Tally, confidence: float) -> str:
    """The interval of the gain, as far as a gain can go."""
    found = tally.interval(confidence)
    return f"from {max(-1.0, found.low):.2f} to {min(1.0, found.high):.2f}"


def _of(tally: Tally) -> str:
    return f"{tally.mean:.2f}" if math.isfinite(tally.mean) else "-"


def _curves(curves: Curves) -> str:
    rows = [
        (
            point.turn.words,
            _attacked(point),
            _learned(curves, point),
        )
        for point in curves.points
    ]
    if curves.raw is not None and curves.utility is not None:
        rows.insert(
            0,
            (
                "no guard",
                _leaked(curves.raw),
                f"{curves.utility.mean:.3f}",
            ),
        )
    where = escape(curves.item.setting.words)
    gets = "attacker gets (knowing nothing); 95 % of the gain"
    short = len(curves.points) < curves.planned
    more = f" {len(curves.points)} of {curves.planned} turns fitted into the time." if short else ""
    return f"""<h3>Protection against usefulness</h3>
<p>The same policy with one knob turned at a time, without its rules for special rounds. Upwards:
what the attack gets, with nothing but clip, noise and mask between ({where}). To the right: what a
federation of four parts of these records learns. Where to be is the corner below on the
right.{more}</p>
{curve_svg(curves)}
{table(("policy", gets, f"{curves.metric}; beside no guard"), rows)}"""


def _learned(curves: Curves, point: Point) -> str:
    """What the federation learned; a loss means something only beside the same one unguarded."""
    if point.utility is None:
        return "no time"
    gained = curves.gained(point)
    if len(gained) < 2:  # noqa: PLR2004 - one pair has no spread
        return f"{point.utility.mean:.3f}"
    found = of_mean(gained, confidence=CONFIDENCE)
    return (
        f"{point.utility.mean:.3f}; {fmean(gained):+.3f}, "
        f"from {found.low:+.3f} to {found.high:+.3f} in {len(gained)} pairs"
    )


def _attacked(point: Point) -> str:
    if point.leak is not None:
        return _leaked(point.leak)
    return "kept in" if point.kept else "no time"


def _leaked(tally: Tally) -> str:
    """One dot of the curve as figures; each turn by itself, so that nothing is shared out."""
    count = f"n = {len(tally.values)}"
    return f"{_of(tally)} ({tally.chance:.2f}), {count}; {_gain(tally, CONFIDENCE)}"


def _what_was_tried(result: Result) -> str:
    return f"""<h3>What was tried, and with what knowledge</h3>
{table(("attack", "looks for", "is given beforehand"), words.tried(result))}
{table(("server", "what it does"), words.servers_tried(result))}"""


def _what_was_not(result: Result) -> str:
    skipped = [(one.what, one.why) for one in result.skipped]
    never = "".join(f"<li>{escape(one)}</li>" for one in words.NEVER_TRIED)
    listed = table(("not tried", "why"), skipped) if skipped else ""
    if len(skipped) > _LONG:
        listed = f"<details><summary>{len(skipped)} more things</summary>{listed}</details>"
    return f"""<h3>What was not tried</h3>{listed}
<p>Never part of this test:</p><ul>{never}</ul>"""
