"""What `check` finds in a policy that the schema allows."""

from __future__ import annotations

import datetime as dt

import pytest

from sentinel.policy.checks import Affordable, Severity, check, failed
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy

TODAY = dt.date(2026, 11, 20)
MODEL = {"body.weight": 100, "head.weight": 10}
HEAD = 'schema = 1\nname = "p"\n[limits]\nmin_patients = 8\n'
BASE = '[[rule]]\nid = "base"\nmax_norm = 1\nnoise_ratio = 1\n'
EACH = BASE.replace("noise_ratio", "noise_multiplier")
STOPS = (
    '[[rule]]\nid = "crafted"\nwhen = { suspicion = 0.5 }\naction = "refuse-round"\n'
    '[[rule]]\nid = "broken"\nwhen = { unhealthy = true }\naction = "refuse-round"\n'
)
SITE = (
    '[privacy]\nunit = "site"\npatients = 100\nepsilon = 8\ndelta = 1e-6\nclip_norm = 1\n'
    "noise_multiplier = 1\n"
)
PATIENT = SITE.replace("site", "patient").replace("epsilon", "batch = 5\nepsilon")
RULE = '[[rule]]\nid = "r"\n'


def findings(text: str, model: dict[str, int] | None = None) -> list[tuple[str, str | None, str]]:
    policy = parse_toml(text.encode(), "p.toml", Policy)
    found = check(policy, TODAY, model)
    assert failed(found) is any(one.severity is Severity.ERROR for one in found)
    return [(one.severity.value, one.rule, one.message) for one in found]


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_a_promise_per_patient_or_record_needs_a_batch(unit: str) -> None:
    text = HEAD + SITE.replace("site", unit) + STOPS + '[[rule]]\nid = "b"\nmax_norm = 1\n'
    (error,) = (one for one in findings(text) if one[0] == "error")
    assert error[2].startswith("releases nothing: privacy.batch is missing")


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_a_promise_per_patient_or_record_is_told_as_private_training(unit: str) -> None:
    text = HEAD + SITE.replace("site", unit).replace("epsilon", "batch = 5\nepsilon")
    found = findings(text + STOPS + '[[rule]]\nid = "b"\nmax_norm = 1\n')
    assert not [one for one in found if one[0] == "error"]
    (note,) = (one[2] for one in found if "guard.private" in one[2])
    assert f"takes each {unit} with probability 0.05" in note


@pytest.mark.parametrize(
    ("releases", "or_more", "severity", "said"),
    [
        (
            0,
            False,
            Severity.ERROR,
            (
                "releases nothing: one release alone spends more than epsilon 8 at delta 1e-06, "
                "unit site, adjacency replace"
            ),
        ),
        (1, False, Severity.NOTE, "pays for 1 release, "),
        (1500, False, Severity.NOTE, "adjacency replace; by exact) pays for 1,500 releases, "),
        (10**6, True, Severity.NOTE, "pays for 1,000,000 or more releases, "),
    ],
)
def test_a_budget_is_told_in_releases_and_for_none_it_is_an_error(
    *, releases: int, or_more: bool, severity: Severity, said: str
) -> None:
    text = HEAD + SITE + STOPS + '[[rule]]\nid = "b"\n'
    policy = parse_toml(text.encode(), "p.toml", Policy)
    found = check(policy, TODAY, pays_for=Affordable(releases, or_more, 1.0, "exact"))
    assert [one.severity for one in found if said in one.message] == [severity]
    assert failed(found) is (releases == 0)


@pytest.mark.parametrize(
    ("steps", "or_more", "severity", "said"),
    [
        (
            0,
            False,
            Severity.ERROR,
            (
                "releases nothing: the first step of private training alone spends epsilon 0.56 by "
                "PLD, more than epsilon 8 at delta 1e-06, unit patient, adjacency add-or-remove"
            ),
        ),
        (1, False, Severity.NOTE, "pays for 1 step of private training in all rounds together"),
        (20, False, Severity.NOTE, "which is 1 pass over the 100 patients; then nothing leaves"),
        (240, False, Severity.NOTE, "pays for 240 steps of private training in all rounds"),
        (240, False, Severity.NOTE, "which is 12 passes over the 100 patients"),
        (50, False, Severity.NOTE, "which is 2.5 passes over the 100 patients"),
        (90000, True, Severity.NOTE, "pays for 90,000 or more steps"),
        (90000, True, Severity.NOTE, "which is 4,500 passes over the 100 patients"),
    ],
)
def test_a_budget_is_told_in_steps_and_passes_and_for_no_step_it_is_an_error(
    *, steps: int, or_more: bool, severity: Severity, said: str
) -> None:
    text = HEAD + PATIENT + STOPS + '[[rule]]\nid = "b"\n'
    policy = parse_toml(text.encode(), "p.toml", Policy)
    found = check(policy, TODAY, pays_for=Affordable(steps, or_more, 0.56, "PLD"))
    assert [one.severity for one in found if said in one.message] == [severity]
    assert failed(found) is (steps == 0)


