"""Thresholds hold their rate, p-values are uniform, and bets against exchangeable rounds lose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from sentinel.detection import conformal
from sentinel.errors import MisuseError

ROUNDS, ALPHA, REPEATS = 99, 0.05, 2000


def coin_of(seed: int) -> object:
    return conformal.coins(seed.to_bytes(4, "big"))


def thresholds(generator: np.random.Generator) -> list[conformal.Threshold]:
    return [conformal.threshold(generator.random(ROUNDS).tolist(), ALPHA) for _ in range(REPEATS)]


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.3, 3), (0.07, 14), (0.001, 999)]
)
def test_the_least_number_of_rounds_is_enough_and_one_fewer_is_not(
    alpha: float, needed: int
) -> None:
    assert conformal.rounds_needed(alpha) == needed
    scores = [place / needed for place in range(needed)]
    assert conformal.threshold(scores, alpha).score == max(scores)
    with pytest.raises(MisuseError, match=f"takes {needed} rounds; there are {needed - 1}"):
        conformal.threshold(scores[1:], alpha)


@given(st.integers(min_value=1, max_value=3000), st.integers(min_value=1, max_value=999))
def test_the_rank_is_the_one_of_the_definition(n: int, thousandths: int) -> None:
    """As k = ceil((n + 1)(1 - alpha)) in whole numbers: no rounding of alpha moves it."""
    k = -((-(n + 1) * (1000 - thousandths)) // 1000)
    scores = [place / n for place in range(n)]
    if k > n:
        with pytest.raises(MisuseError):
            conformal.threshold(scores, thousandths / 1000)
        return
    found = conformal.threshold(scores, thousandths / 1000)
    assert found.rank == k
    assert found.score == scores[k - 1]
    assert found.expected <= thousandths / 1000 + 1e-12


def test_a_new_round_alarms_as_often_as_was_stated() -> None:
    """Without ties the rate is 5 in 100 exactly, so both sides are checked."""
    generator = np.random.default_rng(1)
    alarms = sum(generator.random() > found.score for found in thresholds(generator))
    low, high = binom.interval(0.9999, REPEATS, ALPHA)
    assert low <= alarms <= high


def test_ties_only_lower_the_rate() -> None:
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(REPEATS):
        *past, new = (np.ceil(generator.random(ROUNDS + 1) ** 2 * 6) / 20).tolist()
        alarms += new > conformal.threshold(past, ALPHA).score
    assert alarms <= binom.ppf(0.9999, REPEATS, ALPHA)
    assert conformal.threshold([0.3] * ROUNDS, ALPHA).score == 0.3


def test_the_confident_rate_is_exceeded_once_in_twenty() -> None:
    """Given the rounds, the rate of uniform scores is 1 - threshold."""
    found = thresholds(np.random.default_rng(3))
    exceeded = sum(1 - one.score > one.confident for one in found)
    low, high = binom.interval(0.9999, REPEATS, 1 - conformal.CONFIDENCE)
    assert low <= exceeded <= high


@pytest.mark.parametrize(("alarms", "rounds"), [(0, 10), (3, 40), (39, 40)])
def test_the_rate_of_a_fixed_threshold_is_bounded_as_clopper_and_pearson_do(
    alarms: int, rounds: int
) -> None:
    scores = [0.9] * alarms + [0.1] * (rounds - alarms)
    found = conformal.rate_at(scores, 0.9)
    assert (found.alarms, found.rounds) == (alarms, rounds)
    assert found.expected == (alarms + 1) / (rounds + 1)
    assert binom.cdf(alarms, rounds, found.confident) == pytest.approx(0.05)


def test_a_rate_of_which_nothing_is_known_is_one() -> None:
    assert conformal.rate_at([], 0.5) == conformal.Rate(0, 0, 1.0, 1.0)
    assert conformal.rate_at([0.5, 0.6], 0.5).confident == 1.0


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_an_alpha_that_is_no_rate_is_misuse(alpha: float) -> None:
    with pytest.raises(MisuseError, match="alpha"):
        conformal.threshold([0.1] * 200, alpha)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_misuse(bad: float) -> None:
    for use in (
        lambda: conformal.threshold([bad] * 200, 0.1),
        lambda: conformal.p_value(0.1, [bad]),
        lambda: conformal.rate_at([bad], 0.5),
        lambda: conformal.smoothed_p_values([], [bad], coin_of(1)),
    ):
        with pytest.raises(MisuseError, match="finite"):
            use()


def test_the_conservative_p_value_is_small_as_seldom_as_it_says() -> None:
    generator = np.random.default_rng(4)
    found = []
    for _ in range(REPEATS):
        *past, new = (np.ceil(generator.random(40) * 8) / 20).tolist()
        found.append(conformal.p_value(new, past))
    for t in (0.05, 0.2, 0.5):
        assert sum(p <= t for p in found) <= binom.ppf(0.9999, REPEATS, t)
    assert conformal.p_value(0.9, [0.1] * 9) == 0.1


def test_smoothed_p_values_are_uniform_and_tell_nothing_of_one_another() -> None:
    """With ties in nearly every place, and rounds that are exchangeable but not independent."""
    generator = np.random.default_rng(5)
    pairs = []
    for repeat in range(1500):
        site = generator.random()  # the same for all rounds of one site
        scores = (np.ceil((site + generator.random(6)) * 3) / 20).tolist()
        pairs.append(conformal.smoothed_p_values(scores[:4], scores[4:], coin_of(repeat)))
    first, second = np.array(pairs).T
    assert kstest(first, "uniform").pvalue > 0.001
    assert kstest(second, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(1500)
    assert kstest(second[first < 0.3], "uniform").pvalue > 0.001


def test_a_higher_score_never_has_a_larger_p_value() -> None:
    past = [0.1, 0.2, 0.2, 0.3, 0.9]
    found = [
        conformal.smoothed_p_values(past, [score], coin_of(3))[0]
        for score in (0.0, 0.1, 0.2, 0.3, 0.5, 0.95)
    ]
    assert found == sorted(found, reverse=True)


def test_coins_are_the_same_for_the_same_place_and_lie_inside() -> None:
    coin, again = coin_of(7), coin_of(7)
    tossed = [coin(place) for place in range(2000)]
    assert tossed == [again(place) for place in range(2000)]
    assert all(0.0 < one < 1.0 for one in tossed)
    assert kstest(tossed, "uniform").pvalue > 0.001
    assert tossed != [coin_of(8)(place) for place in range(2000)]


def test_the_largest_coin_still_leaves_a_p_value_below_one() -> None:
    found = conformal.smoothed_p_values([0.5] * 999, [0.1], lambda _: 1 - 2.0**-53)
    assert 0.999 < found[0] < 1.0
    assert math.isfinite(conformal.bet(found)[-1].log_value)


@pytest.mark.parametrize("before", [[], [0.4], [0.01] * 5, [0.99, 0.02, 0.7]])
def test_the_mean_over_the_next_p_value_is_the_capital_now(before: list[float]) -> None:
    """What makes the capital a martingale, by quadrature: cells of equal probability."""
    now = math.exp(conformal.bet(before)[-1].log_value)
    middles = (np.arange(1000) + 0.5) / 1000
    after = [math.exp(conformal.bet([*before, float(p)])[-1].log_value) for p in middles]
    assert float(np.mean(after)) == pytest.approx(now, rel=1e-4)
    assert float(np.mean(after)) <= now * (1 + 1e-12)  # midpoints of convex bets: never above


def runs(generator: np.random.Generator, repeats: int, shift: float = 0.0) -> list[list[float]]:
    """Scores in twentieths, as the log has them; the last 120 of 160 are shifted."""
    made = generator.normal(0.2, 0.06, (repeats, 160))
    made[:, 40:] += shift
    return (np.ceil(made.clip(0, 1) * 20) / 20).tolist()


def highest(scores: list[float], seed: int) -> conformal.Path:
    p_values = conformal.smoothed_p_values(scores[:40], scores[40:], coin_of(seed))
    return conformal.bet(p_values)[-1]


def test_bets_on_exchangeable_rounds_reach_c_at_most_once_in_c() -> None:
    repeats = 500
    paths = [highest(run, at) for at, run in enumerate(runs(np.random.default_rng(6), repeats))]
    for capital in (4.0, conformal.WARNING, conformal.ALARM):
        reached = sum(path.reached(capital) for path in paths)
        assert reached <= binom.ppf(0.9999, repeats, 1 / capital)
    assert any(path.reached(2.0) for path in paths)  # the bets do bet


def test_p_values_against_the_calibration_alone_would_break_the_bound() -> None:
    """Why they are on-line: of the short cut's paths far more than 1 in 20 reach 20."""
    generator, repeats, reached = np.random.default_rng(7), 100, 0
    for repeat in range(repeats):
        scores = generator.random(420).tolist()
        coin = coin_of(repeat)
        short = [
            conformal.smoothed_p_values(scores[:20], [new], lambda _, at=at, toss=coin: toss(at))[0]
            for at, new in enumerate(scores[20:])
        ]
        reached += conformal.bet(short)[-1].reached(conformal.WARNING)
    assert reached > binom.ppf(0.9999, repeats, 1 / conformal.WARNING)


