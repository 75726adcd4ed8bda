"""Privacy loss distributions against brute force, under both adjacencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from sentinel.privacy import loss
from sentinel.privacy.loss import composed, largest_loss, loss_epsilon
from sentinel.privacy.mechanisms import Composition, Sampled
from sentinel.terms import Adjacency

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE


def pairs(z: float, rate: float, adjacency: Adjacency) -> list[tuple[np.ndarray, np.ndarray]]:
    """The outputs of one step for the two worst neighbours, on a grid, both ways round."""
    width = z / 30
    x = np.arange(-1 - 9 * z, 1 + 9 * z, width)

    def normal(mean: float) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / (2 * z**2)) * width / (z * math.sqrt(2 * math.pi))

    one = (1 - rate) * normal(0) + rate * normal(1)
    other = normal(0)
    if adjacency is REPLACE:
        other = (1 - rate) * normal(0) + rate * normal(-1)
    return [(one, other), (other, one)]


def brute_force(
    composition_of: list[tuple[float, float]], adjacency: Adjacency, epsilon: float
) -> float:
    """Delta of two steps together, by summing over the plane of both outputs."""
    (first, second) = (pairs(z, rate, adjacency) for z, rate in composition_of)
    return max(
        float(
            np.maximum(
                np.outer(p1, p2) - math.exp(epsilon) * np.outer(q1, q2),
                0,
            ).sum()
        )
        for (p1, q1), (p2, q2) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize("steps", [[(1.0, 0.3), (1.0, 0.3)], [(0.8, 0.1), (2.0, 0.6)]])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.5])
def test_two_sampled_steps_cost_what_brute_force_finds(
    adjacency: Adjacency, steps: list[tuple[float, float]], epsilon: float
) -> None:
    counted: dict[Sampled, int] = {}
    for z, rate in steps:
        step = Sampled(z, rate, adjacency)
        counted[step] = counted.get(step, 0) + 1
    distribution = composed(Composition(math.inf, tuple(counted.items())))
    found = distribution.get_delta_for_epsilon(epsilon)
    true = brute_force(steps, adjacency, epsilon)
    assert found == pytest.approx(true, rel=2e-3, abs=1e-7)
    assert found >= true - 1e-6


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_gaussian_and_sampled_parts_compose_as_dp_accounting_composes_them(
    adjacency: Adjacency,
) -> None:
    """It doubles the distance under replace by itself; we give it the ratio, halved once."""
    relation = {
        REPLACE: NeighboringRelation.REPLACE_ONE,
        ADD: NeighboringRelation.ADD_OR_REMOVE_ONE,
    }[adjacency]
    theirs = PLDAccountant(relation)
    theirs.compose(GaussianDpEvent(4.0), 3)
    theirs.compose(PoissonSampledDpEvent(0.2, GaussianDpEvent(1.5)), 20)
    ratio = (4.0 if adjacency is ADD else 2.0) / math.sqrt(3)
    ours = loss_epsilon(Composition(ratio, ((Sampled(1.5, 0.2, adjacency), 20),)), 1e-5, 10.0)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-4)


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize(("z", "rate"), [(0.4, 0.01), (1.0, 0.3), (3.0, 0.9)])
def test_the_largest_loss_of_a_step_is_bounded_without_building_it(
    adjacency: Adjacency, z: float, rate: float
) -> None:
    step = Sampled(z, rate, adjacency)
    cells = composed(Composition(math.inf, ((step, 1),)))._pmf_remove.to_dense_pmf()
    assert cells.size * 1e-3 <= 2 * largest_loss(step) + 1


def test_what_would_take_gigabytes_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at a large total, nor with a step whose table is huge: the answer is infinity."""
    monkeypatch.setattr(loss, "composed", None)  # calling it would raise
    small = Composition(math.inf, ((Sampled(1.0, 0.1, ADD), 10),))
    huge = Composition(math.inf, ((Sampled(0.06, 0.001, ADD), 1),))
    assert loss_epsilon(small, 1e-5, 50.1) == math.inf
    assert loss_epsilon(huge, 1e-5, 1.0) == math.inf
