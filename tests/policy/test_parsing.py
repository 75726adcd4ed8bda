"""Errors of policy files: where, what was expected, what came."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.errors import PolicyError
from sentinel.policy.parsing import MAX_BYTES, parse_toml
from sentinel.policy.schema import Policy
from sentinel.policy.store import shipped

WRONG = """\
schema = 1
name = "bad"
rulez = 3

[privacy]
unit = "patience"
epsilon = 8

[limits]
min_patient = 3

[[rule]]
id = "a"
match = ["fine", "a..b"]

[[rule]]   # a comment
id = "leaky"
when = { sensitivity = 5 }
keep = true

[[rule]]
id = "other"
when.suspicion = "high"
"""


def refusal(raw: bytes) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_toml(raw, "p.toml", Policy)
    return str(caught.value)


def test_every_problem_is_told_at_once_with_its_line() -> None:
    lines = refusal(WRONG.encode()).split("\n")
    starts = {
        "p.toml:3: rulez: unknown key; expected one of",
        "p.toml:6: privacy.unit: expected 'patient', 'record' or 'site'; got \"patience\"",
        "p.toml:5: privacy.delta: is missing; add it",
        "p.toml:5: privacy.clip_norm: is missing; add it",
        "p.toml:5: privacy.noise_multiplier: is missing; add it",
        "p.toml:10: limits.min_patient: unknown key; expected one of",
        'p.toml:14: rule[0].match[1] (rule "a"): a glob may not begin or end with a dot',
        'p.toml:18: rule[1].when.sensitivity (rule "leaky"): expected a number of 1.0 or less; got',
        'p.toml:19: rule[1].keep (rule "leaky"): expected a number, as in 0.5; got true',
        'p.toml:23: rule[2].when.suspicion (rule "other"): expected a number, as in 0.5; got "hig',
    }
    assert len(lines) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rules = []", "did you mean rule?"),
        ("[limits]\nmin_patient = 3", "did you mean min_patients?"),
        ('[[rule]]\nid = "a"\nnorm_max = 2', "expected one of action, id, keep, match, max_abs"),
        ('[[rule]]\nid = "a"\nwhen = {sensitivty = 1}', "did you mean sensitivity?"),
    ],
)
def test_an_unknown_key_is_told_with_the_known_ones(key: str, meant: str) -> None:
    assert meant in refusal(f'schema = 1\nname = "p"\n{key}\n'.encode())


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"schema = \n", "p.toml: not valid TOML: Invalid value (at line 1, column 10)"),
        (b"schema = 1\nschema = 1\n", "not valid TOML"),
        (b"name = '\xff'\n", "not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (b"a = " + b"[" * 100_000, "not valid TOML: nested too deeply"),
        (b"schema = " + b"9" * 5_000, "not valid TOML"),
        (b'name = "p"\nschema = 0x' + b"f" * 5_000, "schema: "),
        (b'schema = 1\nname = "p"\nrule = 3\n', "rule: expected a list"),
        (b'schema = 1\nname = "p"\nrule = [3]\n', "rule[0]: expected a table"),
        (b'schema = 1\nname = "p"\nlimits = 3\n', "limits: expected a table"),
    ],
)
def test_a_broken_file_is_refused_with_a_sentence(raw: bytes, sentence: str) -> None:
    assert sentence in refusal(raw)


@settings(deadline=None)
@given(st.data())
def test_no_mutilated_file_gets_past_the_two_outcomes(data: st.DataObject) -> None:
    """A shipped policy with a piece cut out or put in is a policy or a PolicyError."""
    raw = shipped()["genomics"].read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 60)))
    piece = data.draw(st.one_of(st.binary(max_size=8), st.just(b"nan"), st.just(b"[[rule]]\n")))
    try:
        parse_toml(raw[:start] + piece + raw[end:], "p.toml", Policy)
    except PolicyError as error:
        assert str(error).startswith("p.toml")  # noqa: PT017  both outcomes are right here
