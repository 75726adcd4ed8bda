"""Policies in plain sentences."""

from __future__ import annotations

import pytest

from sentinel.policy import words
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.terms import Action

HEAD = 'schema = 1\nname = "p"\n'
SITE = (
    '[privacy]\nunit = "site"\nepsilon = 8\ndelta = 1e-6\nclip_norm = 0.5\nnoise_multiplier = 2\n'
)


def policy(text: str) -> Policy:
    return parse_toml((HEAD + text).encode(), "p.toml", Policy)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("", "Always: every parameter may leave; nothing more is asked."),
        (
            "max_abs = 0.1\nmax_norm = 2\nkeep = 0.25",
            (
                "Always: every parameter may leave; no value may change by more than 0.1; the "
                "change is scaled down to a size (L2 norm) of at most 2; 25 % of the values are "
                "kept, chosen at random."
            ),
        ),
        (
            "max_norm = 2\nnoise_multiplier = 1.5",
            (
                "Always: every parameter may leave; the change is scaled down to a size (L2 norm) "
                "of at most 2; noise with a standard deviation of 1.5 times the bound on the size "
                "is added to every value."
            ),
        ),
        (
            "max_norm = 2\nwhen = { suspicion = 0.5 }\nnoise_ratio = 5\nnoise_multiplier = 1.5",
            (
                "When the suspicion about the global model is 0.5 or more: for every parameter, "
                "the change is scaled down to a size (L2 norm) of at most 2; noise 5 times as "
                "large as the bound on the size is added, or noise with a standard deviation of "
                "1.5 times the bound on the size is added to every value, whichever is more."
            ),
        ),
        (
            'max_norm = "auto"\nmax_norm_floor = 0.1\nmax_norm_ceiling = 10',
            (
                "Always: every parameter may leave; the change is scaled down to a size (L2 norm) "
                "that follows what left this site before, from 0.1 to 10, 1 at first."
            ),
        ),
        ('match = ["a.*", "b"]', "Always: what matches a.* or b may leave; nothing more is asked."),
        ('match = ["a"]\naction = "withhold"', "Always: what matches a is withheld."),
        (
            'when = { budget_spent = 0.8, unhealthy = true }\naction = "withhold-update"',
            (
                "When the spent share of the privacy budget is 0.8 or more and the global model is "
                "broken: the whole update is withheld."
            ),
        ),
        (
            "when = { sensitivity = 0.5 }\nmax_norm = 1",
            (
                "When the sensitivity score of the update is 0.5 or more: for every parameter, the "
                "change is scaled down to a size (L2 norm) of at most 1."
            ),
        ),
        (
            'when = { suspicion = 0.5 }\naction = "refuse-round"',
            "When the suspicion about the global model is 0.5 or more: the round is refused.",
        ),
    ],
)
def test_a_rule_is_one_sentence(rule: str, sentence: str) -> None:
    base = '[[rule]]\nid = "base"\nmax_norm = 2\n'  # what noise is measured by
    found = policy(f'[[rule]]\nid = "r"\n{rule}\n{base}')
    assert words.sentence(found.rules[0]) == sentence


def test_a_promise_says_whose_how_much_and_what_is_done_for_it() -> None:
    told = words.promise(policy(SITE))
    assert "differential privacy for the whole site (replace): epsilon 8 at delta 1e-06" in told
    assert "the whole update is clipped to a size (L2 norm) of 0.5" in told
    assert "noise of standard deviation 1 on every value" in told
    assert "promises nothing formal" in words.promise(policy(""))


def private(unit: str, more: str = "") -> str:
    return words.promise(policy(SITE.replace('"site"', f'"{unit}"\npatients = 12000\n{more}')))


def test_a_promise_per_patient_says_what_is_clipped_and_where_the_noise_goes() -> None:
    """The sum of each patient is clipped; the noise is on the sum before it is divided."""
    assert private("patient", "batch = 120\nrecords_per_patient = 8") == (
        "It promises differential privacy for each patient (add-or-remove): epsilon 8 at delta "
        "1e-06, for the life of the ledger. For that, every step of the training takes each of the "
        "12,000 patients by chance, with probability 120/12,000 = 0.01. At most 8 records of a "
        "patient count in a step, and all that they contribute is added up. What one patient "
        "contributes to a step is clipped to a size (L2 norm) of 0.5, and the sum over all that "
        "were taken gets noise of standard deviation 1 on every value. The noised sum is then "
        "divided by 120, however many were taken. The training process does all this itself: at "
        "level L0 the promise is its claim."
    )


def test_a_promise_per_record_says_nothing_of_patients() -> None:
    told = private("record", "records = 36000\nbatch = 120")
    assert "each of the 36,000 records by chance, with probability 120/36,000 = 0.00333." in told
    assert "What one record contributes to a step is clipped" in told
    assert "patient" not in told


def test_a_clip_norm_that_follows_is_said_with_its_limits() -> None:
    clip = "adaptive_clip = { quantile = 0.5, floor = 0.01, ceiling = 10.0 }"
    told = private("patient", f"batch = 120\n{clip}")
    assert (
        "clipped to a size (L2 norm) of 0.5 at first, which then moves from step to step, between "
        "0.01 and 10, to the size that 50 % of the patients stay under (asked with noise, and "
        "covered by the same epsilon), and the sum over all that were taken gets noise of standard "
        "deviation at least 2 times that size on every value."
    ) in told


def test_a_promise_per_patient_without_a_batch_says_so() -> None:
    assert "batch is missing" in private("patient")


def test_limits_say_what_is_missing_too() -> None:
    assert words.limits(policy("")) == (
        "No least number of patients is asked for. Metrics that may leave: none."
    )
    everything = (
        '[limits]\nmin_patients = 9\nrounds_per_day = 3\nmetrics = ["num-examples", "loss"]\n'
        'statistics = "as-parameters"\n'
    )
    assert words.limits(policy(everything)) == (
        "An update with fewer than 9 patients behind it is withheld. At most 3 updates leave per "
        "day. Metrics that may leave: num-examples, loss. Running statistics of normalisation "
        "layers are treated like parameters."
    )


def test_limits_say_what_stays_on_disk_and_which_number_counts_under_a_promise() -> None:
    site = SITE + "patients = 100\n"
    told = words.limits(policy(site + "[limits]\nmin_patients = 9\nkeep_releases = 7\n"))
    assert told.startswith(
        "An update with fewer than 9 patients behind it is withheld (the public size of the cohort "
        "counts). The newest 7 released updates stay on disk for retries."
    )


def test_every_action_has_its_words() -> None:
    assert len({words.outcome(action) for action in Action}) == len(Action)
    assert set(words.ACTIONS) == set(Action)
