"""From a policy and evidence to a plan, by examples and by properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sentinel.policy.decide import (
    applied,
    decide,
    let_out,
    refuses,
    released_values,
    unmatched,
)
from sentinel.policy.globs import matches
from sentinel.policy.schema import Policy
from sentinel.terms import Action, Evidence, NormBound, Plan

CALM = {"sensitivity": 0.0, "suspicion": 0.0, "budget_spent": 0.0, "unhealthy": False}
SITE = {"unit": "site", "epsilon": 8.0, "delta": 1e-6, "clip_norm": 0.5, "noise_multiplier": 1.0}


def policy_of(*rules: dict[str, Any], privacy: dict[str, Any] | None = None) -> Policy:
    named = [{"id": f"r{at}", **_limited(rule)} for at, rule in enumerate(rules)]
    return Policy.model_validate({"schema": 1, "name": "p", "privacy": privacy, "rule": named})


def _limited(rule: dict[str, Any]) -> dict[str, Any]:
    """Give "auto" its floor and ceiling."""
    if rule.get("max_norm") != "auto":
        return rule
    return {"max_norm_floor": _FLOOR, "max_norm_ceiling": _CEILING, **rule}


def evidence_of(coordinates: dict[str, int], **scores: Any) -> Evidence:
    return Evidence(coordinates, **{**CALM, **scores})


# By example.


def test_an_empty_policy_withholds() -> None:
    plan = decide(policy_of(), evidence_of({"a": 3}))
    assert plan.action is Action.WITHHOLD
    assert plan.treatments["a"].action is Action.WITHHOLD
    assert let_out(policy_of(), ["a"]) == frozenset()


def test_a_parameter_that_no_rule_matches_stays() -> None:
    policy = policy_of({"match": ["head.**"]})
    plan = decide(policy, evidence_of({"head.w": 3, "body.w": 3}))
    assert plan.action is Action.RELEASE
    assert plan.treatments["head.w"].action is Action.RELEASE
    assert plan.treatments["body.w"].action is Action.WITHHOLD


def test_a_rule_with_when_lets_nothing_out() -> None:
    policy = policy_of({"when": {"sensitivity": 0.0}, "keep": 0.5})
    assert let_out(policy, ["a"]) == frozenset()
    assert decide(policy, evidence_of({"a": 3}, sensitivity=1.0)).action is Action.WITHHOLD


def test_noise_is_spread_over_what_is_released() -> None:
    """Standard deviation = noise_ratio x C / sqrt(D), D without the withheld coordinates."""
    policy = policy_of(
        {"max_norm": 2.0, "noise_ratio": 3.0}, {"match": ["head.**"], "action": "withhold"}
    )
    plan = decide(policy, evidence_of({"head.w": 84, "body.w": 12, "body.b": 4}))
    assert plan.treatments["body.w"].noise_std == pytest.approx(3.0 * 2.0 / math.sqrt(16))
    assert plan.bounds == (NormBound(frozenset({"body.w", "body.b"}), 2.0),)


def test_the_noise_of_a_multiplier_is_the_same_on_each_value_of_any_model() -> None:
    """Standard deviation = noise_multiplier x C, however many values share the update."""
    policy = policy_of({"max_norm": 2.0, "noise_multiplier": 1.5})
    for count in (0, 1, 10_000):
        assert decide(policy, evidence_of({"a": count})).treatments["a"].noise_std == 3.0


def test_of_the_two_noises_the_larger_one_is_in_force() -> None:
    """On few values the ratio, on many the multiplier, and never their sum; for each parameter."""
    policy = policy_of(
        {"max_norm": 2.0, "noise_ratio": 3.0},
        {"match": ["head.**"], "when": {"sensitivity": 0.5}, "noise_multiplier": 0.5},
    )
    for count, head in ((4, 3.0), (36, 1.0), (144, 1.0)):
        values = {"head.w": count // 2, "body.w": count // 2}
        plan = decide(policy, evidence_of(values, sensitivity=0.5))
        assert plan.treatments["head.w"].noise_std == pytest.approx(head)
        assert plan.treatments["body.w"].noise_std == pytest.approx(6.0 / math.sqrt(count))


def test_under_a_promise_noise_is_measured_by_the_clip() -> None:
    plan = decide(policy_of({"noise_ratio": 2.0}, privacy=SITE), evidence_of({"a": 25}))
    assert plan.treatments["a"].noise_std == pytest.approx(2.0 * 0.5 / 5)
    assert plan.bounds == ()
    part = policy_of({"match": ["a"], "noise_multiplier": 3.0}, privacy=SITE)
    assert decide(part, evidence_of({"a": 25})).treatments["a"].noise_std == 1.5


def test_the_strictest_value_of_each_knob_wins() -> None:
    policy = policy_of(
        {"max_norm": 2.0, "noise_ratio": 1.0, "keep": 0.25, "max_abs": 0.5},
        {"when": {"sensitivity": 0.5}, "noise_ratio": 3.0, "keep": 0.5, "max_abs": 0.1},
        {"match": ["a"], "max_norm": 1.0},
    )
    plan = decide(policy, evidence_of({"a": 1, "b": 3}, sensitivity=0.5))
    assert plan.treatments["b"].keep == 0.25
    assert plan.treatments["b"].max_abs == 0.1
    assert plan.treatments["b"].noise_std == pytest.approx(3.0)
    assert plan.bounds == (
        NormBound(frozenset({"a"}), 1.0),
        NormBound(frozenset({"a", "b"}), 2.0),
    )
    assert plan.decided_by == ("r0", "r1", "r2")


def test_a_threshold_is_reached_at_its_value() -> None:
    policy = policy_of({}, {"when": {"suspicion": 0.5}, "action": "refuse-round"})
    at = decide(policy, evidence_of({"a": 1}, suspicion=0.5))
    below = decide(policy, evidence_of({"a": 1}, suspicion=math.nextafter(0.5, 0)))
    assert (at.action, below.action) == (Action.REFUSE_ROUND, Action.RELEASE)
    assert below.decided_by == ("r0",)


def test_all_thresholds_of_a_rule_have_to_be_reached() -> None:
    rule = {"when": {"sensitivity": 0.5, "unhealthy": True}, "action": "withhold-update"}
    policy = policy_of({}, rule)
    assert decide(policy, evidence_of({"a": 1}, sensitivity=1.0)).action is Action.RELEASE
    assert decide(policy, evidence_of({"a": 1}, unhealthy=True)).action is Action.RELEASE
    both = decide(policy, evidence_of({"a": 1}, sensitivity=0.5, unhealthy=True))
    assert both.action is Action.WITHHOLD_UPDATE
    assert both.treatments["a"].action is Action.WITHHOLD


def test_a_bound_counts_what_another_rule_withholds_for_now() -> None:
    """Otherwise the rest would be scaled down less, just because more risk was seen."""
    policy = policy_of(
        {"max_norm": 1.0},
        {"match": ["a"], "when": {"sensitivity": 0.5}, "action": "withhold"},
    )
    plan = decide(policy, evidence_of({"a": 1, "b": 1}, sensitivity=0.7))
    assert plan.bounds == (NormBound(frozenset({"a", "b"}), 1.0),)


def test_names_that_never_leave_change_nothing_else() -> None:
    """They may stand in the evidence or not."""
    policy = policy_of(
        {"max_norm": 1.0, "noise_ratio": 1.0}, {"match": ["h"], "action": "withhold"}
    )
    with_it = decide(policy, evidence_of({"a": 4, "h": 100}))
    without = decide(policy, evidence_of({"a": 4}))
    assert with_it.treatments["a"] == without.treatments["a"]
    assert with_it.bounds == without.bounds


def test_an_update_of_no_coordinates_is_decided() -> None:
    policy = policy_of({"max_norm": 1.0, "noise_ratio": 1.0})
    assert decide(policy, evidence_of({})).action is Action.WITHHOLD
    empty = decide(policy, evidence_of({"a": 0}))
    assert empty.action is empty.treatments["a"].action is Action.RELEASE
    assert math.isfinite(empty.treatments["a"].noise_std)


def test_a_round_is_refused_by_the_global_model_alone() -> None:
    policy = policy_of(
        {},
        {"when": {"suspicion": 0.5}, "action": "refuse-round"},
        {"when": {"unhealthy": True}, "action": "withhold-update"},
        {"when": {"suspicion": 0.2, "sensitivity": 0.0}, "action": "refuse-round"},
        {"when": {"suspicion": 0.1}, "keep": 0.5},
    )
    assert refuses(policy, 0.49, unhealthy=False).action is Action.RELEASE
    assert refuses(policy, 0.49, unhealthy=False).decided_by == ()
    broken = refuses(policy, 0.0, unhealthy=True)
    assert (broken.action, broken.decided_by) == (Action.WITHHOLD_UPDATE, ("r2",))
    assert not broken.refused
    crafted = refuses(policy, 0.5, unhealthy=True)
    assert (crafted.action, crafted.decided_by) == (Action.REFUSE_ROUND, ("r1",))
    assert crafted.refused
    with pytest.raises(ValueError, match="from 0 to 1"):
        refuses(policy, math.nan, unhealthy=False)


def test_globs_that_match_nothing_are_named_with_their_rule() -> None:
    policy = policy_of({}, {"match": ["a", "b.*"]}, {"match": ["**", "c"]})
    assert unmatched(policy, ["a", "b"]) == (("r1", "b.*"), ("r2", "c"))
    assert unmatched(policy, ["a", "b.x", "c"]) == ()
    assert unmatched(policy_of({}), []) == ()


def test_what_one_rule_lets_out_another_may_withhold_and_each_name_is_decided_by_itself() -> None:
    policy = policy_of(
        {"match": ["a", "b.*"]},
        {"match": ["b.x"], "action": "withhold"},
        {"match": ["c"], "when": {"suspicion": 0.0}, "keep": 0.5},
    )
    names = ["a", "b.x", "b.y", "c", "d"]
    assert let_out(policy, names) == {"a", "b.y"}
    assert let_out(policy, []) == frozenset()
    for name in names:
        assert let_out(policy, [name]) == let_out(policy, names) & {name}


# By property.

NAMES = ("a", "b.x", "b.y", "c.d.e")
GLOBS = ("**", "a", "b.*", "b.x", "c.**", "**.e", "*")
_share = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
_norm = st.floats(1e-3, 1e3)


_FLOOR, _CEILING = 1e-2, 1e2


def _optional(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


_when = _optional(
    sensitivity=_share,
    suspicion=_share,
    budget_spent=_share,
    unhealthy=st.just(True),  # noqa: FBT003  Hypothesis's own signature
).filter(bool)
_match = st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2, unique=True)
_knobs = _optional(
    max_norm=st.one_of(_norm, st.just("auto")),
    max_abs=_norm,
    noise_ratio=st.floats(0, 100),
    noise_multiplier=st.floats(0, 10),
    keep=st.floats(1e-3, 1),
)


@st.composite
def rules_with_when(draw: st.DrawFn) -> dict[str, Any]:
    rule = {"when": draw(_when), **draw(_knobs)}
    action = draw(st.sampled_from([None, None, "withhold", "withhold-update", "refuse-round"]))
    if action is not None:
        rule["action"] = action
    if action in (None, "withhold"):
        rule["match"] = draw(_match)
    if len(rule) < 3 and action is None:
        rule["keep"] = 0.5
    return rule


@st.composite
def rules_without_when(draw: st.DrawFn) -> dict[str, Any]:
    action = draw(st.sampled_from(["release", "release", "release", "release", "withhold"]))
    return {"match": draw(_match), "action": action, **draw(_knobs)}


_any_rule = st.one_of(rules_with_when(), rules_without_when())
_rules = st.lists(_any_rule, max_size=5)
_base = st.one_of(
    st.just([]),
    st.just([{"max_norm": 1.0, "noise_ratio": 1.0}]),
    st.just([{"max_norm": 1.0, "noise_multiplier": 0.1}]),
    st.just([{"max_norm": 3.0}]),
)
_privacy = st.sampled_from([None, None, {**SITE, "unit": "patient", "patients": 100}])
_evidence = st.fixed_dictionaries(
    {
        "sensitivity": _share,
        "suspicion": _share,
        "budget_spent": _share,
        "unhealthy": st.booleans(),
        "auto_norms": st.just({}),
    }
)
_auto_norms = st.dictionaries(
    st.sampled_from(["r0", "r1", "r2", "r3"]), st.floats(allow_nan=True, allow_infinity=True)
)
_coordinates = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 10_000))


@st.composite
def policies(draw: st.DrawFn, extra: bool = False) -> list[Policy]:  # noqa: FBT001, FBT002  strategy
    """Draw a valid policy; with `extra`, also the same with one more rule of any kind."""
    rules, privacy = draw(_base) + draw(_rules), draw(_privacy)
    versions = [rules]
    if extra:
        versions.append([*rules, draw(_any_rule)])
    try:
        return [policy_of(*version, privacy=privacy) for version in versions]
    except ValidationError:  # a rule that asks for noise where nothing measures it
        assume(False)  # noqa: FBT003  Hypothesis's own signature
        raise


def assert_no_weaker(strict: Plan, loose: Plan, names: frozenset[str]) -> None:
    """Every knob in force for `names` is as strict in the one plan as in the other."""
    assert strict.action >= loose.action or loose.action is Action.WITHHOLD
    for name in names:
        one, other = strict.treatments[name], loose.treatments[name]
        assert one.action >= other.action
        assert one.max_abs <= other.max_abs
        assert one.noise_std >= other.noise_std
        assert one.keep <= other.keep
    for bound in loose.bounds:
        assert (
            any(
                tighter.names >= bound.names & names and tighter.max_norm <= bound.max_norm
                for tighter in strict.bounds
            )
            or not bound.names & names
        )


@settings(deadline=None)
@given(policies(), _coordinates, _evidence, st.randoms(use_true_random=False))
def test_the_order_of_rules_never_matters(
    drawn: list[Policy], coordinates: dict[str, int], scores: dict[str, Any], random: Any
) -> None:
    policy = drawn[0]
    mixed = policy.model_copy(
        update={"rules": tuple(random.sample(policy.rules, len(policy.rules)))}
    )
    evidence = Evidence(coordinates, **scores)
    one, other = decide(policy, evidence), decide(mixed, evidence)
    assert (one.action, one.treatments, one.bounds) == (
        other.action,
        other.treatments,
        other.bounds,
    )
    assert sorted(one.decided_by) == sorted(other.decided_by)


@settings(deadline=None)
@given(policies(), rules_with_when(), _coordinates, _evidence)
def test_a_rule_with_when_only_tightens(
    drawn: list[Policy], rule: dict[str, Any], coordinates: dict[str, int], scores: dict[str, Any]
) -> None:
    policy = drawn[0]
    try:
        more = policy_of(
            *(known.model_dump(exclude_unset=True) for known in policy.rules),
            {**rule, "id": "more"},
            privacy=policy.privacy and policy.privacy.model_dump(),
        )
    except ValidationError:
        assume(False)  # noqa: FBT003  Hypothesis's own signature
    evidence = Evidence(coordinates, **scores)
    strict, loose = decide(more, evidence), decide(policy, evidence)
    assert let_out(more, coordinates) == let_out(policy, coordinates)
    assert_no_weaker(strict, loose, frozenset(coordinates))


@settings(deadline=None)
@given(policies(extra=True), _coordinates, _evidence)
def test_no_further_rule_weakens_what_was_let_out(
    drawn: list[Policy], coordinates: dict[str, int], scores: dict[str, Any]
) -> None:
    """Whatever the rule is, with `when` or without."""
    policy, more = drawn
    evidence = Evidence(coordinates, **scores)
    before = let_out(policy, coordinates)
    strict, loose = decide(more, evidence), decide(policy, evidence)
    still = before & let_out(more, coordinates)
    assert_no_weaker(strict, loose, still)
    for name in before - still:
        assert strict.treatments[name].action is Action.WITHHOLD


@settings(deadline=None)
@given(policies(), _coordinates, _evidence, _evidence, _auto_norms)
def test_more_risk_never_means_less_protection(
    drawn: list[Policy],
    coordinates: dict[str, int],
    one: dict[str, Any],
    other: dict[str, Any],
    norms: dict[str, float],
) -> None:
    """Of sensitivity, suspicion, spent budget and ill health; the noise in force included."""
    scores = set(one) - {"auto_norms"}
    low = {score: min(one[score], other[score]) for score in scores}
    high = {score: max(one[score], other[score]) for score in scores}
    strict = decide(drawn[0], Evidence(coordinates, **high, auto_norms=norms))
    loose = decide(drawn[0], Evidence(coordinates, **low, auto_norms=norms))
    assert strict.action >= loose.action
    assert_no_weaker(strict, loose, frozenset(coordinates))
    early = refuses(drawn[0], low["suspicion"], unhealthy=low["unhealthy"])
    late = refuses(drawn[0], high["suspicion"], unhealthy=high["unhealthy"])
    assert late.action >= early.action


@settings(deadline=None)
@given(policies(), _coordinates, _evidence)
def test_the_noise_is_the_larger_of_the_two_and_no_width_thins_out_the_multiplier(
    drawn: list[Policy], coordinates: dict[str, int], scores: dict[str, Any]
) -> None:
    """Of each parameter, over the rules that reach it now."""
    policy = drawn[0].resolved({})
    evidence = Evidence(coordinates, **scores)
    plan = decide(policy, evidence)
    norm, values = policy.noise_norm or 0.0, max(1, released_values(plan, coordinates))
    wide = decide(policy, Evidence(dict.fromkeys(coordinates, 10**12), **scores))
    for name, treatment in plan.treatments.items():
        rules = [rule for rule in applied(policy, evidence) if matches(rule.match, name)]
        ratio = max((rule.noise_ratio or 0.0 for rule in rules), default=0.0)
        multiplier = max((rule.noise_multiplier or 0.0 for rule in rules), default=0.0)
        larger = max(ratio * norm / math.sqrt(values), multiplier * norm)
        assert treatment.noise_std == pytest.approx(larger)
        assert wide.treatments[name].noise_std >= multiplier * norm


@settings(deadline=None)
@given(policies(), _coordinates, _evidence)
def test_only_a_rule_without_when_lets_a_parameter_out(
    drawn: list[Policy], coordinates: dict[str, int], scores: dict[str, Any]
) -> None:
    policy = drawn[0]
    plan = decide(policy, Evidence(coordinates, **scores))
    for name, treatment in plan.treatments.items():
        behind = [rule for rule in policy.always if matches(rule.match, name)]
        may = bool(behind) and all(rule.action is Action.RELEASE for rule in behind)
        assert (name in let_out(policy, [name])) is may
        assert treatment.action is Action.WITHHOLD or may
    assert set(plan.treatments) == set(coordinates)


@settings(deadline=None)
@given(policies(), _coordinates, _evidence)
def test_a_refusal_at_the_opening_stands_at_the_end(
    drawn: list[Policy], coordinates: dict[str, int], scores: dict[str, Any]
) -> None:
    """What `refuses` says of a round, `decide` says of its update, whatever else is measured."""
    opening = refuses(drawn[0], scores["suspicion"], unhealthy=scores["unhealthy"])
    assert decide(drawn[0], Evidence(coordinates, **scores)).action >= opening.action


# The bound that follows.

AUTO = {"max_norm": "auto", "noise_ratio": 3.0}


def test_the_bound_that_follows_is_the_rounds_and_the_noise_is_measured_by_it() -> None:
    each = {"max_norm": "auto", "noise_multiplier": 3.0}
    plan = decide(policy_of(each), evidence_of({"a": 100}, auto_norms={"r0": 5.0}))
    assert plan.treatments["a"].noise_std == 15.0
    policy = policy_of(AUTO)
    for norm in (0.5, 5.0):
        plan = decide(policy, evidence_of({"a": 100}, auto_norms={"r0": norm}))
        assert plan.bounds == (NormBound(frozenset({"a"}), norm),)
        assert plan.treatments["a"].noise_std == pytest.approx(3.0 * norm / 10)


def test_without_history_the_bound_that_follows_is_its_start() -> None:
    """The geometric middle of floor and ceiling."""
    plan = decide(policy_of(AUTO), evidence_of({"a": 1}))
    assert plan.bounds == (NormBound(frozenset({"a"}), 1.0),)


def test_the_bound_that_follows_combines_with_others_by_the_smallest() -> None:
    """And noise is measured by the largest that always applies to everything, as for numbers."""
    fixed = {"max_norm": 2.0}
    both = policy_of(AUTO, fixed, {"match": ["a"], "max_norm": "auto", "max_norm_ceiling": 0.2})
    low = decide(both, evidence_of({"a": 4}, auto_norms={"r0": 0.5, "r2": 0.1}))
    assert [bound.max_norm for bound in low.bounds] == [0.1]
    assert low.treatments["a"].noise_std == pytest.approx(3.0 * 2.0 / 2)
    high = decide(both, evidence_of({"a": 4, "b": 0}, auto_norms={"r0": 9.0, "r2": 0.1}))
    assert [bound.max_norm for bound in high.bounds] == [0.1, 2.0]
    assert high.treatments["a"].noise_std == pytest.approx(3.0 * 9.0 / 2)


def test_a_bound_that_follows_is_no_number_until_it_is_resolved() -> None:
    """Nothing takes it for "no bound"."""
    policy = policy_of(AUTO)
    assert policy.resolved({"r0": 0.5}).rules[0].max_norm == 0.5
    assert policy.resolved({"r0": 0.5}).resolved({"r0": 7.0}).rules[0].max_norm == 0.5
    assert policy.noise_norm == _CEILING
    plain = policy_of({"max_norm": 1.0})
    assert plain.resolved({"r0": 0.5}) is plain


@settings(deadline=None)
@given(_auto_norms, st.lists(rules_with_when(), max_size=3), _evidence)
def test_whatever_was_remembered_the_bound_lies_between_floor_and_ceiling(
    norms: dict[str, float], others: list[dict[str, Any]], scores: dict[str, Any]
) -> None:
    """NaN, infinity and negative numbers too; and the noise is at least the ratio times it."""
    policy = policy_of(AUTO, *others)
    plan = decide(policy, Evidence({"a": 1, "b.x": 9}, **{**scores, "auto_norms": norms}))
    (whole,) = (bound.max_norm for bound in plan.bounds if len(bound.names) == 2)
    (resolved,) = policy.resolved(norms).rules[:1]
    assert isinstance(resolved.max_norm, float)
    assert _FLOOR <= resolved.max_norm <= _CEILING
    assert whole <= resolved.max_norm
    for treatment in plan.treatments.values():
        assert treatment.noise_std >= 3.0 * resolved.max_norm / math.sqrt(10) * (1 - 1e-12)
