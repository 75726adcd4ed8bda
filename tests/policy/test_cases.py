"""Policy test files."""

from __future__ import annotations

import pytest

from sentinel.errors import PolicyError
from sentinel.policy.cases import parse_cases, run_cases
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy

POLICY = """\
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
when = { sensitivity = 0.5 }
keep = 0.5
max_abs = 0.1
"""
CALM = """\
schema = 1
[[case]]
name = "calm"
evidence = { parameters = { "head.w" = 5, "body.w" = 10 } }
expect = { action = "release", rules = ["head", "base"], withheld = ["head.w"], max_norm = 2.0 }
"""
LEAKY = """\
[[case]]
name = "leaky"
evidence = { sensitivity = 0.5 }
expect = { action = "release", noise_ratio = 3, keep = 0.5, max_abs = 0.1 }
"""


def report_of(text: str) -> tuple[bool, list[str], tuple[str, ...]]:
    policy = parse_toml(POLICY.encode(), "p.toml", Policy)
    report = run_cases(policy, parse_cases(text.encode(), "p.test.toml"))
    problems = [problem for result in report.results for problem in result.problems]
    return report.passed, problems, report.uncovered


def test_right_expectations_pass() -> None:
    assert report_of(CALM + LEAKY) == (True, [], ())


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ('action = "release", rules', 'action = "withhold", rules', "action: expected withhold, g"),
        ('["head", "base"]', '["base"]', "rules: expected base, got base, head"),
        ('["head.w"]', "[]", "withheld: expected none, got head.w"),
        ("max_norm = 2.0", "max_norm = 2.1", "max_norm of body.w: expected 2.1, got 2"),
        ("noise_ratio = 3", "noise_ratio = 3.001", "noise_ratio of weight: expected 3.001, got 3"),
        ("keep = 0.5", "keep = 1.0", "keep of weight: expected 1, got 0.5"),
        ("max_abs = 0.1", "max_abs = 0.2", "max_abs of weight: expected 0.2, got 0.1"),
        ("max_norm = 2.0", 'max_norm = 2.0, match = ["head.w"]', "max_norm: no parameter is rel"),
    ],
)
def test_a_wrong_expectation_fails_with_what_came(right: str, wrong: str, problem: str) -> None:
    passed, problems, _ = report_of((CALM + LEAKY).replace(right, wrong))
    assert not passed
    assert problems[0].startswith(problem)


def test_a_rule_that_no_case_reaches_fails() -> None:
    assert report_of(CALM) == (False, [], ('no case in which rule "leaky" applies',))


def test_a_rule_that_every_case_reaches_fails() -> None:
    always = CALM.replace("evidence = {", "evidence = { sensitivity = 0.9,")
    always = always.replace('["head", "base"]', '["head", "base", "leaky"]')
    assert report_of(always) == (False, [], ('no case in which rule "leaky" does not apply',))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("schema = 1\n", "case: is missing"),
        (CALM.replace("evidence", "given"), 'case[0].given (case "calm"): unknown key'),
        (LEAKY.join(["schema = 1\n", ""]).replace("0.5 }", "2 }"), "case[0].evidence.sensitivity"),
        (CALM.replace('"release"', '"block"'), "case[0].expect.action"),
    ],
)
def test_a_malformed_test_file_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_cases(text.encode(), "p.test.toml")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("values", "ratio", "multiplier"), [(4, 3.0, 1.5), (900, 15.0, 0.5), (0, 3.0, 3.0)]
)
def test_either_noise_is_told_in_the_unit_of_the_other_too(
    values: int, ratio: float, multiplier: float
) -> None:
    """A parameter has one noise: on few values that of the ratio, on many of the multiplier."""
    text = POLICY.replace("noise_ratio = 3.0", "noise_ratio = 3.0\nnoise_multiplier = 0.5")
    policy = parse_toml(text.encode(), "p.toml", Policy)
    case = (
        f'schema = 1\n[[case]]\nname = "c"\nevidence = {{ parameters = {{ w = {values} }} }}\n'
        f'expect = {{ action = "release", noise_ratio = {ratio}, noise_multiplier = VALUE }}\n'
    )
    for wanted, problems in (
        (multiplier, ()),
        (0.1, (f"noise_multiplier of w: expected 0.1, got {multiplier:g}",)),
    ):
        raw = case.replace("VALUE", str(wanted)).encode()
        report = run_cases(policy, parse_cases(raw, "p.test.toml"))
        assert report.results[0].problems == problems


def test_a_case_says_what_a_bound_that_follows_has_come_to() -> None:
    """Left out, it is that of the first round; of another rule it is a mistake."""
    text = POLICY.replace(
        "max_norm = 2.0", 'max_norm = "auto"\nmax_norm_floor = 0.5\nmax_norm_ceiling = 8.0', 1
    )
    policy = parse_toml(text.encode(), "p.toml", Policy)

    def problems(evidence: str, expect: str) -> list[str]:
        case = (
            f'schema = 1\n[[case]]\nname = "c"\nevidence = {{ {evidence} }}\n'
            f'expect = {{ action = "release", {expect} }}\n'
        )
        report = run_cases(policy, parse_cases(case.encode(), "p.test.toml"))
        return [problem for result in report.results for problem in result.problems]

    assert problems("", "max_norm = 2.0, noise_ratio = 3") == []
    assert problems("auto_norms = { base = 5 }", "max_norm = 5, noise_ratio = 3") == []
    assert problems("auto_norms = { base = 99 }", "max_norm = 8.0") == []
    assert problems("auto_norms = { leaky = 5 }", "max_norm = 2.0") == [
        'auto_norms: rule "leaky" has no max_norm = "auto"'
    ]
    assert problems("", "max_norm = 5")[0].startswith("max_norm of weight: expected 5, got 2")
