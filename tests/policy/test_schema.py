"""What a policy file may say."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from sentinel.errors import PolicyError
from sentinel.policy.json_schema import json_schema
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.terms import Action, Adjacency, Unit

HEAD = 'schema = 1\nname = "p"\n'
SITE = '[privacy]\nunit = "site"\nepsilon = 8\ndelta = 1e-6\nclip_norm = 1\nnoise_multiplier = 1\n'
PATIENT = SITE.replace('"site"', '"patient"\npatients = 100')
ALL = '[[rule]]\nid = "all"\n'


def parse(text: str) -> Policy:
    return parse_toml(text.encode(), "p.toml", Policy)


def test_a_whole_file_is_read() -> None:
    policy = parse(
        HEAD
        + 'dataset = "radiology-2019"\nexpires = 2027-01-31\n'
        + PATIENT
        + '[limits]\nrounds_per_day = 48\nmin_patients = 32\nmetrics = ["num-examples"]\n'
        + ALL
        + 'max_norm = 2\n[[rule]]\nid = "leaky"\nmatch = ["a.*", "b"]\n'
        + "when = { sensitivity = 0.5, unhealthy = true }\nmax_abs = 1\nnoise_ratio = 3\n"
        + 'keep = 0.25\naction = "withhold"\n'
    )
    assert policy.privacy is not None
    assert (policy.privacy.unit, policy.privacy.epsilon) == (Unit.PATIENT, 8.0)
    assert policy.limits.statistics == "withhold"
    assert policy.rules[0].match == ("**",)
    assert policy.rules[1].when is not None
    assert policy.rules[1].when.unhealthy is True
    assert policy.rules[1].action is Action.WITHHOLD
    assert policy.always == policy.rules[:1]
    assert policy.noise_norm == 1.0  # under a promise: clip_norm


def test_adjacency_defaults_by_unit() -> None:
    """Replace for a site, add-or-remove otherwise; the file may say something else."""
    defaults = {parse(HEAD + text).privacy.adjacency for text in (SITE,)}  # type: ignore[union-attr]
    assert defaults == {Adjacency.REPLACE}
    privacy = parse(HEAD + PATIENT).privacy
    assert privacy is not None
    assert privacy.adjacency is Adjacency.ADD_OR_REMOVE
    said = parse(HEAD + SITE + 'adjacency = "add-or-remove"\n').privacy
    assert said is not None
    assert said.adjacency is Adjacency.ADD_OR_REMOVE


def test_a_policy_cannot_be_changed() -> None:
    policy = parse(HEAD + ALL)
    with pytest.raises(ValueError, match="frozen"):
        policy.name = "q"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        policy.rules[0].action = Action.RELEASE  # type: ignore[misc]


def test_expires_is_the_last_valid_day() -> None:
    policy = parse(HEAD + "expires = 2027-01-31\n")
    assert not policy.expired(dt.date(2027, 1, 31))
    assert policy.expired(dt.date(2027, 2, 1))
    assert not parse(HEAD).expired(dt.date(9999, 1, 1))


def test_noise_is_measured_by_the_largest_bound_on_everything() -> None:
    """C is the largest max_norm of the rules without `when` that match **."""
    policy = parse(
        HEAD
        + ALL
        + 'max_norm = 2\n[[rule]]\nid = "b"\nmax_norm = 1\n'
        + '[[rule]]\nid = "c"\nmatch = ["a"]\nmax_norm = 9\n'
        + '[[rule]]\nid = "d"\nwhen = {sensitivity = 0.1}\nmax_norm = 8\n'
    )
    assert policy.noise_norm == 2.0
    assert parse(HEAD + ALL).noise_norm is None


def test_under_a_promise_noise_on_each_value_needs_no_rule_for_everything() -> None:
    """Its norm is the promise's, and no further rule can thin it out."""
    policy = parse(HEAD + SITE + LEAKY + 'match = ["a"]\nnoise_multiplier = 0.01\n')
    assert policy.rules[0].noise_multiplier == 0.01  # less than a promise may have
    assert policy.rules[0].noisy
    assert not parse(HEAD + ALL + "noise_multiplier = 0\n").rules[0].noisy


