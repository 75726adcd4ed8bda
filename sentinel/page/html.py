"""HTML: the look of every report, and its tables; no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STYLE = """
:root { --ink: #1c2530; --soft: #5b6875; --line: #d9dfe5; --good: #2f7d5b; --bad: #b3413a;
  --wait: #c58a1b; --paper: #fff; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #34404c;
  --good: #5cb98c; --bad: #e0736b; --wait: #dcae4f; --paper: #12181f; --tint: #1b232c; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 3rem; }
p.lead, figcaption, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { min-width: 11rem; }
th { font-weight: 600; } td.n, th.n { text-align: right; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { width: 6.2rem; image-rendering: auto; display: block; }
.wide { overflow-x: auto; }
.strip { display: grid; grid-template-columns: 9rem; grid-auto-flow: column;
  grid-auto-columns: 6.2rem; gap: .4rem; align-items: center; width: max-content; }
.strip > span { position: sticky; left: 0; background: var(--paper); }
.cells { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(.95rem, 1fr); gap: 3px; }
.mark { font-size: .7rem; line-height: 1.15rem; font-weight: 600; text-align: center;
  border-radius: 2px; color: var(--paper); background: var(--good); }
.mark.refused { background: var(--bad); }
.mark.withheld { background: var(--wait); color: #1c2530; }
p .mark { display: inline-block; width: 1.15rem; }
.rounds { display: grid; grid-template-columns: 8rem 1fr; gap: .35rem .8rem; align-items: center;
  overflow-x: auto; }
details { margin: 1rem 0; } summary { cursor: pointer; } details table { font-size: .85rem; }
details td.n, details th.n { text-align: left; vertical-align: top; min-width: 11rem; }
details th:first-child, details td:first-child { min-width: 3rem; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem;
  font-size: .85rem; } .side td, .side th { padding: .15rem .4rem; }
.side th:first-child, .side td:first-child { min-width: 4rem; }
.note { background: var(--tint); padding: .8rem 1rem; border-radius: .4rem; }
@media (max-width: 40rem) {
  body { margin: 1.5rem auto; padding: 0 1rem; } th, td { padding: .35rem .4rem; }
  .strip { grid-template-columns: 6.4rem; font-size: .85rem; }
  .rounds { grid-template-columns: 1fr; gap: .15rem; } }
"""


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, already escaped.
        style: CSS beside that of every report.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table under `head`; the first cell of each row is left aligned, the others right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        first, *others = (escape(cell) for cell in cells)
        return (
            f"<tr><{tag}>{first}</{tag}>"
            + "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in others)
            + "</tr>"
        )

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{body}</table></div>'
