"""Renyi curves against dp-accounting, against closed forms, and against all possible neighbours."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.privacy import renyi
from sentinel.privacy.mechanisms import Composition, Sampled
from sentinel.privacy.renyi import orders, renyi_epsilon, sampled_curve
from sentinel.terms import Adjacency

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE


def librarys(z: float, rate: float) -> np.ndarray:
    logging.disable(logging.WARNING)  # it says which orders it leaves out
    try:
        accountant = RdpAccountant()
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(z)))
    finally:
        logging.disable(logging.NOTSET)
    return np.asarray(accountant.rdp)


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.9])
def test_add_or_remove_is_dp_accountings_at_whole_orders_and_never_above_it(
    z: float, rate: float
) -> None:
    ours, theirs = sampled_curve(Sampled(z, rate, ADD)), librarys(z, rate)
    kept = orders() < 1024  # at noise 0.5 the last order is left out
    whole = kept & (orders() % 1 == 0)
    assert ours[whole] == pytest.approx(theirs[whole], rel=1e-9, abs=1e-8)
    assert (ours <= theirs * (1 + 1e-9) + 1e-8)[kept].all()


@given(z=st.floats(0.3, 20), rate=st.floats(1e-6, 1 - 1e-6))
@settings(max_examples=25, deadline=None)
def test_replace_lies_between_add_or_remove_and_the_unsampled_mechanism(
    z: float, rate: float
) -> None:
    replaced = sampled_curve(Sampled(z, rate, REPLACE))
    assert (replaced >= sampled_curve(Sampled(z, rate, ADD))).all()
    known = np.isfinite(replaced)
    assert (replaced <= 2 * orders() / z**2 * (1 + 1e-9) + 1e-9)[known].all()


@pytest.mark.parametrize(("adjacency", "distance"), [(ADD, 1), (REPLACE, 2)])
def test_a_rate_near_1_gives_the_unsampled_curve_and_a_rate_near_0_nothing(
    adjacency: Adjacency, distance: int
) -> None:
    unsampled = orders() * distance**2 / (2 * 2.0**2)
    small = orders() < 20
    near = sampled_curve(Sampled(2.0, 1 - 1e-12, adjacency))
    assert near[small] == pytest.approx(unsampled[small], rel=1e-3)
    assert (sampled_curve(Sampled(2.0, 1e-9, adjacency))[small] < 1e-10).all()


def test_an_order_that_would_take_too_much_memory_is_left_out() -> None:
    curve = sampled_curve(Sampled(0.05, 0.1, REPLACE))
    assert math.isinf(curve[-1])
    assert math.isfinite(curve[50])


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize(("z", "rate"), [(0.5, 0.5), (1.0, 0.01), (6.0, 0.9)])
def test_a_finer_grid_gives_the_same_integral(
    monkeypatch: pytest.MonkeyPatch, adjacency: Adjacency, z: float, rate: float
) -> None:
    """The trapezoid rule has converged at the step that is used: a third of it changes nothing."""
    step = Sampled(z, rate, adjacency)
    chosen = [renyi._divergence(step, order) for order in (1.1, 2.5, 8.0, 40.0, 256.0)]
    arange = np.arange

    def finer(low: float, high: float, width: float) -> np.ndarray:
        return arange(low, high, width / 3)

    monkeypatch.setattr(renyi.np, "arange", finer)
    again = [
        renyi._divergence(step, order) - math.log(3) / (order - 1)
        for order in (1.1, 2.5, 8.0, 40.0, 256.0)
    ]
    assert again == pytest.approx(chosen, rel=1e-9, abs=1e-10)


def plane(z: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A grid over the plane in which both contributions of a unit lie, in norm bounds."""
    width = z / 12
    line = np.arange(-1 - 9 * z, 1 + 9 * z, width)
    return *np.meshgrid(line, line), width**2 / (2 * math.pi * z**2)


@pytest.mark.parametrize(("z", "rate"), [(0.7, 0.3), (1.0, 0.05), (1.5, 0.9)])
def test_no_two_contributions_lie_further_apart_than_the_pair_of_replace(
    z: float, rate: float
) -> None:
    """Brute force over both contributions in the plane: directions, lengths, and many epsilons."""
    x, y, cell = plane(z)

    def mixture(length: float, angle: float) -> np.ndarray:
        towards = (length * math.cos(angle), length * math.sin(angle))
        absent = np.exp(-(x**2 + y**2) / (2 * z**2))
        present = np.exp(-((x - towards[0]) ** 2 + (y - towards[1]) ** 2) / (2 * z**2))
        return ((1 - rate) * absent + rate * present) * cell

    def delta(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
        return float(np.maximum(first - math.exp(epsilon) * second, 0).sum())

    whole, opposite = mixture(1.0, 0.0), mixture(1.0, math.pi)
    for epsilon in (-1.0, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0):
        most = delta(whole, opposite, epsilon)
        for length in (0.0, 0.3, 0.7, 1.0):
            for other in (0.4, 1.0):
                for angle in np.linspace(0, math.pi, 5):
                    found = delta(mixture(other, 0.0), mixture(length, angle), epsilon)
                    assert found <= most + 1e-9


def test_curves_add_up_with_the_gaussian_part() -> None:
    step = Sampled(1.5, 0.1, ADD)
    accountant = RdpAccountant([order for order in orders() if order % 1 == 0])
    accountant.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5)), 30)
    accountant.compose(GaussianDpEvent(2.0))
    ours = renyi_epsilon(Composition(2.0, ((step, 30),)), 1e-5)
    assert ours <= accountant.get_epsilon(1e-5) + 1e-9
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)


def test_nothing_is_printed_and_no_logger_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    sampled_curve.cache_clear()
    sampled_curve(Sampled(1.0, 0.125, ADD))
    assert not caplog.records