def test_a_bound_that_follows_has_limits_and_may_stand_beside_a_promise_per_patient() -> None:
    """There the update is private before the rules see it."""
    for promise in ("", PATIENT):
        policy = parse(HEAD + promise + ALL + AUTO + LIMITS + "noise_ratio = 1\n")
        (limits,) = policy.autos.values()
        assert (limits.floor, limits.ceiling, limits.start) == (0.1, 10.0, pytest.approx(1.0))
        assert policy.noise_norm == (1.0 if promise else 10.0)
        resolved = policy.resolved({"all": 0.5})
        assert resolved.autos == {}
        assert resolved.noise_norm == (1.0 if promise else 0.5)
    assert parse(HEAD + ALL + "max_norm = 1\n").autos == {}


LEAKY = '[[rule]]\nid = "r"\n'
AUTO = 'max_norm = "auto"\n'
LIMITS = "max_norm_floor = 0.1\nmax_norm_ceiling = 10\n"

REFUSED = [
    (
        'schema = 2\nname = "p"\n',
        "schema: this version reads schema 1; install a newer gradient-sentinel, or write schema",
    ),
    ('schema = 0\nname = "p"\n', "schema: expected 1, the only format there is"),
    ('schema = true\nname = "p"\n', "schema: expected a whole number; got true"),
    ('name = "p"\n', "schema: is missing"),
    (HEAD + "extra = 1\n", "extra: unknown key"),
    (HEAD.replace('"p"', '"P p"'), "name: expected 1 to 64 characters"),
    (HEAD + 'expires = "2027-01-31"\n', "expires: expected a date"),
    (HEAD + "expires = 2027-01-31T00:00:00Z\n", "expires: expected a date"),
    (HEAD + SITE.replace("epsilon = 8", "epsilon = 0"), "privacy.epsilon: expected a number great"),
    (HEAD + SITE.replace("epsilon = 8", "epsilon = nan"), "finite"),
    (HEAD + SITE.replace("epsilon = 8", "epsilon = inf"), "finite"),
    (HEAD + SITE.replace("epsilon = 8", "epsilon = true"), "privacy.epsilon: expected a number"),
    (HEAD + SITE.replace("1e-6", "0"), "privacy.delta: expected a number greater than 0"),
    (HEAD + SITE.replace("1e-6", "0.5"), "privacy.delta: expected a number of 0.01 or less"),
    (HEAD + SITE.replace("noise_multiplier = 1", "noise_multiplier = 0.049"), "accountants break"),
    (HEAD + SITE.replace("clip_norm = 1", "clip_norm = 0"), "privacy.clip_norm: expected a number"),
    (HEAD + SITE.replace('"site"', '"patient"'), "patients is missing"),
    (HEAD + SITE.replace('"site"', '"record"'), "patients is missing"),
    (HEAD + PATIENT.replace("1e-6", "0.01"), "delta is too large"),
    (HEAD + SITE.replace('"site"', '"hospital"'), "privacy.unit: expected 'patient', 'record' or"),
    (HEAD + "[limits]\nmin_patients = 0\n", "limits.min_patients: expected a number of 1 or more"),
    (HEAD + "[limits]\nmin_patients = 1.5\n", "limits.min_patients: expected a whole number"),
    (HEAD + "[limits]\nmin_patients = true\n", "limits.min_patients: expected a whole number"),
    (HEAD + '[limits]\nmetrics = ["a", "a"]\n', "limits.metrics: each entry"),
    (HEAD + '[limits]\nmetrics = "a"\n', "limits.metrics: expected a list"),
    (HEAD + '[limits]\nstatistics = "drop"\n', "limits.statistics: expected 'withhold' or"),
    (HEAD + SITE + '[limits]\nmetrics = ["loss"]\n', 'under a promise only "num-examples"'),
    (HEAD + PATIENT + "[limits]\nmin_patients = 101\n", "larger than privacy.patients"),
    (HEAD + SITE + "[limits]\nmin_patients = 8\n", "privacy.patients: is missing; add the public"),
    (
        HEAD + "[limits]\nkeep_releases = 0\n",
        "limits.keep_releases: expected a number of 1 or more",
    ),
    (HEAD + "[limits]\nkeep_releases = 1.5\n", "limits.keep_releases: expected a whole number"),
    (HEAD + PATIENT + '[limits]\nstatistics = "as-parameters"\n', "does not cover running"),
    (HEAD + ALL + ALL, 'rule[1].id: "all" is the id of rule[0]'),
    (HEAD + LEAKY + "match = []\n", 'rule[0].match (rule "r"): expected at least 1 entry'),
    (HEAD + LEAKY + 'match = ["a", "a"]\n', "each entry may stand here only once"),
    (HEAD + LEAKY + 'match = ["a..b"]\n', "rule[0].match[0]"),
    (HEAD + LEAKY + 'match = "**"\n', 'rule[0].match (rule "r"): expected a list'),
    (HEAD + LEAKY + "max_norm = 0\n", "rule[0].max_norm"),
    (HEAD + LEAKY + "max_norm = -1\n", "rule[0].max_norm"),
    (HEAD + LEAKY + 'max_norm = "big"\n', 'max_norm (rule "r"): expected a number, as in 0.5, or'),
    (HEAD + LEAKY + "max_norm = [1]\n", 'max_norm (rule "r"): expected a number, as in 0.5, or'),
    (HEAD + LEAKY + "max_norm = true\n", 'max_norm (rule "r"): expected a number, as in 0.5; got'),
    (HEAD + LEAKY + AUTO, "needs max_norm_floor and max_norm_ceiling"),
    (HEAD + LEAKY + AUTO + "max_norm_floor = 1\n", "needs max_norm_floor and max_norm_ceiling"),
    (HEAD + LEAKY + AUTO + "max_norm_ceiling = 1\n", "needs max_norm_floor and max_norm_ceiling"),
    (HEAD + LEAKY + AUTO + "max_norm_floor = 2\nmax_norm_ceiling = 1\n", "swap them"),
    (HEAD + LEAKY + AUTO + "max_norm_floor = 0\nmax_norm_ceiling = 1\n", "rule[0].max_norm_floor"),
    (HEAD + LEAKY + AUTO + "max_norm_floor = 1\nmax_norm_ceiling = inf\n", "finite"),
    (HEAD + LEAKY + "max_norm = 1\nmax_norm_floor = 0.1\n", 'the limits of max_norm = "auto"'),
    (HEAD + LEAKY + "max_norm_ceiling = 1\n", 'the limits of max_norm = "auto"'),
    (HEAD + SITE + LEAKY + AUTO + LIMITS, 'under unit "site" the clip is the promise\'s'),
    (HEAD + LEAKY + "max_norm = nan\n", "finite"),
    (HEAD + LEAKY + "max_abs = inf\n", "finite"),
    (HEAD + LEAKY + "keep = 0\n", "rule[0].keep"),
    (HEAD + LEAKY + "keep = 1.01\n", "rule[0].keep"),
    (HEAD + LEAKY + "keep = true\n", "expected a number, as in 0.5; got true"),
    (HEAD + LEAKY + "max_norm = 1\nnoise_ratio = -1\n", "rule[0].noise_ratio"),
    (HEAD + LEAKY + "noise_ratio = 1\n", "measured against a norm, and none is given"),
    (HEAD + LEAKY + 'match = ["a"]\nmax_norm = 1\nnoise_ratio = 1\n', "none is given"),
    (HEAD + SITE + LEAKY + 'match = ["a"]\nnoise_ratio = 1\n', "needs a rule without `when`"),
    (HEAD + LEAKY + "max_norm = 1\nnoise_multiplier = -1\n", "rule[0].noise_multiplier"),
    (HEAD + LEAKY + "max_norm = 1\nnoise_multiplier = 1000001\n", "rule[0].noise_multiplier"),
    (HEAD + LEAKY + "noise_multiplier = 1\n", "rule[0].noise_multiplier (rule "),
    (HEAD + LEAKY + 'match = ["a"]\nmax_norm = 1\nnoise_multiplier = 1\n', "none is given"),
    (HEAD + SITE + LEAKY + "max_norm = 1\n", 'under unit "site" the clip is the promise\'s'),
    (HEAD + LEAKY + 'action = "block"\n', 'expected "release", "withhold"'),
    (HEAD + LEAKY + "action = 1\n", 'expected "release", "withhold"'),
    (HEAD + LEAKY + 'match = ["a"]\naction = "withhold-update"\n', "leave match out"),
    (HEAD + LEAKY + "when = {}\n", "expected at least one of sensitivity"),
    (HEAD + LEAKY + "when = { sensitivity = 1.1 }\nkeep = 1\n", "rule[0].when.sensitivity"),
    (HEAD + LEAKY + "when = { suspicion = -0.1 }\nkeep = 1\n", "rule[0].when.suspicion"),
    (HEAD + LEAKY + "when = { budget_spent = nan }\nkeep = 1\n", "finite"),
    (HEAD + LEAKY + "when = { unhealthy = false }\nkeep = 1\n", "only true is offered"),
    (HEAD + LEAKY + "when = { unhealthy = 1 }\nkeep = 1\n", "expected true; got 1"),
    (
        HEAD + LEAKY + 'when = { suspicion = 0.5 }\naction = "release"\n',
        'may not have action = "re',
    ),
    (HEAD + LEAKY + "when = { suspicion = 0.5 }\n", "the rule asks for nothing"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_what_a_file_may_not_say(text: str, sentence: str) -> None:
    """Each refusal names the key and what was expected."""
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + LEAKY + "noise_ratio = 1\n",
        HEAD + LEAKY + "noise_multiplier = 1\n",
        HEAD + SITE + LEAKY + 'match = ["a"]\nnoise_ratio = 1\n',
    ],
)
def test_who_needs_a_rule_for_everything_is_told_how_to_keep_the_rest_back(text: str) -> None:
    """Following the first half of the sentence alone would let more leave than before."""
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert "match ** (or no match)" in str(caught.value)
    assert 'one more rule, match = [...] with action = "withhold"' in str(caught.value)


