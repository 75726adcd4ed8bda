"""The commented starter file of `sentinel policy new`, and the test file beside it."""

from __future__ import annotations

_POLICY = """\
# Policy "{name}". Try it out: sentinel policy check, test and explain, each with this file.
#
# Only a rule without `when` lets parameters leave. Rules with `when` only tighten. Where several
# rules apply, the strictest value of each knob wins, so that their order does not matter.
schema = 1
name = "{name}"
# dataset = "radiology-2019-2026"   # the patients behind it; one privacy budget per dataset
# expires = 2027-06-30              # last day on which it is valid (UTC)

# No [privacy] table: nothing formal is promised. Protection is measured, and reports say so.
# [privacy]
# unit = "site"              # whose presence is hidden: the site's, a patient's or a record's; the
#                            # last two need guard.private() in the loop (docs/private-training.md)
# patients = 12000           # public size of the cohort; limits.min_patients is compared with it
# epsilon = 8.0              # for the life of the ledger
# delta = 1e-6               # less than 1 / patients
# clip_norm = 1.0            # L2 norm; take max_norm out of the rules then
# noise_multiplier = 16.0    # standard deviation of the noise / clip_norm; `check` says for how
#                            # many releases the budget lasts

[limits]
min_patients = 16            # patients behind an update; fewer: withhold
keep_releases = 20           # released updates that stay on disk for retries, the newest ones
metrics = ["num-examples"]   # every other metric is dropped

[[rule]]
id = "baseline"              # lets every parameter out, clipped and noised
match = ["**"]               # * stands for anything between two dots, ** across dots
max_norm = 1.0               # L2 norm of the update, before noise; lower it until it binds
noise_ratio = 2.0            # L2 norm of the noise / max_norm: against reading records back
# noise_multiplier = 1.0     # standard deviation of the noise on each value / max_norm: against
#                            # telling who took part; the larger of the two noises is added

# [[rule]]
# id = "head-never-leaves"   # the last layer gives away labels first
# match = ["classifier.**"]
# action = "withhold"

[[rule]]
id = "leaky"
when = {{ sensitivity = 0.5 }} # at or above; scores run from 0 to 1
noise_ratio = 5.0
keep = 0.5                   # share of values kept, chosen at random

[[rule]]
id = "too-leaky"
when = {{ sensitivity = 0.9 }}
action = "withhold-update"

[[rule]]
id = "crafted-model"
when = {{ suspicion = 0.5 }}
action = "refuse-round"

[[rule]]
id = "broken-model"
when = {{ unhealthy = true }}
action = "refuse-round"
"""

_CASES = """\
# Cases of {name}.toml: given evidence, what has to happen. Each rule has to apply in one case at
# least, and each rule with `when` has to stay out of one.
schema = 1

[[case]]
name = "a calm round leaves, clipped and noised"
evidence = {{ sensitivity = 0.1 }}
expect = {{ action = "release", rules = ["baseline"], max_norm = 1.0, noise_ratio = 2.0 }}

[[case]]
name = "a leaky update gets more noise and is thinned out"
evidence = {{ sensitivity = 0.5 }}
expect = {{ action = "release", rules = ["baseline", "leaky"], noise_ratio = 5.0, keep = 0.5 }}

[[case]]
name = "a very leaky update stays"
evidence = {{ sensitivity = 0.9 }}
expect = {{ action = "withhold-update" }}

[[case]]
name = "a crafted model is refused"
evidence = {{ suspicion = 0.5 }}
expect = {{ action = "refuse-round", rules = ["baseline", "crafted-model"] }}

[[case]]
name = "a broken model is refused"
evidence = {{ unhealthy = true }}
expect = {{ action = "refuse-round", rules = ["baseline", "broken-model"] }}
"""


def starter(name: str) -> tuple[str, str]:
    """Return the text of a starter policy and of its test file.

    Args:
        name: the policy's name: small letters, digits and hyphens.
    """
    return _POLICY.format(name=name), _CASES.format(name=name)
