"""What is drawn has the probabilities that the module promises, exactly and in samples."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from sentinel.crew import share_out
from sentinel.mechanism import SystemEntropy, slack
from sentinel.mechanism import rounded_normal as module
from sentinel.mechanism.rounded_normal import (
    BIAS,
    LARGEST_SCALE,
    LOG_RATIO,
    MASS,
    REACH,
    SMALLEST_SCALE,
    Drawer,
    RoundedNormal,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ROOM = 1 << 17
SLOTS = 1 << 16


def numbers(scale: float, count: int, entropy: object) -> np.ndarray:
    """`count` draws, in whole steps."""
    drawer = Drawer(ROOM)
    drawer.begin(entropy, count)
    tables = RoundedNormal.of(scale)
    drawn = [
        drawer.draw(tables, min(ROOM, count - start), 1.0).numpy() + BIAS
        for start in range(0, count, ROOM)
    ]
    return np.concatenate([np.empty(0), *drawn])


def exact_probability(number: int, scale: float) -> mpmath.mpf:
    """P(round(S * N(0, 1)) = k) to 50 digits, from the tail that does not cancel."""
    low = (abs(number) - mpmath.mpf(1) / 2) / mpmath.mpf(scale) / mpmath.sqrt(2)
    high = (abs(number) + mpmath.mpf(1) / 2) / mpmath.mpf(scale) / mpmath.sqrt(2)
    return (mpmath.erfc(low) - mpmath.erfc(high)) / 2


def drawn_probabilities(tables: RoundedNormal) -> tuple[np.ndarray, list[mpmath.mpf]]:
    """Every number that can be drawn, and its probability, summed without rounding.

    Only the coin is taken as ideal; its own error has a test of its own.
    """
    width, rest = 1 << tables.bits, tables.rest
    every = np.concatenate([start + np.arange(width) for start in rest.first])
    cells = np.repeat(np.arange(rest.first.size), width)
    boxes = Fraction(tables.boxes, SLOTS)
    counted = np.bincount(rest.cells, minlength=rest.first.size)
    left = module._probability(every, tables.scale) - rest.box[cells]
    accepted = [
        Fraction(int(counted[cell]), SLOTS * width) * Fraction(value) / Fraction(rest.lid[cell])
        for cell, value in zip(cells.tolist(), left.tolist(), strict=True)
    ]
    share = (1 - boxes) / sum(accepted)
    drawn = [
        Fraction(rest.box[cell]) + share * part
        for cell, part in zip(cells.tolist(), accepted, strict=True)
    ]
    assert sum(drawn) == 1
    return every, [mpmath.mpf(q.numerator) / q.denominator for q in drawn]


def test_every_probability_is_within_the_stated_ratio_of_the_ideal_one() -> None:
    """At the coarsest grid, where the series is at its worst; every 5th number, and the ends."""
    scale = SMALLEST_SCALE
    with mpmath.workdps(50):
        every, drawn = drawn_probabilities(RoundedNormal.of(scale))
        looked_at = [*range(0, every.size, 5), every.argmin(), every.argmax()]
        worst = max(
            abs(mpmath.log(drawn[at] / exact_probability(int(every[at]), scale)))
            for at in looked_at
        )
        assert worst <= LOG_RATIO / 2
        # Whole cells end at most one cell short of 11 S; what lies beyond is the stated mass.
        assert every.min() == -every.max() - 1
        assert every.max() >= (REACH - 1 / 64) * scale
        assert mpmath.erfc((every.max() + 0.5) / mpmath.mpf(scale) / mpmath.sqrt(2)) <= MASS


@pytest.mark.soak
@pytest.mark.parametrize("scale", [1449.17, 2047.9])
def test_the_ratio_holds_at_other_scales_as_well(scale: float) -> None:
    with mpmath.workdps(50):
        every, drawn = drawn_probabilities(RoundedNormal.of(scale))
        for number, q in zip(every.tolist(), drawn, strict=True):
            assert abs(mpmath.log(q / exact_probability(number, scale))) <= LOG_RATIO / 2


def test_no_box_exceeds_the_probability_and_no_rest_its_lid() -> None:
    for scale in (SMALLEST_SCALE, 1449.17, 2.0**20 + 1, 2.0**33.3, LARGEST_SCALE):
        tables = RoundedNormal.of(scale)
        rest, width = tables.rest, 1 << tables.bits
        for numbers in (rest.first, rest.first + width - 1, rest.first + width // 2):
            left = module._probability(numbers, scale) - rest.box
            assert (left > 0).all()
            assert (left <= rest.lid).all()
        assert rest.cells.size == SLOTS
        assert 0.98 < tables.boxes / SLOTS < 1.0


class Script:
    """Only for testing! Gives the words that it was told, and no more."""

    def __init__(self, words: np.ndarray) -> None:
        """Keep the words, uint64 (n,)."""
        self.words = words

    def fill(self, buffer: memoryview) -> None:
        """The next words."""
        out = np.frombuffer(buffer, dtype=np.uint64)
        given, self.words = np.split(self.words, [out.size])
        out[:] = given


def test_the_coin_is_read_from_its_leading_one_on() -> None:
    """So that an acceptance as rare as 2^-83 keeps its probability to 2^-44 of itself.

    Where the second word is not drawn, whatever it could have been is met as well.
    """
    generator = np.random.default_rng(0)
    high, low = generator.integers(0, 2**64, (2, 2000), dtype=np.uint64)
    high >>= np.tile(np.arange(8, 13, dtype=np.uint64), 400)  # to both sides of 2^54
    high[::7] = 0
    low[::3] = 2**64 - 1
    script = Script(low[high < 2**54])
    assert 0 < script.words.size < low.size
    coin = module._read(high, script)
    assert not script.words.size
    for a, b, value in zip(high.tolist(), low.tolist(), coin.tolist(), strict=True):
        exact = Fraction((a << 64) + b, 1 << 128)
        assert abs(Fraction(value) - exact) <= exact / 2**52
    assert np.array_equal(coin, high * 2.0**-64 + low * 2.0**-128)
    smallest = min(
        float(module._probability(np.array([t.rest.first[0]]), t.scale)[0] / t.rest.lid[0])
        for t in (RoundedNormal.of(SMALLEST_SCALE), RoundedNormal.of(2.0**30))
    )
    assert smallest > 2.0**-83


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1449.17, 2.0**20, 2.0**33.3])
def test_draws_are_normal_and_other_scales_are_rejected(fixed_entropy, scale: float) -> None:
    draws = numbers(scale, 400_000, fixed_entropy(1))
    assert np.array_equal(draws, np.rint(draws))
    standard = draws / scale
    assert stats.kstest(standard, "norm").pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(standard * wrong, "norm").pvalue < 1e-12
    assert abs(standard.mean()) < 5 / math.sqrt(standard.size)
    assert standard.var() == pytest.approx(1.0, abs=0.012)
    assert stats.kurtosis(standard) == pytest.approx(0.0, abs=0.05)


def test_boxes_and_rest_together_fill_fine_bins_evenly(fixed_entropy) -> None:
    """Chi-square over bins of a few numbers each: seams between cells would show."""
    scale = SMALLEST_SCALE
    draws = numbers(scale, 2_000_000, fixed_entropy(2))
    edges = np.arange(-3 * scale, 3 * scale, 5) + 0.5
    seen, _ = np.histogram(draws, edges)
    expected = np.diff(stats.norm.cdf(edges / scale)) * draws.size
    found = ((seen - expected) ** 2 / expected).sum()
    assert 1e-4 < stats.chi2.sf(found, seen.size) < 1 - 1e-4


def test_neighbours_and_their_squares_do_not_go_together(fixed_entropy) -> None:
    draws = numbers(2.0**20, 500_000, fixed_entropy(3)) / 2.0**20
    for values in (draws, draws**2):
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.007


def tail_counts(draws: int, beyond: list[float]) -> list[int]:
    """How many of so many draws lie farther out than each bound, in standard deviations."""
    scale = 2.0**20

    def start() -> Callable[[int], list[int]]:
        drawer, tables = Drawer(ROOM), RoundedNormal.of(scale)

        def count(chunks: int) -> list[int]:
            drawer.begin(SystemEntropy(), chunks * ROOM)
            found = [0] * len(beyond)
            for _ in range(chunks):
                far = np.abs(drawer.draw(tables, ROOM, 1.0).numpy() + BIAS)
                far = far[far > beyond[0] * scale]
                found = [
                    n + int((far > z * scale).sum()) for n, z in zip(found, beyond, strict=True)
                ]
            return found

        return count

    chunks = draws // ROOM
    parts = share_out([100] * (chunks // 100), start)
    return [sum(column) for column in zip(*parts, strict=True)]


def expected_beyond(draws: int, z: float) -> float:
    return draws // ROOM // 100 * 100 * ROOM * 2 * stats.norm.sf(z)


def test_tails_reach_beyond_what_a_float32_uniform_allows() -> None:
    """2 * 10^8 draws: 1359 beyond 4.5 sigma are expected, 115 beyond 5."""
    draws, beyond = 2 * 10**8, [4.5, 5.0]
    for seen, z in zip(tail_counts(draws, beyond), beyond, strict=True):
        expected = expected_beyond(draws, z)
        assert abs(seen - expected) < 5 * math.sqrt(expected)


@pytest.mark.soak
def test_far_tails_have_their_rate() -> None:
    """10^10 draws: about 380 beyond 5.5 sigma are expected, and about 20 beyond 6."""
    near, far = tail_counts(10**10, [5.5, 6.0])
    assert 280 <= near <= 480
    assert 6 <= far <= 40


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1449.17, LARGEST_SCALE])
def test_the_ends_of_the_words_are_the_ends_of_their_cells(scale: float) -> None:
    """Slot by slot: the w bits below it at zeros and at ones; what lies lower has no part."""
    tables = RoundedNormal.of(scale)
    slots = np.arange(tables.boxes).astype(np.uint64)
    first = tables.rest.first[box_cells(tables)[slots.astype(np.int64)]]
    place, unused = np.uint64(48), np.uint64((1 << (48 - tables.bits)) - 1)
    within = np.uint64((1 << 48) - 1) - unused
    for below, expected in (
        (np.uint64(0), first),
        (unused, first),
        (within, first + (1 << tables.bits) - 1),
        (within | unused, first + (1 << tables.bits) - 1),
    ):
        drawn = numbers(scale, slots.size, Script(slots << place | below))
        assert np.array_equal(drawn, expected)


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1449.17, LARGEST_SCALE])
def test_proposals_of_the_rest_fill_their_cells_and_a_coin_of_zero_takes_them(scale: float) -> None:
    tables = RoundedNormal.of(scale)
    slots = np.arange(SLOTS).astype(np.uint64) << np.uint64(48)
    coins = np.zeros(SLOTS, np.uint64)
    first = tables.rest.first[tables.rest.cells]
    for below, expected in (0, first), (2**48 - 1, first + (1 << tables.bits) - 1):
        script = Script(np.concatenate([slots | np.uint64(below), coins, coins]))
        assert np.array_equal(module._accepted(tables, SLOTS, script), expected)
        assert not script.words.size


def test_the_first_slot_after_the_boxes_stands_for_the_rest() -> None:
    """And the last one of them does not: it takes no further word."""
    tables = RoundedNormal.of(SMALLEST_SCALE)
    last = SLOTS - 1
    further = [last << 48, last << 48, 0, 0, 0, 0]  # two proposals, their coins of two words each
    words = [tables.boxes - 1 << 48], [tables.boxes << 48, *further]
    cell = box_cells(tables)[-1], tables.rest.cells[last]
    assert cell[0] != cell[1]
    for given, expected in zip(words, cell, strict=True):
        script = Script(np.array(given, np.uint64))
        assert numbers(SMALLEST_SCALE, 1, script).tolist() == [tables.rest.first[expected]]
        assert not script.words.size


def box_cells(tables: RoundedNormal) -> np.ndarray:
    """For each slot of a box, which cell it is, counted from 0: by the boxes' probabilities."""
    width = 1 << tables.bits
    counted = tables.rest.box * width * SLOTS
    assert np.array_equal(counted, np.rint(counted))
    return np.repeat(np.arange(counted.size), counted.astype(np.int64))


