"""A policy that the lab writes reads back as the same policy."""

from __future__ import annotations

import pytest

from sentinel.policy import load_policy
from sentinel.policy.store import parse_policy, shipped
from sentinel.stress.lab.policy_file import policy_toml

ODD = """
schema = 1
name = "odd"
dataset = "radiology-2019"
expires = 2030-06-30
[privacy]
unit = "patient"
patients = 1000
epsilon = 8.0
delta = 1e-6
clip_norm = 1.0
noise_multiplier = 1.1
batch = 32
adaptive_clip = { quantile = 0.5, floor = 0.1, ceiling = 10.0 }
[limits]
rounds_per_day = 48
[[rule]]
id = "some"
match = ["a.**", "**"]
max_norm = "auto"
max_norm_floor = 0.1
max_norm_ceiling = 2.0
max_abs = 1e-05
noise_ratio = 3.0
noise_multiplier = 0.25
[[rule]]
id = "head"
match = ["head.*"]
action = "withhold"
[[rule]]
id = "broken"
when = { unhealthy = true, suspicion = 0.25 }
action = "refuse-round"
"""


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_policies_survive_the_round_trip(name) -> None:
    policy = load_policy(name).policy
    assert parse_policy(policy_toml(policy, ["why"]).encode(), "again.toml").policy == policy


def test_every_key_survives_the_round_trip() -> None:
    policy = parse_policy(ODD.encode(), "odd.toml").policy
    assert parse_policy(policy_toml(policy, []).encode(), "again.toml").policy == policy


def test_comments_stand_on_top_and_say_nothing_to_the_parser() -> None:
    text = policy_toml(load_policy("baseline").policy, ['name = "other"', ""])
    assert '# name = "other"\n#\n' in text
    assert parse_policy(text.encode(), "again.toml").policy.name == "baseline"
