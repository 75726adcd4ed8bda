"""Rounded normal: whole numbers distributed like round(S * N(0, 1)), drawn from random bits.

A float64 formula such as Box-Muller's has a few bits of error in every draw, and nobody has bounded
what a hundred million of them give away. Here the probability of every whole number is known.

The numbers within 11 S of 0 are cut into *cells* of 2^w numbers, a hundredth of S wide. Every cell
holds a *box*: a part of its probability that is the same for all its numbers, a whole multiple of
2^-16 together, and nowhere more than the probability itself. A word of 64 random bits is one draw:

- its upper 16 bits choose one of 2^16 *slots*. 99 in 100 belong to the box of a cell, and the low w
  bits choose a number of that cell, each as likely as the other. This part is exact.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
_SLOT_SHIFT = np.uint64(48)
_FINEST = 128  # cells per S, at most; half as many at least
_BELOW = 1.0 - 2.0**-30  # keeps a box under the probability, whatever float64 rounded
_ABOVE = 1.0 + 2.0**-30  # keeps a lid over it
_AHEAD = 4096  # proposals from the rest that are made at once, where many will be needed


def slack(coordinates: int) -> Slack:
    """How far `coordinates` independent draws may be from ideal ones."""
    return Slack(coordinates * LOG_RATIO, coordinates * MASS)


@dataclass(frozen=True, slots=True, eq=False)
class RoundedNormal:
    """The tables for one scale S.

    Attributes:
        scale: S, the standard deviation in whole steps.
        bits: w; a cell holds 2^w numbers.
        starts: first number of the cell of each slot, as the bits of BIAS + number, uint64 (2^16,).
        boxes: how many slots belong to boxes; the others stand for the rest.
        rest: what the boxes leave.
    """

    scale: float
    bits: int
    starts: NDArray[np.uint64]
    boxes: int
    rest: Rest

    @property
    def low(self) -> np.uint64:
        """The w lowest bits."""
        return np.uint64((1 << self.bits) - 1)

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
        cells: which cell each slot proposes, int64 (2^16,).
        first: first number of each cell, int64 (cells,).
        box: probability of each number in the cell's box, float64 (cells,).
        lid: as much as the rest of any number in the cell, or more, float64 (cells,).
    """

    cells: Wholes
    first: Wholes
    box: Floats
    lid: Floats


class Drawer:
    """Draws up to `room` numbers at a time, in buffers that are used again.

    A number k is handed out as the float64 `BIAS + k`: there the low bits of the number are the
    low bits of the float, so that putting the two together costs nothing.
    """

    def __init__(self, room: int) -> None:
        """Make the buffers."""
        self._room = room
        self._words = np.empty(room, np.uint64)
        self._slots = np.empty(room, np.int64)
        self._numbers = np.empty(room, np.uint64)
        self._in_rest = np.empty(room, np.bool_)

    def begin(self, entropy: Entropy) -> None:
        """Draw from `entropy` from here on, and nothing that was drawn ahead from another."""
        self._entropy = entropy
        self._ahead: dict[RoundedNormal, Wholes] = {}

    def draw(self, tables: RoundedNormal, count: int) -> Floats:
        """`count` independent numbers, each as BIAS + number: valid until the next call."""
        words, slots = self._words[:count], self._slots[:count]
        numbers, in_rest = self._numbers[:count], self._in_rest[:count]
        self._entropy.fill(words.data)
        np.right_shift(words, _SLOT_SHIFT, out=slots.view(np.uint64))
        np.take(tables.starts, slots, out=numbers, mode="clip")  # never clips; "raise" would copy
        np.bitwise_or(numbers, np.bitwise_and(words, tables.low, out=words), out=numbers)
        missing = np.flatnonzero(np.greater_equal(slots, tables.boxes, out=in_rest))
        drawn = numbers.view(np.float64)
        if missing.size:
            drawn[missing] = BIAS + self._from_rest(tables, missing.size, count)
        return drawn

    def _from_rest(self, tables: RoundedNormal, missing: int, count: int) -> Wholes:
        """`missing` numbers of the rest: independent of where they will stand, so drawn ahead."""
        ahead = self._ahead.get(tables, np.empty(0, np.int64))
        tries = max(2 * missing, _AHEAD if count == self._room else 0)
        while ahead.size < missing:
            ahead = np.concatenate([ahead, _accepted(tables, tries, self._entropy)])
        self._ahead[tables] = ahead[missing:]
        return ahead[:missing]


def _accepted(tables: RoundedNormal, tries: int, entropy: Entropy) -> Wholes:
    """Those of `tries` proposals from the rest that are accepted."""
    words, high, low = random_words(3 * tries, entropy).reshape(3, tries)
    rest = tables.rest
    cells = rest.cells[(words >> _SLOT_SHIFT).view(np.int64)]
    numbers = rest.first[cells] | (words & tables.low).view(np.int64)
    left = _probability(numbers, tables.scale) - rest.box[cells]
    coin = high * 2.0**-64 + low * 2.0**-128
    return np.asarray(numbers[coin * rest.lid[cells] < left], np.int64)


def _probability(numbers: Wholes, scale: float) -> Floats:
    """P(round(S * N(0, 1)) = k), for S >= 2^10 and |k| <= 11 S."""
    x = numbers / scale
    square = x * x
    narrow = 1.0 / (24.0 * scale * scale)
    bend = (square - 1.0) * narrow + ((square - 6.0) * square + 3.0) * (0.3 * narrow * narrow)
    density = np.exp(-0.5 * square) * (1.0 / (scale * math.sqrt(2.0 * math.pi)))
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
    starts = np.full(_SLOTS, BIAS)
    boxes = int(filled.sum())
    starts[:boxes] += np.repeat(first, filled)
    rest = _rest(first, box, (_probability(near, scale) - box) * _ABOVE)
    return RoundedNormal(scale, bits, starts.view(np.uint64), boxes, rest)


def _rest(first: Wholes, box: Floats, largest: Floats) -> Rest:
    """Slots by the largest rest of each cell, rounded up; those that remain go to the first one."""
    unit = largest.sum() / (_SLOTS - largest.size)  # rounding up adds less than one slot per cell
    lids = np.ceil(largest / unit).astype(np.int64)
    lids[0] += _SLOTS - lids.sum()
    return Rest(np.repeat(np.arange(first.size), lids), first, box, lids * unit)
