"""Values that others publish and test for, within their tolerances.

A change of dp-accounting that moves one of them is seen here. What our own interface can express
goes through it; the rest goes to the accountants that it calls.
"""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy.stats import norm

from sentinel.privacy import DpSgdEvent, GaussianEvent, Promise, by_accountant, total
from sentinel.privacy.accounting import EXACT
from sentinel.privacy.loss import LOSS, composed
from sentinel.privacy.mechanisms import compose
from sentinel.privacy.renyi import RENYI
from sentinel.terms import Adjacency, Unit

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE
DELTA = 1e-5


def training(rate: float, z: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(
        unit=Unit.RECORD,
        adjacency=ADD,
        noise_multiplier=z,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=0.0,
        mass=0.0,
    )


def promise(adjacency: Adjacency = ADD, delta: float = DELTA) -> Promise:
    return Promise(Unit.RECORD, adjacency, epsilon=10.0, delta=delta)


def test_opacus_accountants_test() -> None:
    """RDP to 7 places. PLD is a little below what Opacus gets from PRV, and above its GDP."""
    found = by_accountant({training(0.04, 1.5, 2250): 1}, promise())
    assert found[RENYI] == pytest.approx(7.32911117143, abs=5e-8)
    assert 6.60 < found[LOSS] <= 6.777395712150674


@pytest.mark.parametrize(
    ("steps", "z", "accountant"),
    [
        (2250, 1.416, RENYI),  # 90 epochs
        (2250, 1.34765625, LOSS),
        (2000, 1.3562, RENYI),
        (2000, 1.2915, LOSS),
    ],
)
def test_opacus_noise_multipliers_reach_epsilon_8(steps: int, z: float, accountant: str) -> None:
    found = by_accountant({training(0.04, z, steps): 1}, promise())[accountant]
    assert found == pytest.approx(8.0, abs=0.02)
    assert found <= 8.0 + 2e-4  # they round the noise multiplier to four digits


@pytest.mark.parametrize(
    ("rate", "z", "steps", "renyi", "loss"),
    [
        (0.04, 1.5, 2250, 7.32933, 6.76879),
        (0.01, 4, 10000, 1.03549, 0.946999),
        (0.01, 1.1, 14000, 6.81356, 6.29695),
        (256 / 60000, 1.1, 14100, 2.60034, 2.38521),
        (0.1, 1, 100, 7.90385, 7.0466),
    ],
)
def test_cross_check_of_sampled_training(
    rate: float, z: float, steps: int, renyi: float, loss: float
) -> None:
    """The RDP pins are dp-accounting 0.6's; its fractional orders err upwards by a thousandth."""
    found = by_accountant({training(rate, z, steps): 1}, promise())
    assert found[LOSS] == pytest.approx(loss, rel=1e-5)
    assert renyi * (1 - 2e-3) < found[RENYI] <= renyi * (1 + 1e-5)
    theirs = RdpAccountant()
    theirs.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(z)), steps)
    assert theirs.get_epsilon(DELTA) == pytest.approx(renyi, rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "renyi", "loss"), [(1, 4.72851, 4.37718), (100, 96.1163, 91.8173)]
)
def test_cross_check_without_sampling(steps: int, renyi: float, loss: float) -> None:
    found = by_accountant({training(1.0, 1.0, steps): 1}, promise())
    assert found == {EXACT: pytest.approx(loss, rel=1e-5)}
    accountant = RdpAccountant()
    accountant.compose(GaussianDpEvent(1.0), steps)
    assert accountant.get_epsilon(DELTA) == pytest.approx(renyi, rel=1e-5)


def test_dp_accounting_three_gaussians_of_root_three() -> None:
    """They are one at mu = 1: delta 0.126936 at epsilon 1, and power 0.38914 at level 0.1."""
    events = {
        GaussianEvent(unit=Unit.RECORD, adjacency=ADD, noise_multiplier=math.sqrt(3)): 3,
    }
    assert total(events, promise(delta=0.126936)).epsilon == pytest.approx(1.0, abs=1e-3)
    mu = 1 / compose(events, Unit.RECORD, ADD).ratio
    assert mu == pytest.approx(1.0)
    assert norm.cdf(norm.ppf(0.1) + mu) == pytest.approx(0.38914, abs=1e-5)
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(math.sqrt(3)), 3)
    assert accountant.get_delta(1) == pytest.approx(0.126936, abs=1e-3)


