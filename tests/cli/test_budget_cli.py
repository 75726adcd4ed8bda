"""`sentinel budget` on ledgers that were really charged."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from sentinel import Guard
from sentinel.cli.main import app
from sentinel.privacy import (
    Charge,
    DpSgdEvent,
    GaussianEvent,
    Head,
    Promise,
    PromisedEvent,
    UnboundedEvent,
    total,
)
from sentinel.privacy.forecast import releases_left
from sentinel.state import StateFolder
from sentinel.terms import GENESIS, Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

POLICY = """
schema = 1
name = "{unit}"
dataset = "d"
[privacy]
unit = "{unit}"
patients = 12000
epsilon = 4.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = {noise}
[[rule]]
id = "baseline"
"""
NOTHING_PROMISED = """
schema = 1
name = "nothing"
dataset = "d"
[[rule]]
id = "baseline"
max_norm = 1.0
"""
TRAINING = DpSgdEvent(
    unit="patient",
    adjacency="add-or-remove",
    noise_multiplier=1.2,
    sampling="poisson",
    sampling_rate=0.02,
    steps=60,
    log_ratio=1e-7,
    mass=1e-25,
)
RELEASE = GaussianEvent(unit="site", adjacency="replace", noise_multiplier=30.0)
PATIENT = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 4.0, 1e-5)
SITE = Promise(Unit.SITE, Adjacency.REPLACE, 4.0, 1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "patient": POLICY.format(unit="patient", noise=1.2),
        "site": POLICY.format(unit="site", noise=30.0),
        "nothing": NOTHING_PROMISED,
    }.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        path.chmod(0o600)
    StateFolder(tmp_path / "state")
    return tmp_path


@pytest.fixture
def charge(folder: Path) -> Callable[..., None]:
    def write(event: Any, times: int = 1, policy: str = "a", dataset: str = "d") -> None:
        ledger = StateFolder(folder / "state").ledger
        for _ in range(times):
            number = ledger.head().seq
            key = f"{number:064x}"[::-1]
            at = 1_700_000_000 + 86_400 * number
            ledger.charge(
                Charge(at, dataset, policy * 64, key, event, Head(0, GENESIS)), promise=None
            )

    return write


@pytest.fixture
def run(folder: Path) -> Callable[..., Result]:
    def invoke(*words: str) -> Result:
        named = [str(folder / word) if word.endswith(".toml") else word for word in words]
        return CliRunner().invoke(app, ["budget", *named, "--state-dir", str(folder / "state")])

    return invoke


def counted(*events: tuple[PromisedEvent | UnboundedEvent, int]) -> dict[Any, int]:
    return dict(events)


def test_show_says_what_is_spent_and_left_by_the_smaller_accountant(charge, run) -> None:
    charge(TRAINING, 5)
    charge(RELEASE, 2, policy="b")
    charge(UnboundedEvent(), dataset="other")
    promise = json.loads(run("show", "--policy", "patient.toml", "--json").output)["promise"]
    spent = total(counted((TRAINING, 5), (RELEASE, 2)), PATIENT, tight=True)
    assert promise["epsilon_spent"] == spent.epsilon == min(promise["accountants"].values())
    assert promise["accountant"] == spent.accountant
    assert promise["epsilon_left"] == 4.0 - spent.epsilon
    assert len(promise["accountants"]) == 2
    assert (promise["unit"], promise["adjacency"]) == ("patient", "add-or-remove")
    assert (promise["delta"], promise["void"], promise["slack_unknown"]) == (1e-5, False, 2)


def test_show_names_both_adjacencies_rightly(charge, run) -> None:
    charge(RELEASE, 3)
    promise = json.loads(run("show", "--policy", "site.toml", "--json").output)["promise"]
    other = promise["other_adjacency"]
    assert (promise["adjacency"], other["adjacency"]) == ("replace", "add-or-remove")
    assert promise["epsilon_spent"] == total({RELEASE: 3}, SITE).epsilon
    under = Promise(Unit.SITE, Adjacency.ADD_OR_REMOVE, 4.0, 1e-5)
    assert other["epsilon_spent"] == total({RELEASE: 3}, under).epsilon


def test_show_lists_policies_and_the_last_rounds(charge, run) -> None:
    charge(TRAINING, 5)
    charge(RELEASE, 2, policy="b")
    words = ("show", "--policy", "patient.toml", "--json", "--rounds", "3")
    promise = json.loads(run(*words).output)["promise"]
    by_policy = promise["by_policy"]
    assert {name[0]: entry["charges"] for name, entry in by_policy.items()} == {"a": 5, "b": 2}
    alone = total({RELEASE: 2}, PATIENT, tight=True)
    assert by_policy["b" * 64]["epsilon_alone"] == alone.epsilon
    assert by_policy["b" * 64]["accountant"] == alone.accountant
    rounds = promise["by_round"]
    assert [entry["event"]["kind"] for entry in rounds] == ["dp-sgd", "gaussian", "gaussian"]
    last = total(counted((TRAINING, 5), (RELEASE, 2)), PATIENT)
    assert rounds[-1]["epsilon_after"] == last.epsilon == promise["curve"][-1]["epsilon"]
    assert promise["curve_accountant"] == last.accountant
    course = [point["epsilon"] for point in promise["curve"]]
    assert course == sorted(course)
    assert [point["charges"] for point in promise["curve"]] == [1, 2, 3, 4, 5, 6, 7]


def test_the_screen_says_all_that_an_epsilon_needs_beside_it(charge, run) -> None:
    charge(TRAINING, 5)
    charge(RELEASE)
    screen = " ".join(run("show", "--policy", "patient.toml").output.split())
    spent = total(counted((TRAINING, 5), (RELEASE, 1)), PATIENT, tight=True).epsilon
    for part in (
        f"epsilon {spent:.4g} of 4 is spent, {4 - spent:.4g} left",
        (
            "delta 1e-05, unit patient, adjacency add-or-remove, claimed (level L0), privacy loss "
            "distribution (PLD)"
        ),
        (
            "By policy, each as if there were no others (delta 1e-05, unit patient, adjacency "
            "add-or-remove, claimed (level L0)):"
        ),
        (
            "By round, the total after each (delta 1e-05, unit patient, adjacency add-or-remove, "
            "claimed (level L0), Renyi differential privacy (RDP)):"
        ),
        "Renyi differential privacy (RDP), says",
        "adjacency replace",
        "Charges that do not say how far their noise was from ideal noise: 1.",
        "dp-sgd patient",
        "gaussian site",
        f"{spent / 4:.0%}",
    ):
        assert part in screen, part


def test_show_of_a_long_ledger_keeps_the_curve_short(charge, run) -> None:
    charge(RELEASE, 90)
    found = json.loads(run("show", "--policy", "site.toml", "--json").output)["promise"]
    assert len(found["curve"]) == 40
    assert (found["curve"][0]["charges"], found["curve"][-1]["charges"]) == (1, 90)
    assert len(found["by_round"]) == 10


def test_show_without_a_policy_with_one_that_promises_nothing_and_before_any_charge(run) -> None:
    assert "Nothing was charged yet." in run("show").output
    assert "name a policy that has one: --policy FILE" in run("show").output
    screen = " ".join(run("show", "--policy", "nothing.toml").output.split())
    assert "promises nothing formal (it has no [privacy] table)" in screen
    assert "epsilon 0 of 4 is spent" in run("show", "--policy", "site.toml").output


def test_show_says_void_where_something_was_released_outside_the_promise(charge, run) -> None:
    charge(RELEASE)
    charge(UnboundedEvent())
    assert json.loads(run("show", "--policy", "site.toml", "--json").output)["promise"]["void"]
    for command in ("show", "forecast"):
        screen = " ".join(run(command, "--policy", "site.toml").output.split())
        assert "The lifetime promise is void" in screen


@pytest.mark.parametrize("outside", [UnboundedEvent(), TRAINING])
def test_a_policy_that_released_outside_the_promise_is_void_and_no_epsilon(
    charge, run, outside
) -> None:
    """Without a promise, or under a finer unit: nothing bounds what the site gave away."""
    charge(RELEASE)
    charge(outside, policy="b")
    answer = run("show", "--policy", "site.toml", "--json")
    assert "Infinity" not in answer.output
    by_policy = json.loads(answer.output)["promise"]["by_policy"]
    raw, sound = by_policy["b" * 64], by_policy["a" * 64]
    assert (raw["void"], raw["epsilon_alone"]) == (True, None)
    assert (sound["void"], sound["epsilon_alone"]) == (False, total({RELEASE: 1}, SITE).epsilon)
    for entry in (raw, sound):
        assert (entry["unit"], entry["adjacency"], entry["delta"]) == ("site", "replace", 1e-5)
    lines = run("show", "--policy", "site.toml").output.splitlines()
    (line,) = (line for line in lines if line.split()[:1] == ["b" * 8])
    assert line.split()[:3] == ["b" * 8, "1", "void"]
    rounds = json.loads(answer.output)["promise"]["by_round"]
    assert [entry["void"] for entry in rounds] == [False, True]
    assert ["void" in line for line in lines if "gaussian site" in line] == [False]


def test_show_without_a_policy_says_what_every_unit_and_adjacency_spent(charge, run) -> None:
    charge(TRAINING, 5)
    charge(RELEASE, 2, policy="b")
    charge(UnboundedEvent(), dataset="raw")
    found = json.loads(run("show", "--json").output)["datasets"]
    events = counted((TRAINING, 5), (RELEASE, 2))
    patient, site = found["d"]["spent"]
    assert patient == {
        "unit": "patient",
        "adjacency": "add-or-remove",
        "delta": 1e-6,
        "epsilon_spent": total(events, replace(PATIENT, delta=1e-6), tight=True).epsilon,
        "accountant": "privacy loss distribution (PLD)",
        "void": False,
        "assurance": "claimed",
        "level": "L0",
    }
    assert (site["unit"], site["adjacency"], site["assurance"]) == ("site", "replace", None)
    assert site["epsilon_spent"] == total({RELEASE: 2}, replace(SITE, delta=1e-6)).epsilon
    assert site["void"]  # the trainings say nothing about the site
    assert found["raw"]["spent"] == []
    screen = " ".join(run("show").output.split())
    assert (
        f"Spent on d: epsilon {patient['epsilon_spent']:.4g} (delta 1e-06, unit patient, adjacency "
        "add-or-remove, claimed (level L0), privacy loss distribution (PLD))."
    ) in screen
    assert "exact Gaussian composition); void, something else was released outside it." in screen
    assert "Spent on raw: nothing was promised to anybody" in screen
    assert "--policy FILE" in screen


def test_show_without_a_policy_adds_up_at_another_delta(charge, run) -> None:
    charge(RELEASE, 3)
    (site,) = json.loads(run("show", "--delta", "1e-4", "--json").output)["datasets"]["d"]["spent"]
    assert site["delta"] == 1e-4
    assert site["epsilon_spent"] == total({RELEASE: 3}, replace(SITE, delta=1e-4)).epsilon
    for words in (("--delta", "0"), ("--delta", "1"), ("--delta", "nan")):
        assert run("show", *words).exit_code == 2
    assert run("show", "--policy", "site.toml", "--delta", "1e-4").exit_code == 2


def test_an_epsilon_per_patient_is_told_as_claimed_and_one_per_site_is_not(charge, run) -> None:
    """At level L0 the noise of private training is the training process's own claim."""
    charge(TRAINING)
    charge(RELEASE)
    for command in (("show",), ("forecast",)):
        for unit, assurance in (("patient", "claimed"), ("site", None)):
            words = (*command, "--policy", f"{unit}.toml")
            found = json.loads(run(*words, "--json").output)["promise"]
            for told in (found, found["other_adjacency"]):
                assert (told["assurance"], told["level"]) == (assurance, "L0")
            screen = run(*words).output
            assert ("claimed (level L0)" in " ".join(screen.split())) is (assurance is not None)