def test_a_promise_takes_a_least_number_with_the_public_size_beside_it() -> None:
    policy = parse(HEAD + SITE + "patients = 100\n[limits]\nmin_patients = 8\nkeep_releases = 3\n")
    assert policy.privacy is not None
    assert policy.privacy.patients == 100
    assert (policy.limits.min_patients, policy.limits.keep_releases) == (8, 3)
    assert parse(HEAD).limits.keep_releases is None


def test_an_empty_policy_is_a_policy() -> None:
    """It lets nothing out, which `check` says; it is not a mistake of form."""
    assert parse(HEAD).rules == ()


def test_whole_numbers_are_taken_for_decimal_ones() -> None:
    policy = parse(HEAD + LEAKY + "max_norm = 2\nkeep = 1\n")
    assert (policy.rules[0].max_norm, policy.rules[0].keep) == (2.0, 1.0)


def test_json_schema_names_every_key_by_its_name_in_the_file() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {
        *("schema", "name", "dataset", "expires", "privacy", "limits", "rule")
    }
    assert schema["required"] == ["schema", "name"]
    version: dict[str, Any] = schema["properties"]["schema"]
    assert (version["minimum"], version["maximum"]) == (1, 1)
    rule: dict[str, Any] = schema["$defs"]["Rule"]
    assert rule["properties"]["action"]["enum"] == [action.word for action in Action]
    assert rule["properties"]["action"]["default"] == "release"
    assert rule["additionalProperties"] is False
    assert "null" not in json.dumps(schema)
    assert rule["properties"]["keep"]["maximum"] == 1
    assert rule["properties"]["when"]["$ref"] == "#/$defs/When"
