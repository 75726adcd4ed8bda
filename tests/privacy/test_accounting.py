"""Totals: each line of the table in `total`, against dp-accounting's own accountants."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.privacy import (
    DpSgdEvent,
    GaussianEvent,
    Promise,
    UnboundedEvent,
    accounting,
    by_accountant,
    total,
    weigh,
)
from sentinel.privacy.accounting import EXACT, WHOLE
from sentinel.privacy.loss import LOSS
from sentinel.privacy.renyi import RENYI
from sentinel.terms import Adjacency, Slack, Unit

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE


def site(noise_multiplier: float, unit: Unit = Unit.SITE, **slack: float) -> GaussianEvent:
    return GaussianEvent(unit=unit, adjacency=REPLACE, noise_multiplier=noise_multiplier, **slack)


def training(
    z: float = 1.1,
    rate: float = 0.01,
    steps: int = 100,
    unit: Unit = Unit.PATIENT,
    slack: Slack = Slack(),  # noqa: B008 - frozen
) -> DpSgdEvent:
    return DpSgdEvent(
        unit=unit,
        adjacency=ADD,
        noise_multiplier=z,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=slack.log_ratio,
        mass=slack.mass,
    )


def promise(
    adjacency: Adjacency = ADD, unit: Unit = Unit.SITE, delta: float = 1e-5, epsilon: float = 10.0
) -> Promise:
    return Promise(unit, adjacency, epsilon, delta)


PATIENT = promise(unit=Unit.PATIENT)


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize(("z", "times"), [(1.0, 1), (4.0, 30), (20.0, 300)])
def test_replace_doubles_the_distance_just_as_the_accountant_does_by_itself(
    adjacency: Adjacency, z: float, times: int
) -> None:
    relation = {
        REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
        ADD: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    }[adjacency]
    reference = PLDAccountant(relation)
    reference.compose(dp_event.GaussianDpEvent(z), times)
    found = total({site(z): times}, promise(adjacency))
    assert found.epsilon == pytest.approx(reference.get_epsilon(1e-5), rel=2e-3)
    assert found.adjacency is adjacency


@given(z=st.floats(0.5, 50), times=st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_no_total_exceeds_renyi_composition(z: float, times: int) -> None:
    reference = RdpAccountant()
    reference.compose(dp_event.GaussianDpEvent(z), times)
    assert total({site(z): times}, promise()).epsilon <= reference.get_epsilon(1e-5) + 1e-9


def test_events_of_several_kinds_compose_as_one_gaussian() -> None:
    """Two releases at z are one at z / sqrt(2)."""
    several = total({site(2.0): 1, site(3.0): 1}, promise()).epsilon
    one = total({site((1 / 4 + 1 / 9) ** -0.5): 1}, promise()).epsilon
    assert several == pytest.approx(one, rel=1e-9)


def test_a_finer_unit_makes_the_total_void_and_the_rest_is_still_added_up() -> None:
    events = {site(2.0): 1, site(2.0, Unit.RECORD): 1, training(): 1}
    assert total(events, promise(unit=Unit.SITE)).void
    assert not total(events, promise(unit=Unit.RECORD)).void
    alone = total({site(2.0): 1}, promise(unit=Unit.SITE)).epsilon
    assert total(events, promise(unit=Unit.SITE)).epsilon == alone
    assert total(events, promise(unit=Unit.RECORD)).epsilon > alone


def test_a_coarser_unit_under_add_or_remove_counts_as_replaced() -> None:
    """A site's noise hides a patient that comes or goes as it hides one that is replaced."""
    patients = total({site(3.0): 4}, promise(ADD, Unit.PATIENT)).epsilon
    assert patients == total({site(3.0): 4}, promise(REPLACE, Unit.SITE)).epsilon
    assert patients > total({site(3.0): 4}, promise(ADD, Unit.SITE)).epsilon


def test_a_release_without_a_promise_makes_the_total_void() -> None:
    found = total({UnboundedEvent(): 1, site(2.0): 1}, promise())
    assert found.void
    assert found.epsilon == total({site(2.0): 1}, promise()).epsilon


def test_nothing_charged_is_nothing_spent() -> None:
    found = total({}, promise())
    assert (found.epsilon, found.void, found.accountant) == (0.0, False, EXACT)


