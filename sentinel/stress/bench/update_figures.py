"""Figures of the sensitivity score: how it follows measured leakage, and what it costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr

from sentinel.stress.auc import auc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sentinel.stress.bench.updates import UpdateRow

    Score = Callable[[UpdateRow], float]

SCORES: dict[str, Score] = {
    "sentinel": lambda row: row.score,
    "sentinel, generic": lambda row: row.generic,
    "flat rank": lambda row: row.flat,
    "parallel rows": lambda row: row.twins,
}


@dataclass(frozen=True, slots=True)
class Quality:
    """How one score follows leakage in one group of updates.

    Attributes:
        name: of the group.
        updates: how many.
        readable: of how many some record can be read.
        spearman: with the leakage; NaN where either is constant.
        area: AUROC for "some record can be read"; NaN where all or none can.
        exact_area: the same for exact reads of the lab's attacker.
        error: mean distance of score and leakage.
        blind: updates of which the score says that it is blind.
    """

    name: str
    updates: int
    readable: int
    spearman: float
    area: float
    exact_area: float
    error: float
    blind: int


def quality(name: str, rows: Sequence[UpdateRow], score: Score) -> Quality:
    """Measure one score on one group."""
    scores, leaks = [score(row) for row in rows], [row.leak for row in rows]
    exact = [row for row in rows if row.exact is not None]
    return Quality(
        name,
        len(rows),
        sum(leak > 0 for leak in leaks),
        rank_correlation(scores, leaks),
        area(scores, [leak > 0 for leak in leaks]),
        area([score(row) for row in exact], [bool(row.exact) for row in exact]),
        sum(abs(s - leak) for s, leak in zip(scores, leaks, strict=True)) / max(1, len(rows)),
        sum(row.sharpness == "blind" for row in rows),
    )


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where a side is constant or short."""
    if len(set(left)) < 2 or len(set(right)) < 2:  # noqa: PLR2004 - a constant has no ranks
        return math.nan
    return float(spearmanr(left, right).statistic)


def area(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """AUROC; NaN where all are alike."""
    if not any(positive) or all(positive):
        return math.nan
    return auc(torch.tensor(scores, dtype=torch.float64), torch.tensor(positive).long())


def by(rows: Sequence[UpdateRow], key: Callable[[UpdateRow], str], score: Score) -> list[Quality]:
    """Measure one score on each group, in the order of first appearance."""
    names = dict.fromkeys(map(key, rows))
    return [quality(name, [row for row in rows if key(row) == name], score) for name in names]


def mean(values: Sequence[float]) -> float:
    """Mean of those that are numbers; NaN where none is."""
    told = [value for value in values if not math.isnan(value)]
    return sum(told) / len(told) if told else math.nan


def latency(rows: Sequence[UpdateRow]) -> tuple[float, float]:
    """Seconds to score one update, median and 95th percentile."""
    table = torch.tensor([row.seconds for row in rows], dtype=torch.float64)
    return float(table.quantile(0.5)), float(table.quantile(0.95))


def document(rows: Sequence[UpdateRow]) -> dict[str, Any]:
    """Return all figures as plain values, for a machine; what is not defined is null."""
    groups = {
        "all": lambda _: "all",
        "by_net": lambda row: row.net,
        "by_modality": lambda row: row.modality,
        "by_noise": lambda row: f"{row.noise:g}",
        "by_craft": lambda row: row.craft,
    }
    return {
        name: {
            group: {one.name: _plain(one) for one in by(rows, key, score)}
            for group, key in groups.items()
        }
        for name, score in SCORES.items()
    } | {"updates": [_plain(row) for row in rows]}


def _plain(one: Quality | UpdateRow) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(one).items()
    }