@pytest.mark.parametrize(("shift", "way"), [(0.12, "higher"), (-0.12, "lower")])
def test_a_shift_is_noticed_and_its_direction_named(shift: float, way: str) -> None:
    paths = [highest(run, at) for at, run in enumerate(runs(np.random.default_rng(8), 40, shift))]
    assert all(path.reached(conformal.ALARM) for path in paths)
    assert {path.way for path in paths} == {way}


def test_a_shift_after_many_calm_rounds_is_noticed_too() -> None:
    generator = np.random.default_rng(9)
    calm, odd = generator.normal(0.2, 0.06, 600), generator.normal(0.3, 0.06, 60)
    scores = np.concatenate((calm, odd)).tolist()
    path = conformal.bet(conformal.smoothed_p_values(scores[:100], scores[100:], coin_of(1)))
    assert not path[500].reached(conformal.WARNING)
    assert path[-1].reached(conformal.ALARM)


@pytest.mark.parametrize("p", [1e-15, math.nextafter(1.0, 0.0)])
def test_one_odd_round_is_no_drift(p: float) -> None:
    path = conformal.bet([p])
    assert path[-1].log_value < math.log(3)
    assert not conformal.bet([0.5] * 50 + [p])[-1].reached(conformal.WARNING)


def test_a_long_shift_does_not_overflow() -> None:
    path = conformal.bet([1e-12] * 400)[-1]
    assert math.isfinite(path.log_value)
    assert path.log_value > 700
    assert path.log_highest >= path.log_value


def test_what_was_reached_stays_reached() -> None:
    path = conformal.bet([0.001] * 5 + [0.5] * 200)
    assert path[-1].reached(conformal.ALARM)
    assert path[-1].log_value < path[-1].log_highest == path[5].log_highest
    assert [one.rounds for one in path] == list(range(206))


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5, math.nan])
def test_a_p_value_at_or_beyond_the_ends_is_misuse(p: float) -> None:
    with pytest.raises(MisuseError, match="p-values"):
        conformal.bet([0.5, p])
