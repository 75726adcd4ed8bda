"""New rounds are held against the calibration by one measure, whatever policy was in force."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.calibration import Gathered, Kept, Which, drift_of, keep
from sentinel.calibration.drift import alike, withheld_from
from sentinel.calibration.gather import Scored
from sentinel.detection import conformal
from sentinel.policy import load_policy
from sentinel.policy.store import parse_policy

if TYPE_CHECKING:
    from sentinel.policy import Policy

SEED = "5" * 64
BASELINE = load_policy("baseline").policy


def gathered(*scores: float) -> Gathered:
    return Gathered([Scored(score) for score in scores])


def kept(*scores: float, which: Which = Which.SENSITIVITY) -> Kept:
    return keep(gathered(*scores), which, "a" * 64, 0.1, SEED, source="log", promised=False)


def stricter() -> Policy:
    text = (
        'schema = 1\nname = "p"\n[[rule]]\nid = "r"\nmax_norm = 1.0\n[[rule]]\nid = "w"\n'
        'when = { sensitivity = 0.2001 }\naction = "withhold-update"\n'
        '[[rule]]\nid = "both"\nwhen = { sensitivity = 0.1, suspicion = 0.1 }\n'
        'action = "withhold-update"\n'
    )
    return parse_policy(text.encode(), "test").policy


def test_an_update_withheld_today_and_its_like_let_out_before_score_the_same() -> None:
    assert withheld_from(stricter()) == 0.2001
    assert alike(Which.SENSITIVITY, [0.1, 0.2, 0.25, 0.6, 1.0], stricter()) == [0.1, 0.2, 1, 1, 1]
    assert alike(Which.SENSITIVITY, [0.6, 0.85, 0.9, 1.0], BASELINE) == [0.6, 0.85, 1, 1]
    assert alike(Which.SUSPICION, [0.95], BASELINE) == [0.95]


def test_scores_from_a_folder_are_put_in_twentieths_as_those_of_the_log() -> None:
    assert alike(Which.SUSPICION, [0.0, 0.049, 0.05, 0.051], BASELINE) == [0.0, 0.05, 0.05, 0.1]


def test_a_stricter_policy_alone_is_no_drift() -> None:
    """Rounds that would have left are withheld now and logged as 1: still the same rounds."""
    ordinary = [0.1, 0.2, 0.3, 0.1, 0.2, 0.25, 0.1, 0.2, 0.1, 0.15] * 4
    since = [1.0 if score > 0.2 else score for score in ordinary]
    found = drift_of(kept(*ordinary), SEED, gathered(*since), stricter())
    assert found.rounds == 40
    assert not found.last.reached(conformal.WARNING)


def test_alarms_are_those_above_the_threshold() -> None:
    calibration = kept(*([0.1] * 37 + [0.2] * 3))
    assert calibration.threshold == 0.1
    found = drift_of(calibration, SEED, gathered(0.1, 0.15, 0.2, 0.05), BASELINE)
    assert (found.rounds, found.alarms) == (4, 2)


def test_the_same_rounds_give_the_same_answer_and_more_rounds_go_on_from_it() -> None:
    calibration = kept(*([0.1, 0.2] * 20))
    some = drift_of(calibration, SEED, gathered(0.1, 0.2, 0.3), BASELINE)
    more = drift_of(calibration, SEED, gathered(0.1, 0.2, 0.3, 0.2), BASELINE)
    assert more.paths[:-1] == some.paths


def test_a_trend_within_the_calibration_itself_is_noticed() -> None:
    rising = kept(*(place / 100 for place in range(60)))
    assert rising.order > 4.6  # ln 100
    assert kept(*([0.1, 0.3, 0.2, 0.25, 0.15] * 12)).order < 3.0  # ln 20
