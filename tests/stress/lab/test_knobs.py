"""A turned knob turns that knob alone, and what a promise fixes cannot be turned."""

from __future__ import annotations

import pytest

from sentinel.errors import MisuseError
from sentinel.policy import decide, load_policy
from sentinel.policy.store import parse_policy
from sentinel.stress.lab.knobs import NOISES, Knob, Turned, bare, turned, value_of
from sentinel.terms import Evidence

SITE = """
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 8.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = 16.0
[[rule]]
id = "all"
"""


@pytest.mark.parametrize("knob", list(Knob))
def test_one_knob_of_the_rule_for_every_round_is_turned(knob) -> None:
    loaded = load_policy("tabular-ehr")
    found = turned(loaded, Turned(knob, 0.125))
    assert value_of(found, knob) == 0.125
    assert found.policy.rules[1:] == loaded.policy.rules[1:]
    others = [other for other in Knob if other is not knob and not {other, knob} <= NOISES]
    assert [value_of(found, other) for other in others] == [
        value_of(loaded, other) for other in others
    ]
    assert found.digest != loaded.digest


@pytest.mark.parametrize(("knob", "std"), [(Knob.NOISE_RATIO, 0.2), (Knob.NOISE_MULTIPLIER, 2.0)])
def test_a_turned_noise_is_all_the_noise_of_every_round(plain, knob, std) -> None:
    """The larger of the two is added: the other one would hide that this one was turned down."""
    loaded = plain(noise=500.0, norm=2.0, more="noise_multiplier = 50.0")
    for value in (0.0, 1.0):
        found = turned(loaded, Turned(knob, value))
        plan = decide(found.policy, Evidence({"w": 100}, 0.0, 0.0, 0.0, unhealthy=False))
        assert plan.treatments["w"].noise_std == pytest.approx(value * std)
        (other,) = NOISES - {knob}
        assert value_of(found, other) is None


def test_no_turn_is_the_policy_itself() -> None:
    loaded = load_policy("tabular-ehr")
    assert turned(loaded, Turned()) is loaded


def test_bare_the_rules_for_special_rounds_are_gone() -> None:
    loaded = load_policy("tabular-ehr")
    assert [rule.id for rule in bare(loaded).policy.rules] == ["baseline"]
    assert bare(loaded).policy.limits == loaded.policy.limits


def test_the_clip_of_a_promise_is_no_knob() -> None:
    with pytest.raises(MisuseError, match="promise's own"):
        turned(parse_policy(SITE.encode(), "site.toml"), Turned(Knob.MAX_NORM, 2.0))