@pytest.mark.parametrize("unit", ["patient", "record"])
@pytest.mark.parametrize("said", ["one patient alone may be behind", "reads that much more"])
def test_what_private_training_hides_already_is_no_warning(unit: str, said: str) -> None:
    """The update is private before it is looked at, however few are behind it."""
    wide = '[[rule]]\nid = "a"\nmax_norm = "auto"\nmax_norm_floor = 1\nmax_norm_ceiling = 9\n'
    bare = HEAD.replace("[limits]\nmin_patients = 8\n", "")
    promised = findings(bare + PATIENT.replace('"patient"', f'"{unit}"') + wide + STOPS)
    assert not [one for one in promised if said in one[2]]
    assert [one[0] for one in findings(bare + wide + STOPS) if said in one[2]] == ["warning"]


def test_a_sound_policy_has_nothing_but_the_note_on_its_promise() -> None:
    for base in (BASE, EACH):
        assert [severity for severity, _, _ in findings(HEAD + base + STOPS, MODEL)] == ["note"]


def test_more_noise_on_each_value_than_a_promise_adds_is_no_idle_knob() -> None:
    text = HEAD + SITE + STOPS + RULE + "noise_multiplier = 1.5\nnoise_ratio = 1.5\n"
    assert not [one for one in findings(text) if "adds nothing" in one[2]]


