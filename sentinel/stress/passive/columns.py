"""Tables with mixed columns: what an attacker knows of them beforehand, and what counts as right.

A column is continuous, or takes one of a few levels; a level is a code over one feature (numbered
categories) or over several (one-hot). All is learnt from reference rows: public ones, or of the
same hospital and not behind the update. A mean over columns overstates what was recovered, since
most columns are guessed well without any update; so whole rows are counted, beside the guesses of
an attacker who knows the marginals alone and beside other patients under the same guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment

from sentinel.errors import MisuseError
from sentinel.interval import Count, difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sentinel.interval import Interval

MOST_LEVELS = 8  # distinct values up to which a column counts as a category
# In standard deviations of a continuous column: within it the mean of a normal column is right for
# a quarter of the records.
TOLERANCE = 0.319


@dataclass(frozen=True, slots=True)
class Column:
    """What is known of one column.

    Attributes:
        levels: [K, width], the codes that it takes; K is 0 where it is continuous.
        shares: [K], how often each level occurs.
        mean: [width].
        spread: standard deviation of a continuous column; 1 otherwise.
        guess: [width], the value that is right most often.
    """

    levels: Tensor
    shares: Tensor
    mean: Tensor
    spread: float
    guess: Tensor

    @classmethod
    def learnt(cls, values: Tensor, most_levels: int = MOST_LEVELS) -> Column:
        """Learn a column from [rows, width]; wider than one feature it is always a category."""
        levels, counts = torch.unique(values, dim=0, return_counts=True)
        mean = values.mean(0)
        if values.shape[1] > 1 or len(levels) <= most_levels:
            shares = counts / len(values)
            return cls(levels, shares, mean, 1.0, levels[counts.argmax()])
        spread = float(values.std().clamp_min(1e-6))
        ordered = values[:, 0].sort().values
        above = torch.searchsorted(ordered, ordered + TOLERANCE * spread, right=True)
        below = torch.searchsorted(ordered, ordered - TOLERANCE * spread)
        guess = ordered[(above - below).argmax()][None]
        return cls(values.new_empty(0, 1), values.new_empty(0), mean, spread, guess)

    @property
    def continuous(self) -> bool:
        """Whether it is no category."""
        return len(self.levels) == 0

    @property
    def width(self) -> int:
        """Features that it takes."""
        return len(self.mean)

    @property
    def latents(self) -> int:
        """Numbers that an attacker varies for it: a logit per level, or one z-score."""
        return max(len(self.levels), 1)

    def soften(self, latent: Tensor) -> Tensor:
        """[..., latents] to [..., width]: the mean level under the softmax, or the value."""
        if self.continuous:
            return self.mean + self.spread * latent
        return latent.softmax(-1) @ self.levels

    def surprise(self, latent: Tensor) -> Tensor:
        """Minus the log of what the marginal gives [..., latents], up to a constant, [...]."""
        if self.continuous:
            return latent[..., 0].square() / 2
        return -(latent.softmax(-1) * self.shares.log()).sum(-1)

    def snapped(self, values: Tensor) -> Tensor:
        """[N, width] with the nearest level of a category in each row."""
        if self.continuous:
            return values
        return self.levels[torch.cdist(values, self.levels).argmin(1)]

    def right(self, guesses: Tensor, values: Tensor) -> Tensor:
        """Whether each guess is right, both broadcast to [..., width]: [...]."""
        apart = (guesses - values).abs().amax(-1)
        return apart <= (TOLERANCE * self.spread if self.continuous else 1e-4)


@dataclass(frozen=True, slots=True)
class Table:
    """What is known of all columns, in the order of the features."""

    columns: tuple[Column, ...]

    @classmethod
    def learnt(
        cls, rows: Tensor, widths: Sequence[int] | None = None, most_levels: int = MOST_LEVELS
    ) -> Table:
        """Learn a table from reference rows.

        Args:
            rows: [references, features], none of them behind an attacked update.
            widths: features of each column; 1 each where left out.
            most_levels: distinct values up to which a column counts as a category.

        Raises:
            MisuseError: no two rows, or widths that do not add up to the features.
        """
        widths = [1] * rows.shape[1] if widths is None else list(widths)
        if len(rows) < 2 or sum(widths) != rows.shape[1]:  # noqa: PLR2004 - a spread takes two
            msg = "a table is learnt from at least two rows, whose features the widths add up to"
            raise MisuseError(msg)
        parts = torch.split(rows.float(), widths, dim=1)
        return cls(tuple(Column.learnt(part, most_levels) for part in parts))

    @property
    def latents(self) -> int:
        """Numbers that an attacker varies for each row."""
        return sum(column.latents for column in self.columns)

    def soften(self, latents: Tensor) -> Tensor:
        """[..., latents] to rows [..., features], differentiable."""
        parts = torch.split(latents, [column.latents for column in self.columns], dim=-1)
        pairs = zip(self.columns, parts, strict=True)
        return torch.cat([column.soften(part) for column, part in pairs], dim=-1)

    def surprise(self, latents: Tensor) -> Tensor:
        """Minus the log of what the marginals give [..., latents], summed over columns, [...]."""
        parts = torch.split(latents, [column.latents for column in self.columns], dim=-1)
        pairs = zip(self.columns, parts, strict=True)
        return torch.stack([column.surprise(part) for column, part in pairs]).sum(0)

    def start(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Random latents [*shape, latents]."""
        return torch.randn((*shape, self.latents), generator=generator)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[..., features], column by column."""
        parts: tuple[Tensor, ...] = torch.split(rows, [c.width for c in self.columns], dim=-1)
        return parts

    def snapped(self, rows: Tensor) -> Tensor:
        """[N, features] with the nearest level in every category."""
        pairs = zip(self.columns, self.split(rows), strict=True)
        return torch.cat([column.snapped(part) for column, part in pairs], dim=1)

    def right(self, guesses: Tensor, rows: Tensor) -> Tensor:
        """Which columns are right, for guesses and rows broadcast to [..., features]: [..., C]."""
        pairs = zip(self.columns, self.split(guesses), self.split(rows), strict=True)
        return torch.stack([column.right(one, other) for column, one, other in pairs], dim=-1)

    @property
    def guess(self) -> Tensor:
        """The row that an attacker who knows the marginals alone says of everybody, [features]."""
        return torch.cat([column.guess for column in self.columns])

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Between rows [N, F] and [M, F], each continuous column by its spread: [N, M]."""
        scale = torch.cat([torch.full((c.width,), 1 / c.spread) for c in self.columns])
        return torch.cdist(first * scale, second * scale)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was right, of the records, of others under the same guesses, and by the marginals.

    Attributes:
        rows: whole rows: every column right.
        by_marginals: whole rows that the marginals alone give.
        others: whole rows of patients who were not behind the update, under the same guesses.
        columns: for each column, the records in which it is right.
        columns_by_marginals: the same of the marginals alone.
        columns_of_others: the same of patients who were not behind the update.
    """

    rows: Count
    by_marginals: Count
    others: Count
    columns: tuple[Count, ...]
    columns_by_marginals: tuple[Count, ...]
    columns_of_others: tuple[Count, ...]

    def __add__(self, other: Recovery) -> Recovery:
        """Pool two measurements of one table."""
        return Recovery(
            _sum(self.rows, other.rows),
            _sum(self.by_marginals, other.by_marginals),
            _sum(self.others, other.others),
            tuple(map(_sum, self.columns, other.columns)),
            tuple(map(_sum, self.columns_by_marginals, other.columns_by_marginals)),
            tuple(map(_sum, self.columns_of_others, other.columns_of_others)),
        )

    @property
    def accuracy(self) -> float:
        """Mean share of right columns, which overstates what was recovered."""
        return _mean(self.columns)

    @property
    def accuracy_by_marginals(self) -> float:
        """The same of the marginals alone."""
        return _mean(self.columns_by_marginals)

    @property
    def accuracy_of_others(self) -> float:
        """The same of patients who were not behind the update."""
        return _mean(self.columns_of_others)

    @property
    def over_marginals(self) -> Interval:
        """The 95 % interval of how many more whole rows there are than by the marginals."""
        return difference(self.rows, self.by_marginals)

    @property
    def over_others(self) -> Interval:
        """The 95 % interval of how many more whole rows there are than of others."""
        return difference(self.rows, self.others)


def recovery(guesses: Tensor, rows: Tensor, others: Tensor, table: Table) -> Recovery:
    """Count what is right.

    Guesses are matched one to one, with the truth at hand, which flatters the attacker. As many
    others as there are records are matched in the same way, batch by batch.

    Args:
        guesses: [N, features].
        rows: [N, features], the records behind the update, in any order.
        others: [M, features], records of the same population that were not, at least N.
        table: says what is right.

    Raises:
        MisuseError: guesses and rows differ in number, or there are fewer others.
    """
    if len(guesses) != len(rows) or len(others) < len(rows):
        msg = "recovery takes one guess for each row, and at least as many other rows"
        raise MisuseError(msg)
    hits = matched(guesses, rows, table)
    known = table.right(table.guess, rows)
    batches = [part for part in torch.split(others, len(rows)) if len(part) == len(rows)]
    apart = torch.cat([matched(guesses, batch, table) for batch in batches])
    return Recovery(
        _whole(hits), _whole(known), _whole(apart), _each(hits), _each(known), _each(apart)
    )


def matched(guesses: Tensor, rows: Tensor, table: Table) -> Tensor:
    """Which columns are right under the best one-to-one matching, the truth at hand.

    Args:
        guesses: [N, features].
        rows: [N, features], in any order.
        table: says what is right.

    Returns:
        [N, columns] bool, in the order of the rows.
    """
    hits = table.right(guesses[:, None], rows[None]).sum(-1).double()
    cost = table.distances(guesses, rows).double() / (1e3 * max(len(table.columns), 1)) - hits
    chosen, places = linear_sum_assignment(cost.numpy())
    order = torch.as_tensor(chosen)[torch.as_tensor(places).argsort()]
    return table.right(guesses[order], rows)


def _whole(hits: Tensor) -> Count:
    return Count(int(hits.all(-1).sum()), len(hits))


def _each(hits: Tensor) -> tuple[Count, ...]:
    return tuple(Count(int(column.sum()), len(hits)) for column in hits.T)


def _sum(one: Count, other: Count) -> Count:
    return Count(one.hits + other.hits, one.trials + other.trials)


def _mean(counts: tuple[Count, ...]) -> float:
    return sum(count.share for count in counts) / len(counts)
