"""Totals agree with dp-accounting's own accountants, under both adjacencies."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.privacy import GaussianEvent, Promise, UnboundedEvent, total
from sentinel.privacy.events import event_from_json
from sentinel.terms import Adjacency, Unit

REPLACE, ADD = Adjacency.REPLACE, Adjacency.ADD_OR_REMOVE


def site(noise_multiplier: float, unit: Unit = Unit.SITE) -> GaussianEvent:
    return GaussianEvent(unit=unit, adjacency=REPLACE, noise_multiplier=noise_multiplier)


def promise(adjacency: Adjacency = ADD, unit: Unit = Unit.SITE, delta: float = 1e-5) -> Promise:
    return Promise(unit, adjacency, epsilon=10.0, delta=delta)


@pytest.mark.parametrize(("z", "times", "expected"), [(1, 1, 4.37718), (1, 100, 91.8173)])
def test_pins_of_the_privacy_loss_distribution(z: float, times: int, expected: float) -> None:
    assert total({site(z): times}, promise()).epsilon == pytest.approx(expected, abs=1e-4)


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


def test_a_coarser_unit_counts_for_a_finer_one_and_never_the_other_way() -> None:
    events = {site(2.0): 1, site(2.0, Unit.RECORD): 1}
    assert total(events, promise(unit=Unit.SITE)).void
    assert not total(events, promise(unit=Unit.RECORD)).void
    alone = total({site(2.0): 1}, promise(unit=Unit.SITE)).epsilon
    assert total(events, promise(unit=Unit.SITE)).epsilon == alone
    assert total(events, promise(unit=Unit.RECORD)).epsilon > alone


def test_a_release_without_a_promise_makes_the_total_void() -> None:
    assert total({UnboundedEvent(): 1}, promise()).void
    assert total({}, promise()).epsilon == 0.0
    assert not total({}, promise()).void


def test_a_tiny_noise_multiplier_is_without_bound_and_not_computed() -> None:
    assert total({site(1e-5): 1}, promise()).epsilon == float("inf")


def test_events_survive_writing_and_unknown_ones_are_refused() -> None:
    for event in (site(1.5), UnboundedEvent()):
        assert event_from_json(event.model_dump_json()) == event
    for text in (
        '{"kind": "laplace"}',
        '{"kind": "unbounded", "version": 2}',
        '{"kind": "unbounded", "note": "x"}',
        site(1.5).model_dump_json().replace("1.5", "-1"),
    ):
        with pytest.raises(ValueError, match="validation error"):
            event_from_json(text)
