"""The intervals agree with the published tables and cover what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel.errors import MisuseError
from sentinel.interval import Count, difference, of_mean, wilson


@st.composite
def counts(draw: st.DrawFn) -> Count:
    trials = draw(st.integers(1, 5000))
    return Count(draw(st.integers(0, trials)), trials)


@pytest.mark.parametrize(
    ("count", "expected"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (Count(81, 263), (0.2553, 0.3662)),
        (Count(15, 148), (0.0624, 0.1605)),
        (Count(0, 20), (0.0, 0.1611)),
        (Count(1, 29), (0.0061, 0.1718)),
    ],
)
def test_wilson_gives_the_published_ends(count: Count, expected: tuple[float, float]) -> None:
    found = wilson(count)
    assert (found.low, found.high) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10
        (Count(56, 70), Count(48, 80), (0.0524, 0.3339)),
        (Count(9, 10), Count(3, 10), (0.1705, 0.8090)),
        (Count(10, 10), Count(0, 20), (0.6791, 1.0)),
    ],
)
def test_difference_gives_the_published_ends(
    first: Count, second: Count, expected: tuple[float, float]
) -> None:
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx(expected, abs=5e-5)


@given(counts(), counts())
def test_the_interval_holds_the_observed_difference_and_turns_with_its_arguments(
    first: Count, second: Count
) -> None:
    found, turned = difference(first, second), difference(second, first)
    assert found.low - 1e-12 <= first.share - second.share <= found.high + 1e-12
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))


@given(counts())
def test_no_count_of_hits_makes_anything_certain(count: Count) -> None:
    """Nothing seen is not nothing there: the upper end of zero hits is above zero."""
    found = wilson(count)
    assert found.high > 0.0
    assert found.low < 1.0
    assert 0.0 <= found.low <= found.high <= 1.0


@given(counts())
def test_more_confidence_is_a_wider_interval(count: Count) -> None:
    narrow, wide = wilson(count, confidence=0.8), wilson(count, confidence=0.99)
    assert wide.low <= narrow.low + 1e-12
    assert narrow.high <= wide.high + 1e-12


def test_the_upper_end_covers_the_truth_as_often_as_it_says() -> None:
    """At shares as small as the ones that are claimed, 95 % and not much more."""
    rng = np.random.default_rng(7)
    truth, trials, others = 0.03, 644, 276
    hits = rng.binomial(trials, 0.05, 2000), rng.binomial(others, 0.05 - truth, 2000)
    found = [
        difference(Count(int(a), trials), Count(int(b), others)) for a, b in zip(*hits, strict=True)
    ]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_an_impossible_count_is_refused(hits: int, trials: int) -> None:
    with pytest.raises(MisuseError, match="at least one trial"):
        Count(hits, trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_a_confidence_outside_zero_to_one_is_refused(confidence: float) -> None:
    with pytest.raises(MisuseError, match="between 0 and 1"):
        wilson(Count(1, 2), confidence=confidence)


def test_the_interval_of_a_mean_is_students() -> None:
    """Reference: t(.975, 2) = 4.3027 in the published tables, and .95 of 9 as 1.8331."""
    ends = of_mean([1.0, 2.0, 3.0])
    reach = 4.3027 / 3**0.5
    assert (ends.low, ends.high) == (
        pytest.approx(2 - reach, abs=1e-4),
        pytest.approx(2 + reach, abs=1e-4),
    )
    ten = of_mean([float(value) for value in range(10)], confidence=0.9)
    assert ten.high - 4.5 == pytest.approx(1.8331 * np.std(range(10), ddof=1) / 10**0.5, abs=1e-4)
