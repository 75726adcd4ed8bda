"""Rounded normal: whole numbers distributed like round(S * N(0, 1)), drawn from random bits.

A float64 formula such as Box-Muller's has a few bits of error in every draw, and nobody has bounded
what a hundred million of them give away. Here the probability of every whole number is known.

The numbers within 11 S of 0 are cut into *cells* of 2^w numbers, a hundredth of S wide. Every cell
holds a *box*: a part of its probability that is the same for all its numbers, a whole multiple of
2^-16 together, and nowhere more than the probability itself. A word of 64 random bits is one draw:

- its upper 16 bits choose one of 2^16 *slots*. 99 in 100 belong to the box of a cell, and the next
  w bits choose a number of that cell, each as likely as the other. This part is exact.
- The other slots stand for the *rest*, what the boxes leave of the probability. A number is drawn
  from it by accept/reject: another word proposes one in the same way, from slots that give every
  cell a *lid*, the same for all its numbers and nowhere less than their rest. Then 128 random bits
  accept it with probability rest / lid.

Guarantees:
    Let p be the probabilities of round(S * N(0, 1)) and q those of what is drawn from ideal random
    bits. Then |ln(q(k) / p(k))| <= LOG_RATIO for every whole k within 11 S of 0, up to the end of
    the last whole cell, and p gives all others together at most MASS.

Why: boxes, lids and the choice within a cell are exact: their figures are float64 numbers that
    need no rounding, or enter both sides alike. Two things are rounded. First p(k) itself, taken as
    phi(x) / S * (1 + (x^2 - 1) / 24 S^2 + (x^4 - 6 x^2 + 3) / 1920 S^4) with x = k / S: the density
    integrated over the width of one number. What this leaves out is under 2^-55 of p for S >= 2^10;
    squaring, exp and the sum are off by less than 2^-45 of p at x = 11, and 2^-48 on average.
    Second the coin: it is read to 53 bits from its leading one on, so that rest / lid is met to
    2^-52 of itself, and to 2^-44 where it is as small as 2^-83, next to x = 11. What is drawn is
    proportional to the rest, so that an error e in the sum of the rest, which is a hundredth of
    everything, moves its numbers by e * 100: 2^-41 for e = 2^-48. LOG_RATIO is twice that. A test
    adds up q in exact arithmetic and compares it with p at 50 digits.

Reference: rejection from a piecewise constant lid, Devroye, Non-Uniform Random Variate Generation
    (1986), II.3 and VIII.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sentinel.mechanism.entropy import random_words
from sentinel.terms import Slack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sentinel.mechanism.entropy import Entropy

    Floats = NDArray[np.float64]
    Wholes = NDArray[np.int64]

REACH = 11  # in S: nothing farther out is drawn
LOG_RATIO = 2.0**-40
MASS = 2.0**-90  # 2 * Q(11 - 1/64) = 4.6e-28
SMALLEST_SCALE = 2.0**10
LARGEST_SCALE = 2.0**46  # 11 S stays below 2^50
BIAS = 3 * 2.0**51  # in its binade floats are whole numbers, 2^51 to either side
_SLOTS = 1 << 16
_SLOT_BITS, _SLOT_SHIFT = np.uint64(16), np.uint64(48)
_TOP = 3 if sys.byteorder == "little" else 0  # which quarter of a word holds its slot
_WHOLE_COIN = np.uint64(1 << 54)  # as 64 bits: from here on 64 more cannot change what is read
_FINEST = 128  # cells per S, at most; half as many at least
_BELOW = 1.0 - 2.0**-30  # keeps a box under the probability, whatever float64 rounded
_ABOVE = 1.0 + 2.0**-30  # keeps a lid over it
_AHEAD = 8192  # proposals from the rest that are made at once, where so many will be needed


def slack(coordinates: int) -> Slack:
    """How far `coordinates` independent draws may be from ideal ones."""
    return Slack(coordinates * LOG_RATIO, coordinates * MASS)


@dataclass(frozen=True, slots=True, eq=False)
class RoundedNormal:
    """The tables for one scale S.

    Attributes:
        scale: S, the standard deviation in whole steps.
        bits: w; a cell holds 2^w numbers.
        cells: the cell of each slot, first number / 2^w, int16 (2^16,); 0 where it has none.
        boxes: how many slots belong to boxes; the others stand for the rest.
        rest: what the boxes leave.
    """

    scale: float
    bits: int
    cells: torch.Tensor
    boxes: int
    rest: Rest

    @classmethod
    def of(cls, scale: float) -> RoundedNormal:
        """The tables for S = `scale`; made once and kept.

        Raises:
            ValueError: a scale below 2^10 (the grid is too coarse) or above 2^46.
        """
        return _tables(scale)


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """What the boxes leave of the probability.

    Attributes:
        cells: which cell each slot proposes, counted from 0, int16 (2^16,).
        first: first number of each cell, int64 (cells,).
        box: probability of each number in the cell's box, float64 (cells,).
        lid: as much as the rest of any number in the cell, or more, float64 (cells,).
        proposals: how many a draw takes on average: the probability of all lids together.
    """

    cells: NDArray[np.int16]
    first: Wholes
    box: Floats
    lid: Floats
    proposals: float


class _Views:
    """The first `count` places of a drawer's two buffers, in every way that it looks at them."""

    def __init__(self, words: NDArray[np.int64], scratch: Floats, count: int) -> None:
        """Views; nothing is copied."""
        self.count = count
        self.words = words[:count]
        self.tops = self.words.view(np.uint16)[_TOP::4]
        self.tops_in_torch = torch.from_numpy(self.tops.view(np.int16))
        self.drawn = torch.from_numpy(self.words.view(np.float64))
        self.slots = scratch.view(np.int32)[:count]
        self.slots_in_torch = torch.from_numpy(self.slots)
        self.in_rest = scratch.view(np.bool_)[4 * scratch.size :][:count]


