"""Clipping: each unit's summed gradient to one L2 norm, and the sum of all of them.

Three forms of a parameter's gradient, by what is cheapest to measure and to sum:

- `Outer`: a Linear's weight, where each row's gradient is `grads x inputs`. Never written out: its
  norm follows from inner products of the rows, and the clipped sum is one matrix product.
- `Lookup`: an Embedding's weight; only the words that a unit uses are written out.
- `Whole`: everything else, written out for a few units at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sentinel.chunks import CHUNK
from sentinel.mechanism import grid_step, rounding_reach
from sentinel.terms import Adjacency

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_UNITS = 1 << 14  # in one batch; the bound on the error of the sums counts on it
_NORM_MARGIN = 2.0**-12  # relative, on squares; float32 sums of 1,024 squares err by 2^-13.9
_BLOCK = 1024
_CANCELLATION = 2.0**-24  # of the square of the norm that the rows would have without cancelling
_UNDERFLOW = 2.0**-126  # a float32 square that is smaller may count as 0
_SUM_ERROR = 2.0**-12  # of the clip norm: error of the float64 sums of one batch
_COMPANY = 2.0**-17  # of the clip norm, by expected unit: what others in the batch do to a gradient


@dataclass(frozen=True, slots=True)
class Bound:
    """How far one unit may move the sum of a batch, and what is aimed at so that it does not.

    Sums are kept in units of the clip norm, so that grid and noise are the same for every one.

    Attributes:
        clip_norm: L2 bound C of a unit's gradient.
        coordinates: D, values in the sum.
        noise_multiplier: standard deviation of the noise that will be added / C.
        batch: expected units in a batch.

    Guarantees:
        Adding or removing a unit moves the rounded sum by at most C, replacing one by at most 2 C
        (`sensitivity`). Each unit's gradient is clipped to `target` * C, which is C less everything
        that floating point may add:

        - Norms err by less than `_NORM_MARGIN`: they are rounded up. Where rows of one unit cancel,
          the error of an inner product is relative to what they would be without cancelling;
          `_CANCELLATION` of that is added, so a unit that cancels is clipped harder, never less.
        - Sums run in float64 over products that are exact there. With n units and m additions on
          the way, they err by at most m * 2^-53 * n * C * 2^12 (the 2^12 is the worst that
          `_CANCELLATION` lets through); below `MOST_UNITS` that is under `_SUM_ERROR` * C, for each
          of two neighbouring batches.
        - Rounding to the grid moves each of the two sums by at most `step` * sqrt(D) / 2 * C.
        - `_COMPANY` * C for each expected unit is left for what the arithmetic of torch does to one
          record's gradient when another record comes into the batch (a matrix product may add up in
          another order). That is measured, not proved: see docs/private-training.md.

    Edges:
        `sensitivity`, add-or-remove:          C
        `sensitivity`, replace:                2 C
        a batch of up to 8,192 expected units: `target` lies between 0.87 and 1
        a batch of more:                       refused by `require_possible`
    """

    clip_norm: float
    coordinates: int
    noise_multiplier: float
    batch: int

    @property
    def step(self) -> float:
        """The grid to which the sum is rounded, in clip norms."""
        return grid_step(1.0, self.coordinates, self.noise_multiplier)

    @property
    def target(self) -> float:
        """The L2 norm to which each unit's measured gradient is brought, in clip norms."""
        lost = 2 * (_SUM_ERROR + _COMPANY * self.batch)
        return 1.0 - lost - 2 * rounding_reach(self.step, self.coordinates)

    def sensitivity(self, adjacency: Adjacency) -> float:
        """How far neighbours' sums lie apart at most, L2, in the units of the gradients."""
        return self.clip_norm * (2.0 if adjacency is Adjacency.REPLACE else 1.0)


@dataclass(slots=True)
class ClippedSum:
    """The sum of the clipped gradients of a batch's units, and what it is bounded by.

    Attributes:
        values: (coordinates,) float64, in clip norms.
        bound: how far one unit can have moved it.
        unclipped: units whose norm was at most the clip norm; data, stays in memory.
        not_finite: units left out because a record gave NaN or Inf; data, stays in memory.

    Guarantees:
        The bound travels with the sum: nobody says how large it may be. What one unit adds to
        `values` is at most 1 in L2; `Bound` says what that rests on.

    Edges:
        no unit:             zeros, with the same `sensitivity`
        units of NaN or Inf: counted in `not_finite`, which no release reads
    """

    values: Tensor
    bound: Bound
    unclipped: int = 0
    not_finite: int = 0

    def sensitivity(self, adjacency: Adjacency) -> float:
        """How far neighbours' sums lie apart at most, L2, in the units of the gradients."""
        return self.bound.sensitivity(adjacency)


