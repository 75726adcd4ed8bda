"""Noise that is not ideal costs what `loosen` adds, and no guarantee is claimed beyond it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.privacy.slack import loosen
from sentinel.terms import Slack


def gaussian(delta: float) -> float:
    return float(get_epsilon_gaussian(1.0, delta))


def test_without_slack_nothing_changes_bit_for_bit() -> None:
    assert loosen(gaussian, 1e-5, Slack()) == gaussian(1e-5)


@given(st.floats(0, 0.5), st.floats(0, 1e-6), st.floats(1e-9, 1e-3))
@settings(max_examples=60, deadline=None)
def test_slack_never_lowers_epsilon(log_ratio: float, mass: float, delta: float) -> None:
    loosened = loosen(gaussian, delta, Slack(log_ratio, mass))
    assert loosened >= gaussian(delta) + 2 * log_ratio - 1e-12


@given(st.floats(0, 0.2), st.floats(0, 1e-8), st.floats(1e-7, 1e-3))
@settings(max_examples=60, deadline=None)
def test_what_is_returned_fits_the_promised_delta(
    log_ratio: float, mass: float, delta: float
) -> None:
    """Some delta' gives this epsilon and keeps e^L delta' + e^(eps + L) m at or below delta."""
    asked: list[float] = []

    def remembered(share: float) -> float:
        asked.append(share)
        return gaussian(share)

    epsilon = loosen(remembered, delta, Slack(log_ratio, mass))
    if epsilon == math.inf:
        return
    ideal = epsilon - 2 * log_ratio
    assert ideal == pytest.approx(gaussian(asked[-1]), rel=1e-12)
    used = math.exp(log_ratio) * asked[-1] + math.exp(ideal + log_ratio) * mass
    assert used <= delta * (1 + 1e-12)


def test_the_slack_of_a_good_sampler_costs_almost_nothing() -> None:
    """Ratio 1e-4 and mass 1e-25 cost two ratios and a thousandth of a percent."""
    cost = loosen(gaussian, 1e-5, Slack(1e-4, 1e-25)) - gaussian(1e-5)
    assert 2e-4 <= cost < 2.5e-4


@pytest.mark.parametrize("slack", [Slack(0.0, 1e-5), Slack(0.0, 1.0), Slack(20.0, 1e-13)])
def test_where_slack_eats_up_delta_nothing_is_promised(slack: Slack) -> None:
    assert loosen(gaussian, 1e-5, slack) == math.inf


def test_an_infinite_epsilon_stays_infinite() -> None:
    assert loosen(lambda _: math.inf, 1e-5, Slack(1e-4, 0.0)) == math.inf
    assert loosen(lambda _: math.inf, 1e-5, Slack(1e-4, 1e-25)) == math.inf


def hockey_stick(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(first - math.exp(epsilon) * second, 0).sum())


def smallest_epsilon(first: np.ndarray, second: np.ndarray, delta: float) -> float:
    """By bisection on the true divergence of two known distributions; infinite above 60."""
    low, high = 0.0, 60.0
    if hockey_stick(first, second, high) > delta:
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if hockey_stick(first, second, middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("cut", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("delta", [1e-2, 0.1])
def test_a_truncated_and_perturbed_gaussian_obeys_the_bound(
    ratio: float, cut: float, delta: float
) -> None:
    """Noise on a grid, cut off and wrong by e^+-ratio: its true epsilon is below ours."""
    per_unit = 20  # grid cells in one standard deviation, which is also the distance
    grid = np.arange(-12 * per_unit, 12 * per_unit + 1) / per_unit
    ideal = np.exp(-(grid**2) / 2)
    ideal /= ideal.sum()
    sign = np.where(np.floor(grid) % 2 == 0, 1.0, -1.0)  # the other way round one unit further
    drawn = np.where(np.abs(grid) > cut, 0.0, ideal * np.exp(ratio * sign))
    drawn /= drawn.sum()
    kept = drawn > 0
    slack = Slack(float(np.abs(np.log(drawn[kept] / ideal[kept])).max()), float(ideal[~kept].sum()))

    def neighbours(noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        empty = np.zeros(per_unit)
        return np.concatenate([noise, empty]), np.concatenate([empty, noise])

    ours = loosen(lambda share: smallest_epsilon(*neighbours(ideal), share), delta, slack)
    true = smallest_epsilon(*neighbours(drawn), delta)
    assert true <= ours
    if ratio == 0.2:  # the test of the test: without the slack the bound would be wrong
        assert true > smallest_epsilon(*neighbours(ideal), delta)


def test_a_cut_off_alone_is_seen() -> None:
    """Cut at three standard deviations the promise at delta 1e-3 is gone, and we say so."""
    mass = math.erfc(3 / math.sqrt(2))
    assert loosen(gaussian, 1e-3, Slack(0.0, mass)) == math.inf