def test_show_of_an_infinite_epsilon_is_still_json(charge, run) -> None:
    charge(RELEASE.model_copy(update={"noise_multiplier": 1e-5}))
    answer = run("show", "--policy", "site.toml", "--json")
    assert "Infinity" not in answer.output
    assert json.loads(answer.output)["promise"]["epsilon_spent"] is None
    assert "epsilon inf of 4 is spent" in run("show", "--policy", "site.toml").output


def test_a_dataset_that_is_not_the_policys_is_misuse(charge, run) -> None:
    charge(RELEASE)
    assert run("show", "--dataset", "d", "--policy", "site.toml").exit_code == 0
    assert json.loads(run("show", "--dataset", "e", "--json").output)["datasets"] == {}
    assert run("show", "--dataset", "e", "--policy", "site.toml").exit_code == 2


def test_rounds_have_the_number_that_the_federation_gave_them(run, folder) -> None:
    guard = Guard(folder / "site.toml", folder / "state")
    before = {"w": torch.zeros(6)}
    for number in (7, 8):
        with guard.round(number, before, patients=12000) as opened:
            pass
        opened.release({"w": torch.ones(6)})
    told = json.loads(run("show", "--policy", "site.toml", "--json").output)
    rounds = told["promise"]["by_round"]
    assert [entry["number"] for entry in rounds] == [7, 8]
    shown = run("show", "--policy", "site.toml").output
    assert all(entry["round"][:8] not in shown for entry in rounds)


