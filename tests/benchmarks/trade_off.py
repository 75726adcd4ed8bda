"""Trade-off: figures over seeds with their intervals, and which of two treatments is better.

Shared by the benchmarks that set leakage beside utility. Everything is paired by seed: data, start
and order of the batches are the same for all treatments of a seed, the guard's noise never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.stress.auc import auc
from sentinel.stress.inference.null import over_splits

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.interval import Interval


@dataclass(frozen=True, eq=False)
class Figures:
    """What came of one treatment.

    Attributes:
        leak: [seeds], larger is worse.
        auc: [seeds].
        accuracy: [seeds].
    """

    leak: Tensor
    auc: Tensor
    accuracy: Tensor


def dominates(one: Figures, other: Figures) -> bool:
    """Whether `one` is better beyond the interval on an axis, and worse beyond it on none.

    The axes are leakage, AUC and accuracy; the intervals are of paired differences, 95 %, each for
    itself. Two treatments with the same figures do not dominate each other.
    """
    ends = advantages(one, other)
    return any(end.low > 0 for end in ends) and not any(end.high < 0 for end in ends)


def advantages(one: Figures, other: Figures) -> tuple[Interval, Interval, Interval]:
    """By how much `one` is better in leakage, AUC and accuracy: intervals, positive is better."""
    return (
        over_splits(other.leak - one.leak),
        over_splits(one.auc - other.auc),
        over_splits(one.accuracy - other.accuracy),
    )


def verdict(fixed: Figures, adaptive: Figures) -> str:
    """What a fixed policy is beside the adaptive one, in words."""
    if dominates(fixed, adaptive):
        return "dominates"
    return "dominated" if dominates(adaptive, fixed) else "neither"


def lead(inside: Tensor, outside: Tensor) -> float:
    """How well errors tell those inside from those outside: 0 for not at all, 1 for always.

    Args:
        inside: [n], errors of the nearest guess at records behind an update.
        outside: [m], of the same guesses at others.

    Returns:
        The share of pairs in which the one inside has the smaller error, less the share in which it
        has the larger one.
    """
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    near = (1.0 + torch.cat([inside, outside])).reciprocal()  # 0 where there is no guess
    return 2.0 * auc(near, labels) - 1.0


def told(values: Tensor, digits: int = 3, factor: float = 1.0) -> str:
    """The mean of independent values and its 95 % interval, as text."""
    ends = over_splits(values)
    low, high = factor * ends.low, factor * ends.high
    return (
        f"{factor * float(values.double().mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    )


def reduction(before: Tensor, after: Tensor, floor: Tensor | None = None) -> tuple[float, Interval]:
    """By which share of its mean a likeness fell, and the 95 % interval of that share.

    Args:
        before: [pictures].
        after: [pictures], the same ones.
        floor: [pictures]: what counts as nothing; 0 where left out.

    Returns:
        1 less mean after by mean before, both above the floor, and its interval: Student's t on
        what each picture lost, less what it would lose at that share (the delta method).
    """
    level = torch.zeros_like(before) if floor is None else floor
    whole, left = (before - level).double(), (after - level).double()
    share = 1.0 - float(left.mean() / whole.mean())
    return share, over_splits(share + (whole * (1.0 - share) - left) / whole.mean())


def scored(margins: Tensor, labels: Tensor) -> tuple[float, float]:
    """AUC and accuracy of margins [n], positive where the answer is yes, for labels of 0 and 1."""
    return auc(margins, labels), float(((margins > 0) == (labels == 1)).double().mean())


def line(*cells: str) -> str:
    """One row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"