class Drawer:
    """Draws up to `room` numbers at a time, in buffers that are used again: 16 bytes for each.

    A number k is handed out as the float64 `(k - BIAS) * step`. Floats next to one another are
    `step` apart there, and their bits are whole numbers next to one another: taking k from the bits
    of `-BIAS * step` is exact, and so is adding the outcome to a value that lies on the grid and
    was moved by `BIAS * step`.

    Attributes:
        scratch: float64 (room,); for others to use between draws, each of which overwrites it.
    """

    def __init__(self, room: int) -> None:
        """Make the buffers."""
        self.scratch = np.empty(room)
        self._words = np.empty(room, np.int64)
        self._views: _Views | None = None

    def begin(self, entropy: Entropy, values: int) -> None:
        """Draw from `entropy` for the next so many values, and nothing drawn ahead from another."""
        self._entropy = entropy
        self._expected = values
        self._ahead: dict[RoundedNormal, Wholes] = {}

    def draw(self, tables: RoundedNormal, count: int, step: float) -> torch.Tensor:
        """`count` numbers, float64 (count,), each as (number - BIAS) * step: until the next call.

        The place of the slot, on top of a word, takes the number of the cell. The word is then read
        as a signed whole number, and the shift that drops the bits below the w used ones leaves
        cell * 2^w + the w bits.
        """
        if self._views is None or self._views.count != count:
            self._views = _Views(self._words, self.scratch, count)
        at = self._views
        self._entropy.fill(at.words.data)
        np.copyto(at.slots, at.tops)
        missing = np.flatnonzero(np.greater_equal(at.slots, tables.boxes, out=at.in_rest))
        torch.index_select(tables.cells, 0, at.slots_in_torch, out=at.tops_in_torch)
        np.right_shift(at.words, 48 - tables.bits, out=at.words)
        if missing.size:
            at.words[missing] = self._from_rest(tables, missing.size)
        self._expected -= count
        np.subtract(np.float64(-BIAS * step).view(np.int64), at.words, out=at.words)
        return at.drawn

    def _from_rest(self, tables: RoundedNormal, missing: int) -> Wholes:
        """`missing` numbers of the rest: independent of where they will stand, so drawn ahead."""
        ahead = self._ahead.get(tables, np.empty(0, np.int64))
        to_come = math.ceil(self._expected * tables.rest.proposals)
        while ahead.size < missing:
            tries = max(2 * missing, min(to_come, _AHEAD))
            ahead = np.concatenate([ahead, _accepted(tables, tries, self._entropy)])
        self._ahead[tables] = ahead[missing:]
        return ahead[:missing]