def test_tables_made_in_inference_mode_serve_outside_it_as_well(fixed_entropy) -> None:
    module._tables.cache_clear()
    with torch.inference_mode():
        inside = numbers(2.0**21, 1000, fixed_entropy(6))
    assert np.array_equal(inside, numbers(2.0**21, 1000, fixed_entropy(6)))


@pytest.mark.parametrize("step", [2.0**-1074, 2.0**-20, 2.0**970])
def test_draws_are_whole_steps_of_any_grid(fixed_entropy, step: float) -> None:
    tables = RoundedNormal.of(2.0**22)
    outcomes = []
    for width in (1.0, step):
        drawer = Drawer(5000)
        drawer.begin(fixed_entropy(4), 5000)
        outcomes.append(drawer.draw(tables, 5000, width).numpy())
    assert np.array_equal(outcomes[0] * step, outcomes[1])
    assert np.unique(outcomes[1]).size > 4900


def test_as_many_proposals_are_made_as_the_tables_say(fixed_entropy) -> None:
    """For a hundred thousand draws: about a thousand accepted proposals of the rest."""
    for scale in (SMALLEST_SCALE, 2047.9, 2.0**22):
        tables = RoundedNormal.of(scale)
        tries = round(10**5 * tables.rest.proposals)
        accepted = module._accepted(tables, tries, fixed_entropy(5)).size
        expected = 10**5 * (1.0 - tables.boxes / SLOTS)
        assert abs(accepted - expected) < 5 * math.sqrt(expected)