class Rows:
    """Which unit each of a few rows is of."""

    def __init__(self, slots: Tensor, units: int) -> None:
        """`slots` rise from 0 to `units` - 1, (rows,)."""
        self.slots, self.units = slots, units
        self.alone = len(slots) == units  # each row is a unit of its own

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of each unit's rows: (rows, ...) to (units, ...)."""
        if self.alone:
            return values
        total = values.new_zeros(self.units, *values.shape[1:])
        return total.index_add_(0, self.slots, values)

    def spread(self, values: Tensor) -> Tensor:
        """Each unit's value for each of its rows: (units,) to (rows,)."""
        return values if self.alone else values[self.slots]


class Part(Protocol):
    """The gradients of a few units at one parameter, or at a layer's weight and bias."""

    def squares(self) -> Tensor:
        """Square of each unit's norm, not below the true one but for `_NORM_MARGIN`: (units,)."""

    def keep_(self, kept: Tensor) -> None:
        """Zero the gradients of units that are not `kept`: (units,) bool."""

    def add_to_(self, total: Tensor, factors: Tensor) -> None:
        """Add each unit's gradient times its factor, (units,) float64, to the flat total."""


class Whole:
    """Gradients written out: (rows, ...), for a parameter that begins at `begin` in the sum."""

    def __init__(self, begin: int, values: Tensor, rows: Rows) -> None:
        """Add up the rows of each unit."""
        self._begin = begin
        self._flat = rows.add_up(values.reshape(len(values), -1))

    def squares(self) -> Tensor:
        """Blocks in float32, their sum in float64."""
        flat = self._flat
        if flat.dtype == torch.float64:
            return flat.square().sum(1)
        width = flat.shape[1]
        even = width - width % _BLOCK
        squares: Tensor = torch.linalg.vector_norm(flat[:, even:], dim=1).double().square_()
        if even:
            blocks = flat[:, :even].reshape(len(flat), -1, _BLOCK)
            squares += torch.linalg.vector_norm(blocks, dim=2).double().square_().sum(1)
        squares += width * _UNDERFLOW
        return squares

    def keep_(self, kept: Tensor) -> None:
        """Zero the others."""
        self._flat = self._flat.masked_fill(~kept[:, None], 0.0)

    def add_to_(self, total: Tensor, factors: Tensor) -> None:
        """In float64, a few columns at a time."""
        units, width = self._flat.shape
        columns = max(1, CHUNK // max(1, units))
        for first in range(0, width, columns):
            piece = self._flat[:, first : first + columns]
            begin = self._begin + first
            total[begin : begin + piece.shape[1]].addmv_(piece.double().t(), factors)


class Outer:
    """Gradients as outer products: `grads` (rows, out) with `inputs` (rows, in).

    `begins` says where the weight begins in the sum, and where the bias does, if it is trained.
    """

    def __init__(
        self, begins: tuple[int | None, int | None], inputs: Tensor, grads: Tensor, rows: Rows
    ) -> None:
        """Keep both, in float64: products of two float32 are exact there."""
        self._weight, self._bias = begins
        self._inputs, self._grads, self._rows = inputs.double(), grads.double(), rows

    def squares(self) -> Tensor:
        """By inner products: |sum of b_r a_r|^2 = sum over r, s of (b_r b_s)(a_r a_s).

        A bias is one more input, which is always 1; a weight that is not summed here has none.
        """
        grads = self._grads
        inputs = self._inputs if self._weight is not None else self._inputs[:, :0]
        one = 0.0 if self._bias is None else 1.0
        own = inputs.square().sum(1).add_(one).mul_(grads.square().sum(1))
        if self._rows.alone:
            return own
        slots = self._rows.slots
        products = (inputs @ inputs.t()).add_(one).mul_(grads @ grads.t())
        by_row = products.masked_fill_(slots[:, None] != slots[None, :], 0.0).sum(1)
        uncancelled = self._rows.add_up(own.sqrt_()).square_()
        return self._rows.add_up(by_row).clamp_(min=0.0).add_(uncancelled, alpha=_CANCELLATION)

    def keep_(self, kept: Tensor) -> None:
        """Zero the rows of the others."""
        dropped = ~self._rows.spread(kept)[:, None]
        self._inputs = self._inputs.masked_fill(dropped, 0.0)
        self._grads = self._grads.masked_fill(dropped, 0.0)

    def add_to_(self, total: Tensor, factors: Tensor) -> None:
        """One matrix product."""
        by_row = self._rows.spread(factors)
        width, inside = self._grads.shape[1], self._inputs.shape[1]
        if self._bias is not None:
            total[self._bias : self._bias + width].addmv_(self._grads.t(), by_row)
        if self._weight is not None:
            weight = total[self._weight : self._weight + width * inside].view(width, inside)
            weight.addmm_((self._grads * by_row[:, None]).t(), self._inputs)


class Lookup:
    """Gradients of an embedding: `signals` (rows, positions, width) at `tokens` (rows, positions).

    Each unit's signals at the same word are added up first, in float64.
    """

    def __init__(
        self, begin: int, shape: tuple[int, int], seen: tuple[Tensor, Tensor], rows: Rows
    ) -> None:
        """Add up; `shape` is words and width of the table, `seen` tokens and signals."""
        tokens, signals = seen
        words, width = shape
        keys = (rows.slots[:, None] * words + tokens).reshape(-1)
        places, inverse = torch.unique(keys, return_inverse=True)
        flat = signals.reshape(-1, width).double()
        self._values = flat.new_zeros(len(places), width).index_add_(0, inverse, flat)
        self._words, self._slots = places % words, places // words
        self._begin, self._shape, self._units = begin, shape, rows.units

    def squares(self) -> Tensor:
        """In float64."""
        by_word = self._values.square().sum(1)
        return by_word.new_zeros(self._units).index_add_(0, self._slots, by_word)

    def keep_(self, kept: Tensor) -> None:
        """Zero the words of the others."""
        self._values = self._values.masked_fill(~kept[self._slots][:, None], 0.0)

    def add_to_(self, total: Tensor, factors: Tensor) -> None:
        """Only at the words that occur."""
        words, width = self._shape
        table = total[self._begin : self._begin + words * width].view(words, width)
        table.index_add_(0, self._words, self._values * factors[self._slots][:, None])


def clip_and_add_(total: ClippedSum, parts: Sequence[tuple[Part, float]], units: int) -> None:
    """Clip the gradients of a few units and add them to a batch's sum, in place.

    Args:
        total: the sum so far.
        parts: of every parameter that has gradients, and by what to multiply each.
        units: how many.

    Guarantees:
        One factor for each unit, over all of its records and all parameters: sum, then clip.

    Edges:
        a gradient with a norm up to target: itself
        a larger one:                        itself times target / norm
        a gradient of 0:                     0
        NaN or Inf anywhere in a unit:       0, the others are untouched; `not_finite` counts it
        too large to square:                 as NaN
        no parameter has gradients:          nothing is added
    """
    if not parts:
        total.unclipped += units
        return
    squares = total.values.new_zeros(units)
    for part, scale in parts:
        squares.add_(part.squares(), alpha=scale * scale)
    refused = 0
    if not math.isfinite(float(squares.sum())):
        finite = torch.isfinite(squares)
        refused = units - int(finite.sum())
        for part, _ in parts:
            part.keep_(finite)
        squares = torch.where(finite, squares, 0.0)
    norms = squares.mul_(1.0 + _NORM_MARGIN).sqrt_()
    clip = total.bound
    total.not_finite += refused
    total.unclipped += int((norms <= clip.clip_norm).sum()) - refused
    factors = torch.reciprocal(norms).mul_(clip.target).clamp_(max=1.0 / clip.clip_norm)
    for part, scale in parts:
        part.add_to_(total.values, factors if scale == 1.0 else factors * scale)


def empty_sum(clip: Bound, device: torch.device | str = "cpu") -> ClippedSum:
    """A sum of no units."""
    return ClippedSum(torch.zeros(clip.coordinates, dtype=torch.float64, device=device), clip)


def require_possible(clip: Bound) -> None:
    """Refuse figures for which the bound does not hold.

    Raises:
        ValueError: too many units in a batch.
    """
    if clip.batch > MOST_UNITS // 2:
        raise ValueError(f"a batch may expect at most {MOST_UNITS // 2} units")
