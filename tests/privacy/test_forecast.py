"""A forecast says what the ledger will do."""

from __future__ import annotations

import pytest

from sentinel.errors import MisuseError
from sentinel.privacy import DpSgdEvent, GaussianEvent, Promise, UnboundedEvent, forecast, weigh
from sentinel.privacy.forecast import next_event, noise_multiplier_for, releases_left, steps_paid
from sentinel.terms import Adjacency, Unit

SITE = Promise(Unit.SITE, Adjacency.REPLACE, epsilon=4.0, delta=1e-5)
PATIENT = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, epsilon=1.5, delta=1e-5)


def release(z: float = 20.0) -> GaussianEvent:
    return GaussianEvent(
        unit=Unit.SITE,
        adjacency=Adjacency.REPLACE,
        noise_multiplier=z,
        log_ratio=1e-6,
        mass=1e-25,
    )


def training(z: float = 1.5, rate: float = 0.02, steps: int = 20) -> DpSgdEvent:
    return DpSgdEvent(
        unit=Unit.PATIENT,
        adjacency=Adjacency.ADD_OR_REMOVE,
        noise_multiplier=z,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=1e-6,
        mass=1e-25,
    )


CASES = [
    ({}, release(), SITE),
    ({release(15.0): 9, UnboundedEvent(): 2}, release(), SITE),
    ({training(1.2): 3}, training(), PATIENT),
    ({release(60.0): 3}, training(rate=1.0, steps=2, z=60.0), PATIENT),
]


@pytest.mark.parametrize(("counted", "event", "promise"), CASES)
def test_as_many_releases_are_left_as_the_ledger_allows(counted, event, promise) -> None:
    left = releases_left(counted, event, promise)
    before = counted.get(event, 0)
    assert left > 3
    assert weigh({**counted, event: before + left}, promise).epsilon <= promise.epsilon
    assert weigh({**counted, event: before + left + 1}, promise).epsilon > promise.epsilon


@pytest.mark.parametrize(("counted", "event", "promise"), CASES)
@pytest.mark.parametrize("releases", [30, 200])
def test_the_noise_that_is_named_pays_for_the_releases_and_a_little_less_does_not(
    counted, event, promise, releases: int
) -> None:
    needed = noise_multiplier_for(counted, event, promise, releases)
    assert needed is not None
    for share, fits in ((1.0, True), (0.99, needed <= 0.05)):
        planned = event.model_copy(update={"noise_multiplier": max(needed * share, 0.05)})
        after = {**counted, planned: counted.get(planned, 0) + releases}
        assert (weigh(after, promise).epsilon <= promise.epsilon) is fits


def test_a_spent_budget_leaves_nothing_and_no_noise_helps() -> None:
    spent = {release(1.0): 1}
    assert releases_left(spent, release(), SITE) == 0
    assert noise_multiplier_for(spent, release(), SITE, 1) is None


def test_a_forecast_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "MANY_RELEASES", 50)
    assert releases_left({}, release(1e5), SITE) == 50


def test_the_next_release_of_a_site_is_the_policys_with_the_last_slack() -> None:
    first = next_event(SITE, 7.0, [])
    assert (first.noise_multiplier, first.slack) == (7.0, None)
    later = next_event(SITE, 7.0, [UnboundedEvent(), release(), training()])
    assert later == release(7.0)


def test_the_next_training_takes_what_is_not_said_from_the_last_one() -> None:
    charged = [training(), training(steps=100), release()]
    assert next_event(PATIENT, 2.0, charged) == training(2.0, steps=100)
    assert next_event(PATIENT, 2.0, charged, steps=7).steps == 7
    assert next_event(PATIENT, 2.0, charged, steps=50).slack.log_ratio == pytest.approx(5e-7)
    whole = next_event(PATIENT, 2.0, [], steps=7, sampling_rate=1.0)
    assert (whole.sampling, whole.sampling_rate, whole.steps) == ("none", 1.0, 7)


@pytest.mark.parametrize(
    ("promise", "options", "says"),
    [
        (SITE, {"steps": 3}, "leave out --steps"),
        (SITE, {"sampling_rate": 0.1}, "leave out --steps"),
        (PATIENT, {}, "name --steps and --sampling-rate"),
        (PATIENT, {"steps": 3}, "name --sampling-rate"),
        (PATIENT, {"sampling_rate": 0.1}, "name --steps"),
        (PATIENT, {"steps": 3, "sampling_rate": 0.0}, "above 0, up to 1"),
        (PATIENT, {"steps": 3, "sampling_rate": 1.5}, "above 0, up to 1"),
        (PATIENT, {"steps": 0, "sampling_rate": 0.5}, "steps are 1 or more"),
        (PATIENT, {"steps": 3, "sampling_rate": float("nan")}, "above 0, up to 1"),
    ],
)
def test_a_training_that_cannot_be_planned_is_misuse(promise, options, says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        next_event(promise, 1.0, [], **options)


def test_the_first_step_that_costs_more_than_there_is_leaves_none() -> None:
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, epsilon=0.01, delta=1e-4)
    found = steps_paid(promise, 1.2, 32 / 300)
    assert (found.count, found.at_least) == (0, False)
    assert found.spent.epsilon == weigh({one_step(1.2, 32 / 300): 1}, promise).epsilon > 0.5


def test_as_many_steps_are_paid_as_the_ledger_charges() -> None:
    found = steps_paid(PATIENT, 1.5, 0.02)
    step = one_step(1.5, 0.02)
    assert not found.at_least
    assert found.count > 3
    assert found.spent == weigh({step: found.count}, PATIENT)
    assert found.spent.epsilon <= PATIENT.epsilon
    assert weigh({step: found.count + 1}, PATIENT).epsilon > PATIENT.epsilon


def test_a_great_many_steps_are_told_as_at_least_so_many() -> None:
    """Counted by the quick accountant, so that the answer takes no longer than for few."""
    found = steps_paid(PATIENT, 8.0, 0.02)
    assert found.at_least
    assert found.count > 5000
    assert weigh({one_step(8.0, 0.02): found.count}, PATIENT).epsilon <= PATIENT.epsilon


def one_step(z: float, rate: float) -> DpSgdEvent:
    return training(z, rate, 1).model_copy(update={"log_ratio": 0.0, "mass": 0.0})