@pytest.mark.parametrize("event", [site(1e-5), training(0.04), training(4.8e-5, rate=1.0)])
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_a_tiny_noise_multiplier_is_without_bound_and_no_accountant_is_asked(
    event, adjacency: Adjacency, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_exact", "renyi_epsilon", "loss_epsilon"):
        monkeypatch.setattr(accounting, name, None)  # calling it would raise
    asked = promise(adjacency, Unit.RECORD)
    assert total({event: 1}, asked, tight=True).epsilon == math.inf


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize("event", [training(0.05, 0.01), training(0.1, 0.9)])
def test_the_smallest_noise_that_is_allowed_is_computed_in_little_memory(
    event, adjacency: Adjacency
) -> None:
    """PLD is left out, RDP is finite; the process stays small enough to have done it at all."""
    found = by_accountant({event: 1}, promise(adjacency, Unit.PATIENT))
    assert found[LOSS] == math.inf
    assert 50 < found[RENYI] < math.inf


def test_the_smaller_accountant_is_shown_with_its_name() -> None:
    events = {training(steps=400): 3, site(60.0): 1}
    found = by_accountant(events, PATIENT)
    quick, tight = total(events, PATIENT), total(events, PATIENT, tight=True)
    assert (quick.accountant, quick.epsilon) == (RENYI, found[RENYI])
    assert (tight.accountant, tight.epsilon) == (LOSS, found[LOSS])
    assert tight.epsilon < quick.epsilon


@pytest.mark.parametrize("z", [0.06, 0.08, 0.5])
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_sampling_never_costs_more_than_whole_batches(z: float, adjacency: Adjacency) -> None:
    """Where little noise defeats the other accountants, exact composition still bounds it."""
    promise = Promise(Unit.PATIENT, adjacency, 8.0, 1e-5)
    whole = total({training(z, 1.0, 3): 1}, promise)
    sampled = total({training(z, 0.5, 3): 1}, promise)
    assert sampled.epsilon <= whole.epsilon * (1 + 1e-6)
    nearly = total({training(z, 1 - 1e-9, 3): 1}, promise, tight=True)
    assert nearly.epsilon <= whole.epsilon * (1 + 1e-6)
    if adjacency is ADD:  # who is replaced may have been in neither sample, which bounds the ratio
        assert nearly.epsilon == pytest.approx(whole.epsilon, rel=1e-3)
        assert nearly.accountant in {WHOLE, LOSS}


def test_where_the_quick_accountant_is_better_it_is_kept() -> None:
    """Beyond what a distribution can be kept for, `tight` falls back."""
    found = total({training(0.3, 0.5, 1000): 1}, PATIENT, tight=True)
    assert found.accountant == RENYI
    assert 50 < found.epsilon < math.inf


def test_shuffled_epochs_are_not_amplified() -> None:
    """Sampling "none" costs what full batches cost, ten times what the same Poisson rate would."""
    shuffled = total({training(rate=1.0, steps=10, z=4.0): 1}, PATIENT)
    assert shuffled.accountant == EXACT
    alike = total({site(4.0, Unit.PATIENT): 10}, PATIENT)
    assert shuffled.epsilon == alike.epsilon
    assert shuffled.epsilon > 5 * total({training(4.0, 0.01, 10): 1}, PATIENT).epsilon


def test_a_rate_of_1_is_the_same_with_and_without_sampling() -> None:
    without = training(rate=1.0)
    drawn = without.model_copy(update={"sampling": "poisson"})
    assert total({drawn: 2}, PATIENT) == total({without: 2}, PATIENT)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_one_charge_of_many_steps_is_many_charges_of_one(adjacency: Adjacency) -> None:
    asked = promise(adjacency, Unit.PATIENT)
    together = total({training(steps=60): 1}, asked, tight=True)
    apart = total({training(steps=1): 10, training(steps=25): 2}, asked, tight=True)
    assert together == apart


@given(
    z=st.floats(0.6, 8),
    rate=st.floats(1e-4, 0.99),
    steps=st.integers(1, 2000),
    adjacency=st.sampled_from(Adjacency),
)
@settings(max_examples=30, deadline=None)
def test_more_steps_less_noise_and_more_of_the_cohort_never_cost_less(
    z: float, rate: float, steps: int, adjacency: Adjacency
) -> None:
    asked = promise(adjacency, Unit.PATIENT)
    spent = total({training(z, rate, steps): 1}, asked).epsilon
    assert total({training(z, rate, 2 * steps): 1}, asked).epsilon >= spent
    assert total({training(z * 1.3, rate, steps): 1}, asked).epsilon <= spent + 1e-9
    assert total({training(z, rate / 2, steps): 1}, asked).epsilon <= spent + 1e-9
    assert total({training(z, rate, steps): 1}, promise(REPLACE, Unit.PATIENT)).epsilon >= spent


def test_slack_adds_up_over_all_charges_and_is_added_to_epsilon() -> None:
    slack = Slack(1e-4, 1e-20)
    events = {site(20.0, log_ratio=1e-3, mass=1e-21): 5, training(slack=slack): 2}
    ideal = {site(20.0, log_ratio=0.0, mass=0.0): 5, training(): 2}
    found, without = total(events, PATIENT), total(ideal, PATIENT)
    assert found.slack.log_ratio == pytest.approx(5e-3 + 2e-4)
    assert found.slack.mass == pytest.approx(5e-21 + 2e-20)
    assert found.slack_unknown == 0
    assert without.epsilon + 2 * 5.2e-3 <= found.epsilon < without.epsilon + 2 * 5.2e-3 + 1e-2


def test_slack_that_is_not_known_counts_as_none_and_is_said() -> None:
    found = total({site(2.0): 3, site(2.0, log_ratio=0.0, mass=0.0): 1}, promise())
    assert found.slack_unknown == 3
    assert found.epsilon == total({site(2.0): 4}, promise()).epsilon


def test_a_charge_is_weighed_by_the_tightest_accountant_only_where_the_quick_one_says_no() -> None:
    events = {training(steps=400): 3}
    quick, tight = total(events, PATIENT), total(events, PATIENT, tight=True)
    between = (quick.epsilon + tight.epsilon) / 2
    assert weigh(events, promise(unit=Unit.PATIENT, epsilon=quick.epsilon)).accountant == RENYI
    assert weigh(events, promise(unit=Unit.PATIENT, epsilon=between)) == tight


def test_no_total_warns_or_prints(capfd: pytest.CaptureFixture[str]) -> None:
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        total({site(1e6): 1}, promise())
        total({training(50.0, 0.5, 3): 1}, PATIENT, tight=True)
    assert capfd.readouterr() == ("", "")
