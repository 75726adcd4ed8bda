"""Which rule decided what, and the noise beside the clip."""

from __future__ import annotations

import math

import pytest

from sentinel.policy import load_policy
from sentinel.policy.decide import decide
from sentinel.policy.explain import EVERY, OTHERS, explain, stand_ins
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.terms import Action, Evidence

TEXT = """\
schema = 1
name = "p"
[[rule]]
id = "base"
max_norm = 2.0
noise_ratio = 3.0
[[rule]]
id = "head"
match = ["head.**"]
action = "withhold"
[[rule]]
id = "leaky"
match = ["body.**"]
when = { sensitivity = 0.5 }
keep = 0.5
noise_ratio = 3.0
"""
MODEL = {"head.w": 84, "body.w": 12, "body.b": 4, "tail.w": 9}


def policy(text: str = TEXT) -> Policy:
    return parse_toml(text.encode(), "p.toml", Policy)


def test_groups_name_the_rule_behind_each_knob() -> None:
    told = explain(policy(), Evidence(MODEL, 0.6, 0.0, 0.0, unhealthy=False))
    head, body, tail = told.groups
    assert (head.parameters, head.action, head.coordinates) == (("head.w",), Action.WITHHOLD, 84)
    assert head.knobs["action"].rules == ("head",)
    assert body.parameters == ("body.w", "body.b")
    assert body.knobs["noise_ratio"] == (3.0, ("base", "leaky"))
    assert body.knobs["keep"] == (0.5, ("leaky",))
    assert tail.knobs["max_norm"] == (2.0, ("base",))
    assert "keep" not in tail.knobs
    assert told.decided_by == ("base", "head", "leaky")


def test_what_is_told_is_what_is_decided() -> None:
    """The values of an explanation are those of the plan."""
    evidence = Evidence(MODEL, 0.6, 0.0, 0.0, unhealthy=False)
    plan = decide(policy(), evidence)
    for group in explain(policy(), evidence).groups:
        for name in group.parameters:
            assert plan.treatments[name].action is group.action
            assert plan.treatments[name].noise_std == group.noise_std
            assert plan.treatments[name].keep == group.knobs.get("keep", (1.0, ()))[0]


def test_noise_stands_beside_the_clip() -> None:
    """Its expected norm is noise_ratio x max_norm, whatever the size of the model."""
    noise = explain(policy(), Evidence(MODEL, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert noise.coordinates == 25
    assert (noise.norm, noise.clip, noise.ratio) == (pytest.approx(6.0), 2.0, pytest.approx(3.0))
    assert not noise.drowns


def test_with_a_model_the_noise_in_force_alone_stands_among_the_knobs() -> None:
    """The smaller one decides nothing; without a model nobody knows which that is."""
    each = TEXT.replace("keep = 0.5", "noise_multiplier = 0.75")
    loud = policy(each)
    for values, head in ((12, {"noise_ratio"}), (4000, {"noise_multiplier"})):
        model = {"body.w": values, "tail.w": 3}
        body, tail = explain(loud, Evidence(model, 0.6, 0.0, 0.0, unhealthy=False)).groups
        assert {knob for knob in body.knobs if knob.startswith("noise")} == head
        assert tail.knobs["noise_ratio"] == (3.0, ("base",))
    labels = stand_ins(loud)
    evidence = Evidence(dict.fromkeys(labels, 1), 0.6, 0.0, 0.0, unhealthy=False)
    body = next(
        one for one in explain(loud, evidence, labels=labels).groups if "body.**" in one.parameters
    )
    assert body.knobs["noise_ratio"].rules == ("base", "leaky")
    assert body.knobs["noise_multiplier"] == (0.75, ("leaky",))


def test_noise_on_each_value_grows_with_the_model() -> None:
    text = TEXT.replace("noise_ratio = 3.0", "noise_multiplier = 1.5")
    noise = explain(policy(text), Evidence(MODEL, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert (noise.norm, noise.ratio) == (pytest.approx(3.0 * 5), pytest.approx(7.5))  # 25 values
    assert noise.multiplier == pytest.approx(1.5)


def test_noise_that_drowns_the_update_is_told() -> None:
    loud = policy(TEXT.replace("noise_ratio = 3.0", "noise_ratio = 10.5"))
    noise = explain(loud, Evidence(MODEL, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert noise.drowns


def test_the_noise_of_a_promise_counts() -> None:
    """Under unit `site` each value carries noise_multiplier x clip_norm already."""
    text = (
        'schema = 1\nname = "p"\n[privacy]\nunit = "site"\nepsilon = 8\ndelta = 1e-6\n'
        'clip_norm = 0.5\nnoise_multiplier = 2\n[[rule]]\nid = "base"\n'
    )
    noise = explain(policy(text), Evidence({"a": 100}, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert (noise.norm, noise.clip) == (pytest.approx(0.5 * 2 * 10), 0.5)


def test_an_unbounded_update_has_no_ratio() -> None:
    bare = policy('schema = 1\nname = "p"\n[[rule]]\nid = "base"\n')
    noise = explain(bare, Evidence({"a": 4}, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert (noise.norm, noise.ratio, noise.clip) == (0.0, 0.0, math.inf)


def test_a_bound_on_a_part_is_no_bound_on_the_update() -> None:
    part = policy(
        'schema = 1\nname = "p"\n[[rule]]\nid = "base"\n'
        '[[rule]]\nid = "a"\nmatch = ["a"]\nmax_norm = 1\n'
    )
    noise = explain(part, Evidence({"a": 4, "b": 4}, 0.0, 0.0, 0.0, unhealthy=False)).noise
    assert noise is not None
    assert noise.clip == math.inf


def test_without_a_model_every_glob_has_a_stand_in() -> None:
    labels = stand_ins(policy())
    assert sorted(labels.values()) == ["body.**", OTHERS, "head.**"]
    told = explain(
        policy(),
        Evidence(dict.fromkeys(labels, 1), 0.0, 0.0, 0.0, unhealthy=False),
        labels=labels,
    )
    assert {group.parameters: group.action for group in told.groups} == {
        ("head.**",): Action.WITHHOLD,
        ("body.**", OTHERS): Action.RELEASE,
    }
    assert told.noise is None
    assert list(stand_ins(load_policy("baseline").policy).values()) == [EVERY]


def test_globs_that_cover_everything_leave_no_rest() -> None:
    text = 'schema = 1\nname = "p"\n[[rule]]\nid = "a"\nmatch = ["*", "*.**"]\n'
    assert list(stand_ins(policy(text)).values()) == ["*", "*.**"]
    assert OTHERS in stand_ins(policy(text.replace(', "*.**"', ""))).values()
