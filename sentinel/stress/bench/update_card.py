"""The card of an evaluated sensitivity score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sentinel.stress.bench import charts
from sentinel.stress.bench.card import QUICK_WARNING, markdown_table
from sentinel.stress.bench.update_figures import SCORES, Quality, by, latency, mean, quality

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sentinel.stress.bench.evaluate import Size
    from sentinel.stress.bench.updates import UpdateRow

RANK_AIM, AREA_AIM = 0.9, 0.98


def update_card(rows: Sequence[UpdateRow], size: Size, digest: str) -> str:
    """Write the evaluation as Markdown.

    Args:
        rows: what was measured.
        size: how much of it.
        digest: of the detector's manifest.
    """
    own = SCORES["sentinel"]
    nets = by(rows, lambda row: row.net, own)
    quick = QUICK_WARNING if size.name == "quick" else ""
    middle, high = latency(rows)
    parts = [
        HEAD.format(digest=digest[:16], quick=quick, updates=len(rows), nets=len(nets)),
        "## Against the aims\n",
        markdown_table(("aim", "measured", "met"), _aims(nets)),
        "## Beside plain rules\n",
        RULES,
        markdown_table(RULE_HEAD, _rules(rows)),
        "![Score against measured leakage](leakage.svg)\n",
        "## By modality\n",
        _groups(rows, lambda row: row.modality),
        "## By architecture\n",
        _groups(rows, lambda row: row.net),
        "## By noise, as a share of the update's norm\n",
        _groups(rows, lambda row: f"{row.noise:g}"),
        "## By the model that it was trained on\n",
        _groups(rows, lambda row: row.craft),
        TIME.format(middle=1000 * middle, high=1000 * high),
        LIMITS,
    ]
    return "\n".join(parts)


def scatter_svg(rows: Sequence[UpdateRow]) -> str:
    """Score against measured leakage, one dot for each update."""
    return charts.scatter_svg([(row.leak, row.score) for row in rows])


def _aims(nets: Sequence[Quality]) -> Iterator[tuple[str, str, str]]:
    for name, values, aim in (
        ("Spearman with measured leakage", [one.spearman for one in nets], RANK_AIM),
        ("AUROC, some record can be read", [one.area for one in nets], AREA_AIM),
    ):
        told = [value for value in values if not math.isnan(value)]
        if not told:
            yield f"{name}: {aim}", "not measured", "not measured"
            continue
        middle, least = mean(told), min(told)
        short = "yes" if least >= aim else f"least {aim - least:.3f} short"
        yield f"{name}: {aim} on each net", f"mean {middle:.3f}, least {least:.3f}", short


def _rules(rows: Sequence[UpdateRow]) -> Iterator[list[str]]:
    for name, score in SCORES.items():
        nets = by(rows, lambda row: row.net, score)
        whole = quality(name, rows, score)
        yield [
            name,
            *(_number(mean([getattr(one, part) for one in nets])) for part in PARTS),
            *(_number(getattr(whole, part)) for part in PARTS),
        ]


def _groups(rows: Sequence[UpdateRow], key: Callable[[UpdateRow], str]) -> str:
    found = by(rows, key, SCORES["sentinel"])
    return markdown_table(
        GROUP_HEAD,
        (
            [
                one.name,
                f"{one.readable} of {one.updates}",
                *(_number(getattr(one, part)) for part in (*PARTS, "error")),
                str(one.blind),
            ]
            for one in found
        ),
    )


def _number(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}"


PARTS = ("spearman", "area", "exact_area")
RULE_HEAD = (
    "score",
    "Spearman, mean of nets",
    "AUROC",
    "AUROC, exact reads",
    "Spearman, all together",
    "AUROC",
    "AUROC, exact reads",
)
GROUP_HEAD = (
    "",
    "some record can be read",
    "Spearman",
    "AUROC",
    "AUROC, exact reads",
    "mean distance to leakage",
    "blind",
)
HEAD = """\
# update-sensitivity, evaluated

Written by `sentinel detectors evaluate update-sensitivity`; detector manifest `{digest}`. {quick}
{updates} local rounds on {nets} architectures that the score was not trained on: one record to 256,
one step or several, SGD and Adam, on honest and crafted models, raw and noised. Each is scored with
a reference of its own model. "Leakage" is measured as the score defines it; "exact reads" by the
stress lab's attacker to 1 % of the layer's input, which no training has seen.
"""
RULES = """\
"Generic" is the score without a reference. "Flat rank" is how far the update's flattest matrix is
from full rank, "parallel rows" the share of parallel rows in a matrix: what one would try first.
"""
TIME = """\
Scoring one update took {middle:.1f} ms (median), {high:.1f} ms (95th percentile), on this machine
and these small nets.
"""
LIMITS = """\
## Limits

- The nets are narrow and the tasks synthetic. Rounds of one net share a global model or two.
- Leakage is what linear read-out gives away; slow optimisation against the update is not measured.
- An update with noise five times its size leaks next to nothing, so its groups have few that can be
  read, and a rank correlation there says little.
"""
