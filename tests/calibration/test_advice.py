"""A calibrated threshold only tightens, and its rule is a rule that a policy takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel.calibration import Which, advise
from sentinel.calibration.advice import SHIPPED, just_above
from sentinel.detection import conformal
from sentinel.policy import decide, load_policy
from sentinel.policy.store import parse_policy, shipped
from sentinel.terms import Evidence

if TYPE_CHECKING:
    from sentinel.calibration import Advice
    from sentinel.policy import Policy


def advice(scores: list[float], policy: Policy, which: Which = Which.SENSITIVITY) -> Advice:
    return advise(which, scores, conformal.threshold(scores, 0.05), policy)


def extended(policy_text: str, rule: str) -> Policy:
    return parse_policy(f"{policy_text}\n{rule}\n".encode(), "test").policy


def evidence(**scores: float) -> Evidence:
    calm = {"sensitivity": 0.0, "suspicion": 0.0, "budget_spent": 0.0, "unhealthy": False}
    return Evidence({"weight": 100}, **(calm | scores))


@pytest.mark.parametrize("which", Which)
@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_advised_rule_asks_what_the_policys_own_does_at_a_lower_threshold(
    name: str, which: Which
) -> None:
    text = shipped()[name].read_text()
    policy = load_policy(name).policy
    found = advice([0.1] * 40, policy, which)
    assert found.least == 0.1001 < found.standing <= SHIPPED
    tightened = extended(text, found.rule)
    for score in (0.0, 0.1, 0.1001, 0.29, 0.5, 0.95):
        seen = evidence(**{which.value: score})
        asked_at = evidence(**{which.value: max(score, found.standing) if score > 0.1 else score})
        tight, asked = decide(tightened, seen), decide(policy, asked_at)
        assert (tight.action, tight.treatments) == (asked.action, asked.treatments)


def test_a_threshold_that_stands_lower_is_left_alone() -> None:
    text = shipped()["baseline"].read_text().replace("sensitivity = 0.5", "sensitivity = 0.05")
    found = advice([0.1] * 40, parse_policy(text.encode(), "test").policy)
    assert found.standing == 0.05
    assert found.rule == ""
    assert found.exceeded


def test_no_threshold_above_the_shipped_one_is_advised_however_loose_the_policy() -> None:
    text = shipped()["baseline"].read_text().replace("suspicion = 0.5", "suspicion = 0.9")
    loose = parse_policy(text.encode(), "test").policy
    found = advice([0.6] * 40, loose, Which.SUSPICION)
    assert (found.standing, found.rule, found.exceeded) == (SHIPPED, "", True)
    assert found.rate.alarms == 40


def test_a_policy_without_such_a_rule_gets_one_that_refuses_or_withholds() -> None:
    text = 'schema = 1\nname = "plain"\n[[rule]]\nid = "r"\nmax_norm = 1.0\n'
    policy = parse_policy(text.encode(), "test").policy
    for which, action in (
        (Which.SUSPICION, "refuse-round"),
        (Which.SENSITIVITY, "withhold-update"),
    ):
        found = advice([0.1] * 40, policy, which)
        tight = extended(text, found.rule)
        assert decide(tight, evidence(**{which.value: 0.1001})).action.word == action
        assert decide(tight, evidence(**{which.value: 0.1})).action.word == "release"


def test_a_rule_for_some_parameters_stays_with_them() -> None:
    text = (
        'schema = 1\nname = "plain"\n[[rule]]\nid = "r"\nmax_norm = 1.0\n[[rule]]\nid = "head"\n'
        'match = ["head.**"]\nwhen = { sensitivity = 0.4 }\naction = "withhold"\n'
    )
    found = advice([0.1] * 40, parse_policy(text.encode(), "test").policy)
    assert found.standing == 0.4
    assert 'match = ["head.**"]' in found.rule
    assert 'action = "withhold"' in found.rule
    assert extended(text, found.rule).rules[-1].when is not None


def test_room_moves_the_rule_up_and_never_to_what_stands() -> None:
    policy = load_policy("baseline").policy
    scores = [0.1] * 40
    found = conformal.threshold(scores, 0.05)
    roomy = advise(Which.SUSPICION, scores, found, policy, room=0.05)
    assert (roomy.least, roomy.at) == (0.1001, 0.1501)
    assert "when = { suspicion = 0.1501 }" in roomy.rule
    for room in (0.4, 1.0):
        assert advise(Which.SUSPICION, scores, found, policy, room=room).rule == ""


@given(st.integers(min_value=0, max_value=20).map(lambda step: step / 20) | st.floats(0, 1))
def test_just_above_is_above_and_near(score: float) -> None:
    """Also for twentieths such as .15, which lie below their own decimals in binary."""
    assert score < just_above(score) <= score + 1.0001e-4
