"""Which distance lies between neighbours, for every unit and adjacency."""

from __future__ import annotations

import math

import pytest

from sentinel.privacy import DpSgdEvent, GaussianEvent
from sentinel.privacy.mechanisms import Sampled, compose, covers, neighbours
from sentinel.terms import Adjacency, Unit

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE


def site(z: float = 2.0) -> GaussianEvent:
    return GaussianEvent(unit=Unit.SITE, adjacency=REPLACE, noise_multiplier=z)


def training(
    z: float = 2.0, rate: float = 0.1, steps: int = 5, unit: Unit = Unit.PATIENT
) -> DpSgdEvent:
    return DpSgdEvent(
        unit=unit,
        adjacency=ADD,
        noise_multiplier=z,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=0.0,
        mass=0.0,
    )


def test_a_coarser_unit_covers_a_finer_one_and_never_the_other_way() -> None:
    order = [Unit.SITE, Unit.PATIENT, Unit.RECORD]
    for at, of_event in enumerate(order):
        event = GaussianEvent(unit=of_event, adjacency=REPLACE, noise_multiplier=1.0)
        assert [covers(event, unit) for unit in order] == [at <= place for place in range(3)]


@pytest.mark.parametrize(
    ("event", "unit", "adjacency", "seen_as"),
    [
        (site(), Unit.SITE, ADD, ADD),
        (site(), Unit.SITE, REPLACE, REPLACE),
        # A patient comes or goes; the site stays and sends another update.
        (site(), Unit.PATIENT, ADD, REPLACE),
        (site(), Unit.RECORD, ADD, REPLACE),
        (site(), Unit.RECORD, REPLACE, REPLACE),
        (training(), Unit.PATIENT, ADD, ADD),
        (training(), Unit.RECORD, ADD, REPLACE),
        (training(unit=Unit.RECORD), Unit.RECORD, ADD, ADD),
    ],
)
def test_what_neighbours_look_like_to_the_unit_of_an_event(event, unit, adjacency, seen_as) -> None:
    assert neighbours(event, unit, adjacency) is seen_as


def test_a_patient_that_leaves_can_move_a_clipped_update_by_twice_the_clip_norm() -> None:
    """Why the line above says replaced: two updates of norm 1, one patient apart, at distance 2."""
    assert compose({site(2.0): 1}, Unit.SITE, ADD).ratio == 2.0
    assert compose({site(2.0): 1}, Unit.PATIENT, ADD).ratio == 1.0
    assert compose({site(2.0): 1}, Unit.PATIENT, REPLACE).ratio == 1.0


def test_steps_without_sampling_are_gaussian_mechanisms() -> None:
    """Shuffled epochs get no amplification: four full steps at z are one at z / 2."""
    composition = compose({training(2.0, 1.0, 4): 1}, Unit.PATIENT, ADD)
    assert composition.ratio == pytest.approx(1.0)
    assert composition.sampled == ()


def test_sampled_steps_of_equal_kind_are_counted_together() -> None:
    events = {training(steps=5): 3, training(steps=7): 2, site(4.0): 4}
    composition = compose(events, Unit.PATIENT, REPLACE)
    assert composition.sampled == ((Sampled(2.0, 0.1, REPLACE), 29),)
    assert composition.ratio == pytest.approx(1.0)


def test_nothing_composes_to_nothing() -> None:
    composition = compose({}, Unit.SITE, ADD)
    assert composition.ratio == math.inf
    assert not composition.too_little_noise


@pytest.mark.parametrize("event", [site(0.049), training(0.049), training(0.049, rate=1.0)])
def test_too_little_noise_is_seen_before_any_accountant(event) -> None:
    assert compose({event: 1}, Unit.RECORD, ADD).too_little_noise