@pytest.mark.parametrize(
    ("rule", "outgrown"),
    [
        ("noise_ratio = 10", True),  # over 110 values the other has 10.5
        ("noise_ratio = 11", False),
        ("noise_ratio = 10\nnoise_multiplier = 1.1", False),
        ("keep = 0.5", False),
    ],
)
def test_a_ratio_that_the_noise_of_every_round_has_outgrown_on_this_model_is_told(
    rule: str,
    outgrown: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """Who sees more risk would take the rule for protection that it is not."""
    text = HEAD + EACH + STOPS + RULE + "when = { sensitivity = 0.5 }\n" + rule + "\n"
    said = [
        one for one in findings(text, MODEL) if one[1] == "r" and "adds nothing on this" in one[2]
    ]
    assert bool(said) is outgrown
    assert not said or "0.953 times the bound on each of them, and every round has 1;" in said[0][2]
    assert not [one for one in findings(text) if one[1] == "r"]


def test_noise_that_adds_nothing_to_a_promise_or_to_a_ratio_on_this_model_is_told() -> None:
    """Whichever of the two noises is the larger one, and whoever asks for it."""
    when = "when = { sensitivity = 0.5 }\n"
    promised = HEAD + SITE + STOPS + '[[rule]]\nid = "all"\n' + RULE + when + "noise_ratio = 10\n"
    narrow = HEAD + BASE + STOPS + '[[rule]]\nid = "part"\nmatch = ["body.**"]\n'
    narrow += "noise_multiplier = 2\n" + RULE + 'match = ["body.**"]\n' + when + "noise_ratio = 5\n"
    mirror = HEAD + BASE.replace("noise_ratio = 1", "noise_ratio = 50") + STOPS + RULE + when
    for text in (promised, narrow, mirror + "noise_multiplier = 0.3\n"):
        said = [one for one in findings(text, MODEL) if "adds nothing on this model" in one[2]]
        assert [one[1] for one in said] == ["r"]
    assert "adds nothing" not in str(findings(mirror + "noise_multiplier = 6\n", MODEL))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + STOPS, ("error", None, "releases nothing: only a rule without")),
        (
            HEAD + BASE + STOPS + RULE + 'action = "withhold"\n',
            ("error", "r", "releases nothing: this rule applies always"),
        ),
        (
            HEAD + BASE + STOPS + RULE + 'action = "withhold-update"\n',
            ("error", "r", "releases nothing: this rule applies always"),
        ),
        (
            "expires = 2026-11-19\n" + HEAD + BASE + STOPS,
            ("error", None, "expired on 2026-11-19"),
        ),
        (
            "expires = 2026-12-01\n" + HEAD + BASE + STOPS,
            ("warning", None, "expires on 2026-12-01, in 11 days"),
        ),
        (HEAD + STOPS + '[[rule]]\nid = "b"\n', ("warning", None, "no bound on the update's size")),
        (HEAD + STOPS + RULE + "max_norm = 1\n", ("warning", None, "no noise on an ordinary")),
        (HEAD.replace("min_patients = 8\n", "") + BASE + STOPS, ("warning", None, "limits.min_pa")),
        (HEAD + BASE, ("warning", None, "no rule stops a crafted global model")),
        (HEAD + BASE, ("warning", None, "no rule stops a broken global model")),
        (HEAD + BASE + STOPS, ("note", None, "no formal guarantee")),
        (
            HEAD + SITE.replace("= 8", "= 20") + STOPS + '[[rule]]\nid = "b"\n',
            ("warning", None, "privacy.epsilon = 20 promises next to nothing"),
        ),
        (
            HEAD + SITE + STOPS + RULE + "[[rule]]\nid='s'\nwhen={sensitivity=0.5}\nkeep=0.5\n",
            ("note", "s", 'under unit "site" the sensitivity score sees the noise'),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { budget_spent = 0.8 }\nkeep = 0.5\n",
            ("error", "r", "can never apply: without a [privacy] table"),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { sensitivity = 1 }\nkeep = 0.5\n",
            ("warning", "r", "sensitivity = 1.0 is reached by a score of exactly 1 alone"),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { sensitivity = 0 }\nkeep = 0.5\n",
            ("warning", "r", "always applies"),
        ),
        (
            HEAD + BASE + STOPS + RULE + 'when = { sensitivity = 0.5 }\naction = "refuse-round"\n',
            ("warning", "r", "asks for what is known only after training"),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { sensitivity = 0.5 }\nnoise_ratio = 0\n",
            ("warning", "r", "noise_ratio = 0 asks for nothing"),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { sensitivity = 0.5 }\nnoise_multiplier = 0\n",
            ("warning", "r", "noise_multiplier = 0 asks for nothing"),
        ),
        (
            HEAD + SITE + STOPS + RULE + "noise_multiplier = 1\n",
            (
                "warning",
                "r",
                "noise_multiplier = 1 adds nothing: the promise puts noise of 1 times",
            ),
        ),
        (
            HEAD + SITE + STOPS + RULE + "noise_ratio = 0.5\n",
            ("warning", "r", "noise_ratio = 0.5 adds nothing: the promise"),
        ),
        (
            HEAD + EACH + STOPS + RULE + "when = { sensitivity = 0.5 }\nnoise_multiplier = 1\n",
            ("warning", "r", 'changes nothing: whenever it applies, rule "base"'),
        ),
        (
            HEAD + EACH + STOPS + RULE + "when = { sensitivity = 0.5 }\nnoise_ratio = 1\n",
            ("warning", "r", 'changes nothing: whenever it applies, rule "base"'),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { sensitivity = 0.5 }\nmax_norm = 2\n",
            ("warning", "r", 'changes nothing: whenever it applies, rule "base"'),
        ),
        (
            HEAD + BASE + STOPS + RULE + "when = { suspicion = 0.6 }\nkeep = 0.1\n",
            ("warning", "r", 'changes nothing: whenever it applies, rule "crafted"'),
        ),
    ],
)
def test_what_is_found(text: str, expected: tuple[str, str | None, str]) -> None:
    """Each hole has its sentence, and the rule that it is about."""
    severity, rule, start = expected
    assert any(
        (one[0], one[1]) == (severity, rule) and one[2].startswith(start) for one in findings(text)
    ), findings(text)


@pytest.mark.parametrize(
    "rule",
    [
        "when = { sensitivity = 0.5 }\nmax_norm = 0.5\n",
        "when = { sensitivity = 0.5 }\nnoise_ratio = 2\n",
        "when = { sensitivity = 0.5 }\nnoise_multiplier = 0.1\n",  # on many values it is more
        "when = { sensitivity = 0.5 }\nmax_norm = 2\nkeep = 0.5\n",
        "when = { suspicion = 0.4 }\nkeep = 0.5\n",
        'match = ["head.**"]\naction = "withhold"\n',
    ],
)
def test_a_rule_that_does_something_is_not_called_dead(rule: str) -> None:
    assert not [one for one in findings(HEAD + BASE + STOPS + RULE + rule) if one[1] == "r"]


