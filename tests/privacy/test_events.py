"""Events keep their meaning: written once, with a version, and refused where unknown."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from sentinel.privacy import DpSgdEvent, GaussianEvent, UnboundedEvent
from sentinel.privacy.events import event_from_json, event_to_json
from sentinel.terms import Adjacency, Slack, Unit

# As earlier versions wrote them.
OLD_GAUSSIAN = (
    '{"kind":"gaussian","version":1,"unit":"site","adjacency":"replace","noise_multiplier":1.5}'
)
OLD_UNBOUNDED = '{"kind":"unbounded","version":1}'


def gaussian(**more: float) -> GaussianEvent:
    return GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=1.5, **more)


def dp_sgd(**more: object) -> DpSgdEvent:
    fields = {
        "unit": "patient",
        "adjacency": "add-or-remove",
        "noise_multiplier": 1.1,
        "sampling": "poisson",
        "sampling_rate": 0.01,
        "steps": 7,
        "log_ratio": 1e-6,
        "mass": 1e-25,
    }
    return DpSgdEvent.model_validate(fields | more)


KNOWN = [gaussian(), gaussian(log_ratio=1e-4, mass=1e-25), dp_sgd(), UnboundedEvent()]


@pytest.mark.parametrize("event", KNOWN, ids=lambda event: f"{event.kind}-{event.version}")
def test_an_event_reads_back_as_it_was_written(event) -> None:
    assert event_from_json(event_to_json(event)) == event


def test_rows_of_earlier_versions_are_read_and_written_byte_for_byte() -> None:
    for text in (OLD_GAUSSIAN, OLD_UNBOUNDED):
        assert event_to_json(event_from_json(text)) == text


def test_slack_makes_a_gaussian_event_version_2_and_its_absence_version_1() -> None:
    assert (gaussian().version, gaussian().slack) == (1, None)
    known = gaussian(log_ratio=0.0, mass=0.0)
    assert (known.version, known.slack) == (2, Slack(0.0, 0.0))


@pytest.mark.parametrize("event", KNOWN, ids=lambda event: f"{event.kind}-{event.version}")
@pytest.mark.parametrize(
    "change", [{"kind": "laplace"}, {"version": 9}, {"note": "x"}], ids=["kind", "version", "field"]
)
def test_unknown_kinds_versions_and_fields_are_refused(event, change) -> None:
    text = json.dumps(json.loads(event_to_json(event)) | change)
    with pytest.raises(ValidationError):
        event_from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1, "log_ratio": 1e-4, "mass": 0.0},
        {"version": 2},
        {"version": 2, "log_ratio": 1e-4},
        {"version": 2, "mass": 0.0},
        {"log_ratio": 1e-4},
        {"log_ratio": -1e-4, "mass": 0.0},
        {"log_ratio": 0.0, "mass": 1.5},
        {"log_ratio": float("nan"), "mass": 0.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
    ],
    ids=str,
)
def test_a_gaussian_event_that_cannot_be_is_refused(change) -> None:
    with pytest.raises(ValidationError):
        GaussianEvent.model_validate(
            {"unit": "site", "adjacency": "replace", "noise_multiplier": 1.5} | change
        )


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "site"},
        {"sampling": "shuffled"},
        {"sampling": "none"},  # with a rate below 1: a shuffled epoch gives no amplification
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"sampling_rate": float("nan")},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": 10**9 + 1},
        {"log_ratio": None},
        {"mass": -1.0},
        {"noise_multiplier": -1.0},
    ],
    ids=str,
)
def test_a_dp_sgd_event_that_cannot_be_is_refused(change) -> None:
    with pytest.raises(ValidationError):
        dp_sgd(**change)


def test_without_sampling_the_rate_is_1() -> None:
    assert dp_sgd(sampling="none", sampling_rate=1.0).sampling_rate == 1.0


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        gaussian().noise_multiplier = 9.0