def test_forecast_says_how_many_rounds_the_ledger_will_allow(charge, run, folder) -> None:
    charge(RELEASE, 2)
    found = json.loads(run("forecast", "--policy", "site.toml", "--json").output)["forecast"]
    left = found["rounds_left"]
    ledger = StateFolder(folder / "state").ledger
    for number in range(left):
        key = Charge(0, "d", "p", f"{number}", RELEASE, Head(0, GENESIS))
        ledger.charge(key, SITE)
    assert left > 10
    assert json.loads(run("forecast", "--policy", "site.toml", "--json").output)["forecast"] == {
        **found,
        "rounds_left": 0,
    }
    assert "No round is left at this noise." in run("forecast", "--policy", "site.toml").output


def test_forecast_names_the_noise_that_pays_for_so_many_rounds(charge, run) -> None:
    charge(RELEASE, 2)
    words = ("forecast", "--policy", "site.toml", "--rounds", "500")
    needed = json.loads(run(*words, "--json").output)["forecast"]["noise_multiplier_needed"]
    planned = RELEASE.model_copy(update={"noise_multiplier": needed})
    assert total(counted((RELEASE, 2), (planned, 500)), SITE).epsilon <= 4.0
    assert total(counted((RELEASE, 2), (planned, 505)), SITE).epsilon > 4.0
    assert f"Noise multiplier {needed:g} pays for 500 more rounds." in run(*words).output