def test_dp_accounting_three_sampled_gaussians() -> None:
    """Rate 0.2, noise 0.5, three times: delta 0.15594 at epsilon 1."""
    composition = compose({training(0.2, 0.5, 3): 1}, Unit.RECORD, ADD)
    assert composed(composition).get_delta_for_epsilon(1.0) == pytest.approx(0.15594, abs=1e-3)
    assert total({training(0.2, 0.5, 3): 1}, promise(delta=0.15594), tight=True).epsilon == (
        pytest.approx(1.0, abs=2e-3)
    )


def test_dp_accounting_renyi_of_fifty_sampled_gaussians() -> None:
    expected = [6.70579741e-04, 1.08548710e-03, 2.18075656e-03, 2.38460375e-02, 1.67416308e02]
    accountant = RdpAccountant([1.5, 2.5, 5, 50, 100, np.inf])
    accountant.compose(PoissonSampledDpEvent(0.01, GaussianDpEvent(2.5)), 50)
    assert accountant.rdp[:-1] == pytest.approx(expected, rel=1e-4)
    assert math.isinf(accountant.rdp[-1])


def test_dp_accounting_conversions() -> None:
    constant = compute_epsilon(range(2, 33), [1.1] * 31, 1e-5)
    assert constant == (pytest.approx(1.32783806176, abs=5e-8), 32)
    orders = [1 + step / 1000 for step in range(99_000)]
    curve = [order / (2 * 4.530877117**2) for order in orders]
    assert compute_epsilon(orders, curve, 1e-6)[0] == pytest.approx(1.0, abs=5e-8)


@pytest.mark.soak
def test_dp_accounting_pairs_of_mixtures_and_of_truncated_samples() -> None:
    """Mechanisms that we do not have yet, by the accountant that we call for ours."""
    mixtures = PLDAccountant()
    mixtures.compose(dp_event.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0, 2.0], [0.2, 0.6, 0.2]), 3)
    mixtures.compose(
        dp_event.MixtureOfGaussiansDpEvent(2.0, [0.0, 2.0, 3.0], [0.33, 0.34, 0.33]), 2
    )
    assert mixtures.get_epsilon(1e-6) == pytest.approx(17.193115, abs=1e-6)
    truncated = PLDAccountant()
    for size, times in ((4, 3), (3, 2)):
        truncated.compose(
            dp_event.TruncatedSubsampledGaussianDpEvent(
                dataset_size=size,
                sampling_probability=0.5,
                truncated_batch_size=2,
                noise_multiplier=1.0,
            ),
            times,
        )
    assert truncated.get_epsilon(1e-6) == pytest.approx(17.904330, abs=1e-6)


def test_five_rounds_are_composed_and_not_reported_one_by_one() -> None:
    """A fresh engine per round reports 3.793 five times; the five rounds together cost 6.589."""
    a_round = training(1 / 8, 1.0, 8)
    assert by_accountant({a_round: 1}, promise())[RENYI] == pytest.approx(3.793, abs=1e-3)
    assert by_accountant({a_round: 5}, promise())[RENYI] == pytest.approx(6.589, abs=1e-3)


def test_replace_without_sampling_is_twice_the_distance() -> None:
    """Noise multiplier 1, no sampling: 9.997 under replace, where 4.7285 has been reported."""
    event = GaussianEvent(unit=Unit.RECORD, adjacency=REPLACE, noise_multiplier=1.0)
    assert total({event: 1}, promise(REPLACE)).epsilon == pytest.approx(9.997, abs=5e-4)
    assert total({training(1.0, 1.0, 1): 1}, promise(REPLACE)).epsilon == pytest.approx(
        9.997, abs=5e-4
    )


@pytest.mark.parametrize(
    ("epsilon", "classic", "needed"),
    [(10, 0.4845, 0.4999), (20, 0.242, 0.290), (100, 0.048, 0.095)],
)
def test_the_classic_sigma_is_too_small_at_large_epsilon(
    epsilon: float, classic: float, needed: float
) -> None:
    """sqrt(2 ln(1.25 / delta)) / epsilon does not keep its word; the exact figure does."""

    def spent(z: float) -> float:
        event = GaussianEvent(unit=Unit.RECORD, adjacency=ADD, noise_multiplier=z)
        return total({event: 1}, promise()).epsilon

    sigma = math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon
    assert sigma == pytest.approx(classic, abs=5e-4)
    assert spent(sigma) > epsilon
    exact = dp_accounting.get_sigma_gaussian(epsilon, DELTA)
    assert exact == pytest.approx(needed, abs=5e-4)
    assert spent(exact) == pytest.approx(epsilon, rel=1e-6)