def test_what_is_drawn_ahead_from_one_source_is_not_used_for_another(fixed_entropy) -> None:
    """Else the noise of a block would depend on what the same thread did before."""
    tables, outcomes = RoundedNormal.of(2.0**22), []
    for before in (0, 1):
        drawer = Drawer(ROOM)
        for source in [fixed_entropy(8)] * before + [fixed_entropy(9)]:
            drawer.begin(source, ROOM)
            drawn = drawer.draw(tables, ROOM, 1.0).numpy().copy()
        outcomes.append(drawn)
    assert np.array_equal(*outcomes)


@pytest.mark.parametrize("count", [0, 1, 2, ROOM, ROOM + 1])
def test_any_number_of_draws_can_be_had(count: int) -> None:
    draws = numbers(2.0**20, count, SystemEntropy())
    assert draws.shape == (count,)
    assert np.isfinite(draws).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, SMALLEST_SCALE * 0.999, LARGEST_SCALE * 2, math.nan])
def test_a_grid_too_coarse_or_too_fine_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="steps of the grid"):
        RoundedNormal.of(scale)


def test_slack_of_a_release_of_a_hundred_million_values_is_small() -> None:
    """At most 1 % of an epsilon of .02 and of any delta that means anything."""
    found = slack(10**8)
    assert 2 * found.log_ratio < 0.01 * 0.02
    assert found.mass < 0.01 * 1e-12
    assert slack(0) == type(found)(0.0, 0.0)