def test_a_bound_on_a_part_does_not_outdo_a_bound_on_the_whole() -> None:
    text = (
        HEAD
        + BASE
        + STOPS
        + '[[rule]]\nid = "part"\nmatch = ["head.**"]\nmax_norm = 0.1\n'
        + RULE
        + "when = { sensitivity = 0.5 }\nmax_norm = 0.5\n"
    )
    assert not [one for one in findings(text) if one[1] == "r"]


def test_a_refusal_is_not_outdone_by_a_withheld_update() -> None:
    text = HEAD + BASE + '[[rule]]\nid = "w"\nwhen = { suspicion = 0.1 }\n'
    text += 'action = "withhold-update"\n' + STOPS
    assert not [one for one in findings(text) if one[1] == "crafted"]


def test_a_glob_that_matches_nothing_of_the_model_is_an_error() -> None:
    text = HEAD + BASE + STOPS + RULE + 'match = ["haed.**", "head.*"]\naction = "withhold"\n'
    found = findings(text, MODEL)
    assert found[0] == ("error", "r", "haed.** matches no parameter of this model; mistyped?")
    assert found[-1][2] == "1 of 2 parameters never leave: head.weight"
    assert len([one for one in found if one[0] == "error"]) == 1


def test_a_policy_that_lets_nothing_of_the_model_out_is_an_error() -> None:
    text = HEAD + STOPS + RULE + 'match = ["other.*"]\n'
    assert any(one[2].startswith("releases nothing of this model") for one in findings(text, MODEL))


AUTO = (
    '[[rule]]\nid = "base"\nmax_norm = "auto"\nmax_norm_floor = 0.1\nmax_norm_ceiling = 10\n'
    "noise_ratio = 1\n"
)


def warned(text: str) -> list[str]:
    return [message for severity, rule, message in findings(text) if severity == "warning"]


def test_a_bound_that_follows_is_a_bound() -> None:
    assert warned(HEAD + AUTO + STOPS) == []
    assert warned(HEAD + AUTO.replace("ratio", "multiplier") + STOPS) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("ceiling = 10", "ceiling = 101", "more than 1000 times max_norm_floor: the first round"),
        ("ceiling = 10", "ceiling = 0.1", "cannot move: floor and ceiling are equal"),
        ("noise_ratio = 1\n", "", "raises the bound to its ceiling and reads that much more"),
        ("noise_ratio = 1\n", "noise_ratio = 0\n", "reads that much more; give a noise_ratio"),
    ],
)
def test_limits_that_a_server_or_a_first_round_would_make_much_of(
    right: str, wrong: str, said: str
) -> None:
    assert any(said in one for one in warned(HEAD + AUTO.replace(right, wrong) + STOPS))


def test_limits_a_thousand_apart_are_not_too_far_apart() -> None:
    assert warned(HEAD + AUTO.replace("ceiling = 10", "ceiling = 100") + STOPS) == []


@pytest.mark.parametrize(
    ("rule", "dead"),
    [
        ("max_norm = 10", True),  # the other is at most 10, whatever it follows
        ("max_norm = 9", False),
        ('max_norm = "auto"\nmax_norm_floor = 10\nmax_norm_ceiling = 20', True),
        ('max_norm = "auto"\nmax_norm_floor = 9\nmax_norm_ceiling = 20', False),
        ('max_norm = "auto"\nmax_norm_floor = 0.1\nmax_norm_ceiling = 10', False),
    ],
)
def test_a_rule_is_outdone_by_a_bound_that_follows_only_where_it_always_is(
    rule: str,
    dead: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    text = HEAD + AUTO + STOPS + RULE + "when = { suspicion = 0.2 }\n" + rule + "\n"
    assert any("changes nothing" in one for one in warned(text)) is dead


def test_a_bound_that_follows_is_outdone_by_a_number_at_its_floor() -> None:
    for number, dead in ((0.1, True), (0.2, False)):
        base = f'[[rule]]\nid = "base"\nmax_norm = {number}\nnoise_ratio = 1\n'
        auto = AUTO.replace("base", "follows").replace("noise_ratio = 1\n", "")
        auto = auto.replace('"follows"\n', '"follows"\nwhen = { suspicion = 0.2 }\n')
        found = warned(HEAD + base + STOPS + auto)
        assert any("changes nothing" in one for one in found) is dead
