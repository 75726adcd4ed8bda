"""What right guesses prove: against the paper's figures, against exact tails, and in its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sentinel.errors import MisuseError
from sentinel.stress.inference.one_run import Guesses, count, guess, lower_bound, p_value


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("guesses", "delta", "published"),
    [
        (Guesses(1000, 100, 75), 1e-4, 0.673),  # appendix D
        (Guesses(100_000, 1510, 1439), 1e-5, 2.675),  # section 7
    ],
)
def test_the_bounds_printed_in_the_paper_are_found(guesses, delta, published) -> None:
    """Steinke et al., arXiv 2305.08846v1; the second one is cut off there, not rounded."""
    assert lower_bound([guesses], delta) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("made", "right"), [(100, 75), (40, 40), (500, 300), (64, 63)])
def test_without_delta_it_is_the_clopper_pearson_bound(made, right) -> None:
    share = stats.beta.ppf(0.05, right, made - right + 1)
    expected = max(0.0, math.log(share / (1 - share)))
    assert lower_bound([Guesses(1000, made, right)]) == pytest.approx(expected, abs=1e-6)


def test_all_right_gives_the_bound_in_its_guarantees() -> None:
    x = 0.05 ** (1 / 200)
    bound = lower_bound([Guesses(200, 200, 200)])
    assert bound == pytest.approx(math.log(x / (1 - x)), abs=1e-9)
    assert bound == pytest.approx(math.log(200 / math.log(20)), abs=0.01)


def test_the_delta_term_is_the_largest_mean_of_a_window_below() -> None:
    """Recomputed window by window, with exact integers."""
    guesses, epsilon, delta = Guesses(30, 12, 9), 0.7, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(12, k) * q**k * (1 - q) ** (12 - k) for k in range(13)]
    alpha = max(sum(mass[9 - i : 9]) / i for i in range(1, 10))
    expected = sum(mass[9:]) + 2 * 30 * delta * alpha
    assert p_value(guesses, epsilon, delta) == pytest.approx(expected, rel=1e-12)


def test_no_right_guess_and_a_large_delta_say_nothing() -> None:
    assert p_value(Guesses(100, 10, 0), 0.0, 1e-5) == 1.0
    assert p_value(Guesses(10_000, 1000, 900), 0.1, 0.1) == 1.0
    assert lower_bound([Guesses(10_000, 1000, 900)], 0.1) == 0.0


def test_as_many_right_as_wrong_prove_nothing() -> None:
    for right in (0, 20, 50):
        assert lower_bound([Guesses(100, 100, right)], 1e-5) == 0.0


def test_several_attacks_are_held_to_a_share_of_the_level_each() -> None:
    one, other = Guesses(1000, 100, 90), Guesses(1000, 600, 400)
    alone = max(lower_bound([one], 1e-5), lower_bound([other], 1e-5))
    together = lower_bound([one, other], 1e-5)
    assert together < alone
    assert together == pytest.approx(
        max(lower_bound([g], 1e-5, confidence=0.975) for g in (one, other))
    )


@given(
    made=st.integers(2, 400),
    share=st.floats(0.5, 1.0),
    idle=st.integers(0, 2000),
    delta=st.sampled_from([0.0, 1e-6, 1e-5, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_more_right_guesses_and_a_smaller_delta_never_lower_the_bound(
    made, share, idle, delta
) -> None:
    right = min(made - 1, int(share * made))
    fewer = lower_bound([Guesses(made + idle, made, right)], delta)
    assert lower_bound([Guesses(made + idle, made, right + 1)], delta) >= fewer - 1e-6
    assert lower_bound([Guesses(made + idle, made, right)], 10 * delta) <= fewer + 1e-6


@given(
    made=st.integers(2, 400),
    share=st.floats(0.5, 1.0),
    delta=st.sampled_from([0.0, 1e-6, 1e-5, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_every_epsilon_below_the_bound_is_refuted(made, share, delta) -> None:
    """So the bisection misses no epsilon in between that the guesses agree with."""
    guesses = Guesses(2 * made, made, max(1, int(share * made)))
    bound = lower_bound([guesses], delta)
    for part in range(40):
        assert p_value(guesses, bound * part / 40, delta) < 0.05 or bound == 0.0
    assert p_value(guesses, bound + 1e-6, delta) >= 0.05 * (1 - 1e-3)


def test_randomised_response_is_refuted_no_more_often_than_the_level_says() -> None:
    """The most revealing mechanism there is at epsilon 1: the p-value must still be one."""
    epsilon, trials, generator = 1.0, 4000, seeded()
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    right = (torch.rand(trials, 100, generator=generator) < keep).sum(1).tolist()
    over = sum(p_value(Guesses(100, 100, v), epsilon, 0.0) <= 0.05 for v in right)
    assert 0.01 * trials < over <= 0.06 * trials  # the test has power, and no more than it may


def test_guesses_are_the_highest_and_the_lowest_scores() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0, -7.0])
    assert guess(scores, 2).tolist() == [0, 0, 0, 0, 1, -1]
    assert guess(scores, 6).tolist() == [1, -1, 1, -1, 1, -1]


def test_scores_that_know_nothing_of_the_coins_prove_nothing() -> None:
    """In 200 runs; the level allows about ten, and without delta as many are seen."""
    generator, over = seeded(1), 0
    for _ in range(200):
        coins = torch.rand(1000, generator=generator) < 0.5
        guesses = count(guess(torch.randn(1000, generator=generator), 100), coins)
        over += lower_bound([guesses]) > 0.0
    assert 1 <= over <= 22


def test_equal_scores_are_told_apart_by_their_place_alone() -> None:
    assert guess(torch.zeros(4), 4).tolist() == [-1, -1, 1, 1]


def test_guesses_are_counted_against_the_coins() -> None:
    coins = torch.tensor([True, False, True, False])
    guessed = torch.tensor([1, 1, 0, -1], dtype=torch.int8)
    assert count(guessed, coins) == Guesses(canaries=4, made=3, right=2)


@pytest.mark.parametrize("made", [0, 1, 3, 8])
def test_an_impossible_number_of_guesses_is_refused(made) -> None:
    with pytest.raises(MisuseError, match="even number"):
        guess(torch.zeros(6), made)


def test_a_score_that_is_nan_is_refused() -> None:
    with pytest.raises(MisuseError, match="NaN"):
        guess(torch.tensor([0.0, float("nan")]), 2)


@pytest.mark.parametrize("counts", [(10, 0, 0), (10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_counts_that_cannot_be_are_refused(counts) -> None:
    with pytest.raises(MisuseError, match="at least one guess"):
        Guesses(*counts)


@pytest.mark.parametrize(
    ("attacks", "delta", "confidence"),
    [([], 0.0, 0.95), ([Guesses(9, 9, 9)], -1.0, 0.95), ([Guesses(9, 9, 9)], 0.0, 1.0)],
)
def test_a_bound_of_nothing_or_without_confidence_is_refused(attacks, delta, confidence) -> None:
    with pytest.raises(MisuseError, match="at least one attack"):
        lower_bound(attacks, delta, confidence=confidence)
