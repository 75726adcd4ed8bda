"""Findings: what an attack found, in figures that add up over updates.

Every figure stands beside what chance gives: a measure without its yardstick says nothing, since
patients of one hospital resemble one another.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from scipy import stats

from sentinel.interval import Count, Interval, difference, wilson

if TYPE_CHECKING:
    from torch import Tensor


BLIND = "knowing nothing"


@dataclass(frozen=True, slots=True)
class Tally:
    """One measure, record by record, and the same measure where the attacker knew nothing.

    Attributes:
        measure: what is counted, for a reader.
        values: one for each record behind the updates; 1 is all of it.
        chances: the yardstick: held-out records against the same guesses, or a guess without data.
        paired: whether `chances` belong to the same records, in the same order.
        margin: a gain that the verdict lets pass: within it, a guess helps nobody.
        beside: what `chances` are, for a reader.
        of: what `values` are counted over, for a reader.
    """

    measure: str
    values: tuple[float, ...]
    chances: tuple[float, ...]
    paired: bool = False
    margin: float = 0.0
    beside: str = BLIND
    of: str = "records"

    def __add__(self, other: Tally) -> Tally:
        """Pool two updates' worth."""
        return replace(
            self, values=self.values + other.values, chances=self.chances + other.chances
        )

    @property
    def mean(self) -> float:
        """Mean over the records; NaN without any."""
        return fmean(self.values) if self.values else math.nan

    @property
    def chance(self) -> float:
        """Mean of the yardstick; NaN without any."""
        return fmean(self.chances) if self.chances else math.nan

    @property
    def gain(self) -> float:
        """How much more the attacker has than one who knows nothing."""
        return self.mean - self.chance

    def interval(self, confidence: float = 0.95) -> Interval:
        """Of the gain. Records as independent.

        Newcombe's for two counts, else Student's. For a count beside chances that are known exactly
        the wider of Student's, which has no width where all hit or all miss, and Wilson's, which is
        too narrow where hits come in clumps.
        """
        if not self.values or not self.chances:
            return Interval(-1.0, 1.0)
        if not self.paired and set(self.values) <= {0.0, 1.0}:
            first = Count(int(sum(self.values)), len(self.values))
            if set(self.chances) <= {0.0, 1.0}:
                second = Count(int(sum(self.chances)), len(self.chances))
                return difference(first, second, confidence=confidence)
            one, other = wilson(first, confidence=confidence), self._students(confidence)
            low, high = one.low - self.chance, one.high - self.chance
            return Interval(min(low, other.low), max(high, other.high))
        return self._students(confidence)

    def open_gain(self, confidence: float) -> float:
        """The largest gain that the figures leave open, from 0 to what there is to be gained."""
        if not self.values:
            return 1.0
        return max(0.0, min(1.0 - self.chance, self.interval(confidence).high))

    def leaks(self, confidence: float) -> bool:
        """Whether the gain is above the margin, with this confidence."""
        return bool(self.values) and self.interval(confidence).low > self.margin

    def _students(self, confidence: float) -> Interval:
        freedom = max(1, min(len(self.values), len(self.chances)) - 1)
        half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * self._error()
        return Interval(self.gain - half, self.gain + half)

    def _error(self) -> float:
        """Standard error of the gain; infinite for a single record."""
        if self.paired:
            return _error([a - b for a, b in zip(self.values, self.chances, strict=True)])
        return math.hypot(_error(self.values), _error(self.chances))


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One record, and what the attacker made of it; for the site's own eyes.

    Attributes:
        truth: the record, as the model takes it; of a picture its pixels, from 0 to 1.
        guess: the attacker's closest guess, of the same shape.
        score: how close, 1 is all of it.
        index: of the record among those behind the update.
        update: number of the update; the runner sets it.
    """

    truth: Tensor
    guess: Tensor
    score: float
    index: int = 0
    update: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one attack, on one update or pooled over several.

    Attributes:
        tallies: the measures; the first is the one that the verdict rests on.
        exhibits: a few records, best hit first; empty where nothing can be shown.
        updates: how many updates were attacked.
        cut: whether an attack had to stop before it was through.
        control: the same attack on records that it must find if it is worth anything, planted into
            updates without a guard; None where there was no such control.
    """

    tallies: tuple[Tally, ...]
    exhibits: tuple[Exhibit, ...] = ()
    updates: int = 1
    cut: bool = False
    control: Tally | None = None

    def __add__(self, other: Finding) -> Finding:
        """Pool the findings of the same attack on two updates."""
        shown = sorted((*self.exhibits, *other.exhibits), key=lambda one: -one.score)
        controls = [one for one in (self.control, other.control) if one is not None]
        return Finding(
            tuple(a + b for a, b in zip(self.tallies, other.tallies, strict=True)),
            tuple(shown),
            self.updates + other.updates,
            self.cut or other.cut,
            functools.reduce(Tally.__add__, controls) if controls else None,
        )

    @property
    def main(self) -> Tally:
        """The measure that the verdict rests on."""
        return self.tallies[0]

    @property
    def worst(self) -> Exhibit | None:
        """The record that was hit best."""
        return self.exhibits[0] if self.exhibits else None


EXHIBITED = 4  # records of each update that are kept for the report, beside the one hit best


def exhibited(scores: Tensor) -> list[int]:
    """Which records of an update are exhibited: the same few on every way, and the one hit best."""
    first = list(range(min(EXHIBITED, len(scores))))
    return list(dict.fromkeys([*first, int(scores.argmax())]))


def _error(values: tuple[float, ...] | list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