def _accepted(tables: RoundedNormal, tries: int, entropy: Entropy) -> Wholes:
    """Those of `tries` proposals from the rest that are accepted."""
    words, coins = random_words(2 * tries, entropy).reshape(2, tries)
    rest = tables.rest
    cells = rest.cells.take((words >> _SLOT_SHIFT).view(np.int64)).astype(np.int64)
    within = (words << _SLOT_BITS) >> np.uint64(64 - tables.bits)
    numbers = rest.first.take(cells) | within.view(np.int64)
    left = _probability(numbers, tables.scale) - rest.box.take(cells)
    return numbers.compress(_read(coins, entropy) * rest.lid.take(cells) < left)


def _read(coins: NDArray[np.uint64], entropy: Entropy) -> Floats:
    """Numbers in [0, 1) of 128 random bits, of which 64 are there: 53 bits from the leading one on.

    The other 64 bits are drawn only where they can be seen: a float64 of 2^54 or more has neighbors
    4 away, so that adding less than 1 leaves it as it is.
    """
    read = np.asarray(coins * 2.0**-64, np.float64)
    small = np.flatnonzero(coins < _WHOLE_COIN)
    read[small] += random_words(small.size, entropy) * 2.0**-128
    return read


def _probability(numbers: Wholes, scale: float) -> Floats:
    """P(round(S * N(0, 1)) = k), for S >= 2^10 and |k| <= 11 S."""
    square = np.square(numbers / scale)
    narrow = 1.0 / (24.0 * scale * scale)  # 0.3 narrow^2 = 1 / 1920 S^4
    bend = square * (0.3 * narrow * narrow) + (narrow - 1.8 * narrow * narrow)
    bend = bend * square + (0.9 * narrow * narrow - narrow)
    density = np.exp(square * -0.5) * (1.0 / (scale * math.sqrt(2.0 * math.pi)))
    return np.asarray(density + density * bend)


@functools.lru_cache(maxsize=64)
def _tables(scale: float) -> RoundedNormal:
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError("the noise must be 2^10 to 2^46 steps of the grid wide; check the grid")
    bits = math.floor(math.log2(scale / (_FINEST / 2)))
    half = math.floor(REACH * scale) >> bits
    first = np.arange(-half, half, dtype=np.int64) << bits
    last = first | ((1 << bits) - 1)
    near, far = np.where(first < 0, last, first), np.where(first < 0, first, last)
    width = float(1 << bits)
    filled = np.floor(_probability(far, scale) * (width * _SLOTS * _BELOW)).astype(np.int64)
    box = filled / (width * _SLOTS)
    boxes = int(filled.sum())
    cells = np.zeros(_SLOTS, np.int16)
    cells[:boxes] = np.repeat(first >> bits, filled)
    rest = _rest(first, box, (_probability(near, scale) - box) * _ABOVE, width)
    return RoundedNormal(scale, bits, torch.from_numpy(cells), boxes, rest)


def _rest(first: Wholes, box: Floats, largest: Floats, width: float) -> Rest:
    """Slots by the largest rest of each cell, rounded up; those that remain go to the first one."""
    unit = largest.sum() / (_SLOTS - largest.size)  # rounding up adds less than one slot per cell
    lids = np.ceil(largest / unit).astype(np.int64)
    lids[0] += _SLOTS - lids.sum()
    cells = np.repeat(np.arange(first.size, dtype=np.int16), lids)
    return Rest(cells, first, box, lids * unit, float(unit * _SLOTS * width))