def test_forecast_of_training_takes_the_last_rounds_steps_or_the_options(charge, run) -> None:
    answer = run("forecast", "--policy", "patient.toml")
    assert answer.exit_code == 2
    assert "--steps and --sampling-rate" in answer.output
    words = ("forecast", "--policy", "patient.toml", "--json")
    given = run(*words, "--steps", "60", "--sampling-rate", "0.02")
    fresh = json.loads(given.output)["forecast"]
    charge(TRAINING, 2)
    later = json.loads(run(*words).output)["forecast"]
    assert (later["event"]["steps"], later["event"]["sampling_rate"]) == (60, 0.02)
    assert fresh["rounds_left"] == later["rounds_left"] + 2
    longer = json.loads(run(*words, "--steps", "240").output)["forecast"]
    assert longer["rounds_left"] < later["rounds_left"] / 2


@pytest.mark.parametrize("state", ["absent", "empty", "without-charges"])
def test_forecast_plans_before_anything_was_charged(folder: Path, state: str) -> None:
    """The policy says the rate, --steps the steps; nothing is written to make the plan."""
    if state == "empty":
        (folder / state).mkdir()
    if state == "without-charges":
        StateFolder(folder / state)
    path = folder / "patient.toml"
    path.write_text(path.read_text().replace("12000", "12000\nbatch = 240"))
    words = ["budget", "forecast", "--policy", str(path), "--steps", "60"]
    words += ["--state-dir", str(folder / state)]
    answer = CliRunner().invoke(app, [*words, "--json"])
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.output)
    planned = TRAINING.model_copy(update={"log_ratio": 0.0, "mass": 0.0})
    assert report["promise"]["epsilon_spent"] == 0
    assert report["forecast"]["event"] == planned.model_dump(mode="json")
    assert report["forecast"]["rounds_left"] == releases_left({}, planned, PATIENT) > 10
    assert report["forecast"]["ledger_found"] is (state == "without-charges")
    screen = " ".join(CliRunner().invoke(app, words).output.split())
    assert ("There is no ledger yet" in screen) is (state != "without-charges")
    assert (folder / state).exists() is (state != "absent")
    assert state != "empty" or not any((folder / state).iterdir())


@pytest.mark.parametrize("kept", ["audit", "releases", "history"])
def test_forecast_takes_no_lost_ledger_for_an_empty_one(folder: Path, kept: str) -> None:
    (folder / "lost" / kept).mkdir(parents=True)
    words = ["budget", "forecast", "--policy", str(folder / "site.toml")]
    answer = CliRunner().invoke(app, [*words, "--state-dir", str(folder / "lost")])
    assert answer.exit_code == (1 if kept == "audit" else 2)
    assert "left at this noise" not in answer.output


def test_forecast_without_a_promise_or_with_a_spent_budget_answers_clearly(charge, run) -> None:
    nothing = run("forecast", "--policy", "nothing.toml")
    assert nothing.exit_code == 0
    assert "promises nothing formal" in " ".join(nothing.output.split())
    assert json.loads(run("forecast", "--policy", "nothing.toml", "--json").output) == {
        "promise": None,
        "forecast": None,
    }
    charge(RELEASE.model_copy(update={"noise_multiplier": 1.0}))
    spent = run("forecast", "--policy", "site.toml", "--rounds", "3")
    assert spent.exit_code == 0
    assert "No round is left" in spent.output
    assert "No noise pays for 3 more rounds: the budget is spent." in spent.output


def test_without_state_the_folder_is_named(folder: Path) -> None:
    command = ["budget", "show", "--state-dir", str(folder / "elsewhere")]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 2
    assert "--state-dir" in answer.output


@pytest.mark.parametrize(("charset", "cell"), [("ascii", "#"), ("utf-8", "█")])
def test_bars_are_plain_where_the_terminal_is(charge, folder, charset: str, cell: str) -> None:
    """Blocks need UTF-8; elsewhere the same bars are made of ASCII."""
    charge(RELEASE, 5)
    command = ["budget", "show", "--policy", str(folder / "site.toml")]
    runner = CliRunner(charset=charset)
    answer = runner.invoke(app, [*command, "--state-dir", str(folder / "state")])
    assert answer.exit_code == 0
    assert cell in answer.output
