"""The shipped policies: sound, tested, and with the schema that stands beside them."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace

import pytest

from sentinel.paths import bundled
from sentinel.policy import decide, load_policy, refuses
from sentinel.policy.cases import parse_cases, run_cases
from sentinel.policy.checks import Severity, check, failed
from sentinel.policy.json_schema import json_schema
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.policy.starter import starter
from sentinel.policy.store import TEST_SUFFIX, shipped
from sentinel.terms import Action, Evidence

TODAY = dt.date(2026, 11, 20)
NAMES = ("baseline", "chest-xray", "genomics", "tabular-ehr")


def test_all_four_are_shipped() -> None:
    assert tuple(shipped()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_is_without_errors_and_warnings(name: str) -> None:
    """It fits any model, so that a made-up one may stand for all."""
    found = check(load_policy(name).policy, TODAY, {"any.weight": 3, "bias": 1})
    assert [one for one in found if one.severity is not Severity.NOTE] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_passes_its_own_cases(name: str) -> None:
    tests = shipped()[name].with_name(name + TEST_SUFFIX)
    report = run_cases(load_policy(name).policy, parse_cases(tests.read_bytes(), str(tests)))
    assert report.passed, report


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_has_what_every_one_should_have(name: str) -> None:
    """A clip and noise always, a least number of patients, and a refusal of bad global models."""
    policy = load_policy(name).policy
    base = policy.rules[0]
    assert policy.privacy is None
    assert base.id == "baseline"
    assert base.max_norm is not None
    assert base.noise_ratio is not None
    assert base.noise_ratio >= 2
    assert policy.limits.min_patients is not None
    assert policy.limits.min_patients >= 8
    assert policy.limits.metrics == ("num-examples",)
    assert policy.limits.keep_releases == 20
    assert refuses(policy, 0.5, unhealthy=False).refused
    assert refuses(policy, 0.0, unhealthy=True).refused
    assert refuses(policy, 0.49, unhealthy=False).action is Action.RELEASE


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_says_that_it_promises_nothing_formal(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    assert "# Promise: none." in text
    assert "no formal guarantee" in text
    assert "# Provenance of the figures" in text
    assert text.startswith("#:schema ./policy.schema.json\n")


def test_genomics_has_the_noise_that_the_policy_of_its_figures_has_where_that_was_measured() -> (
    None
):
    """On 3841 values, to one part in a hundred."""
    values = Evidence({"w": 3841}, 0.0, 0.0, 0.0, unhealthy=False)
    for score in (0.0, 0.5):
        stds = [
            decide(load_policy(name).policy, replace(values, sensitivity=score)).treatments["w"]
            for name in ("genomics", "tabular-ehr")
        ]
        assert stds[0].noise_std == pytest.approx(stds[1].noise_std, rel=0.01)


def test_the_json_schema_beside_them_is_current() -> None:
    """Made by: sentinel policy schema -o policies/policy.schema.json."""
    written = (bundled("policies") / "policy.schema.json").read_text(encoding="utf-8")
    assert written == json.dumps(json_schema(), indent=2) + "\n"


def test_the_starter_is_sound_and_passes_its_own_cases() -> None:
    text, tests = starter("our-site")
    policy = parse_toml(text.encode(), "our-site.toml", Policy)
    assert policy.name == "our-site"
    assert [one for one in check(policy, TODAY) if one.severity is not Severity.NOTE] == []
    assert run_cases(policy, parse_cases(tests.encode(), "our-site.test.toml")).passed


def test_the_commented_parts_of_the_starter_are_right_too() -> None:
    """Who takes the comment signs away, and does what they say, has a policy that releases."""
    lines = starter("our-site")[0].splitlines()
    keys = ("# [", "# id", "# match", "# action", "# unit", "# patients", "# epsilon", "# delta")
    more = ("# clip_norm", "# noise_multiplier", "# dataset", "# expires")
    opened = [line[2:] if line.startswith(keys + more) else line for line in lines]
    unbound = [line for line in opened if not line.startswith("max_norm")]  # the promise clips
    policy = parse_toml("\n".join(unbound).encode(), "our-site.toml", Policy)
    assert policy.privacy is not None
    assert not failed(check(policy, TODAY))
    assert "head-never-leaves" in {rule.id for rule in policy.rules}
    assert policy.expires == dt.date(2027, 6, 30)
