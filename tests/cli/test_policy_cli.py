"""`sentinel policy`, as a person and as a script use it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from sentinel.cli import policy as cli
from sentinel.cli import policy_screen
from sentinel.policy import load_policy
from sentinel.policy.json_schema import json_schema
from sentinel.privacy import DpSgdEvent, GaussianEvent, Promise, total, weigh
from sentinel.terms import Adjacency, Unit

if TYPE_CHECKING:
    from pathlib import Path

BAD = 'schema = 1\nname = "bad"\n[[rule]]\nid = "r"\nkeep = 2\n'
EMPTY = 'schema = 1\nname = "empty"\n'


def run(*arguments: str | Path) -> tuple[int, str]:
    """Return exit code and everything printed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def run_json(*arguments: str | Path) -> tuple[int, Any]:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a starter policy and its tests."""
    assert run("new", tmp_path / "ours.toml")[0] == 0
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = torch.nn.Sequential(torch.nn.Linear(30, 10), torch.nn.BatchNorm1d(10))
    path = tmp_path / "model.safetensors"
    save_file(net.state_dict(), path)
    return path


def test_a_new_policy_passes_check_and_test_and_can_be_used(folder: Path) -> None:
    assert run("check", folder)[0] == 0
    assert run("test", folder)[0] == 0
    assert run("test", folder / "ours.test.toml")[0] == 0
    assert load_policy(folder / "ours.toml").policy.name == "ours"


def test_new_overwrites_nothing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, text = run("new", folder / "ours.toml")
    assert (code, "exists already" in text) == (2, True)
    (folder / "ours.toml").unlink()
    assert run("new", folder / "ours.toml")[0] == 2  # its test file is still there
    assert not (folder / "ours.toml").exists()
    assert all(before[path] == path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("name", ["Ours.toml", "ours.txt", "our site.toml", "none/ours.toml"])
def test_new_refuses_a_name_or_a_place_that_cannot_be(tmp_path: Path, name: str) -> None:
    assert run("new", tmp_path / name)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_check_tells_every_file_of_a_folder(folder: Path) -> None:
    (folder / "bad.toml").write_text(BAD, encoding="utf-8")
    (folder / "empty.toml").write_text(EMPTY, encoding="utf-8")
    code, text = run("check", folder)
    assert code == 1
    assert f"{folder}/ours.toml: ok" in text
    assert f"{folder}/bad.toml: FAILED" in text
    assert 'rule[0].keep (rule "r"): expected a number of 1.0 or less; got 2' in text
    assert "releases nothing: only a rule without `when` lets parameters out" in text


def test_check_in_json(folder: Path) -> None:
    (folder / "bad.toml").write_text(BAD, encoding="utf-8")
    code, answer = run_json("check", folder)
    assert (code, answer["ok"]) == (1, False)
    bad, ours = answer["files"]
    assert (bad["ok"], bad["findings"][0]["severity"]) == (False, "error")
    assert (ours["ok"], ours["name"]) == (True, "ours")
    assert ours["digest"] == load_policy(folder / "ours.toml").digest


def test_check_against_a_model_names_globs_that_match_nothing(folder: Path, model: Path) -> None:
    ours = folder / "ours.toml"
    assert run("check", ours, "--model", model)[0] == 0
    text = ours.read_text(encoding="utf-8") + '[[rule]]\nid = "head"\nmatch = ["haed.**"]\n'
    ours.write_text(text + 'action = "withhold"\n', encoding="utf-8")
    assert run("check", ours)[0] == 0
    code, text = run("check", ours, "--model", model)
    assert code == 1
    assert 'error: rule "head": haed.** matches no parameter of this model' in text


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_check_fails_for_a_file_that_others_may_write_to(folder: Path, mode: int) -> None:
    ours = folder / "ours.toml"
    ours.chmod(mode)
    code, text = run("check", folder)
    assert code == 1
    assert f"{ours}: FAILED\n  error: would be refused where it is used: others than" in text
    assert run_json("check", ours)[1]["files"][0]["ok"] is False


def test_check_fails_for_a_link_out_of_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "ours.toml").symlink_to(folder / "ours.toml")
    code, text = run("check", tmp_path / "links")
    assert code == 1
    assert "error: would be refused where it is used: is a link that leaves its folder" in text


def test_check_only_warns_of_a_file_of_somebody_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who checks it, as in a change pipeline, need not be who uses it."""
    owner = (folder / "ours.toml").stat().st_uid
    if owner == 0:
        os.chown(folder / "ours.toml", 4711, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4712)
    code, text = run("check", folder)
    assert code == 0
    assert "warning: would be refused where it is used: belongs to another user" in text


SITE = """\
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 8
delta = 1e-6
clip_norm = 1
noise_multiplier = {}
[[rule]]
id = "all"
"""


@pytest.mark.parametrize("noise_multiplier", [1, 2, 4.5, 16, 100])
def test_check_counts_the_releases_that_the_ledger_will_allow(
    tmp_path: Path, noise_multiplier: float
) -> None:
    """The figure is the last count whose total stays in the budget; one more is over it."""
    path = tmp_path / "site.toml"
    path.write_text(SITE.format(noise_multiplier), encoding="utf-8")
    code, text = run("check", path)
    promise = Promise(Unit.SITE, Adjacency.REPLACE, 8.0, 1e-6)
    event = GaussianEvent(
        unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=noise_multiplier
    )
    counted = re.search(r"pays for ([\d,]+) release", text)
    count = 0 if counted is None else int(counted[1].replace(",", ""))
    assert total({event: count + 1}, promise).epsilon > 8
    assert count == 0 or total({event: count}, promise).epsilon <= 8
    assert code == (1 if count == 0 else 0)
    assert ("error: releases nothing: one release alone" in text) is (count == 0)
    assert (count == 0) is (noise_multiplier == 1)


def test_explain_says_for_how_many_releases_a_promise_lasts(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE.format(16), encoding="utf-8")
    assert "pays for 150 releases, then nothing leaves" in run("explain", path)[1]


def test_check_stops_counting_releases_at_a_million(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE.format("1e6"), encoding="utf-8")
    code, text = run("check", path)
    assert (code, "pays for 1,000,000 or more releases" in text) == (0, True)


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_check_fails_for_a_promise_per_patient_without_a_batch(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "private.toml"
    text = SITE.format(16).replace('"site"\nepsilon', f'"{unit}"\npatients = 100\nepsilon')
    path.write_text(text, encoding="utf-8")
    code, told = run("check", path)
    assert code == 1
    assert "error: releases nothing: privacy.batch is missing" in told
    path.write_text(text.replace("patients = 100", "patients = 100\nbatch = 5"), encoding="utf-8")
    code, told = run("check", path)
    assert (code, "guard.private" in told) == (0, True)


PRIVATE = (
    SITE.format(1.2)
    .replace('"site"\nepsilon = 8', '"patient"\npatients = 300\nbatch = 32\nepsilon = {}')
    .replace("1e-6", "1e-4")
)


def test_check_counts_the_private_steps_that_the_ledger_will_allow(tmp_path: Path) -> None:
    """The figure is the last count that the ledger charges; and so many passes it is."""
    path = tmp_path / "private.toml"
    path.write_text(PRIVATE.format(4), encoding="utf-8")
    code, text = run("check", path)
    counted = re.search(r"pays for ([\d,]+) steps .* which is ([\d.]+) passes over the 300", text)
    assert counted is not None, text
    count = int(counted[1].replace(",", ""))
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 4.0, 1e-4)
    assert (
        weigh({steps(count): 1}, promise).epsilon
        <= 4
        < weigh({steps(count + 1): 1}, promise).epsilon
    )
    assert float(counted[2]) == pytest.approx(count * 32 / 300, rel=5e-2)
    assert "unit patient, adjacency add-or-remove; by " in text
    assert code == 0


def test_check_fails_where_the_budget_pays_for_no_private_step(tmp_path: Path) -> None:
    path = tmp_path / "private.toml"
    path.write_text(PRIVATE.format(0.01), encoding="utf-8")
    code, text = run("check", path)
    promise = Promise(Unit.PATIENT, Adjacency.ADD_OR_REMOVE, 0.01, 1e-4)
    first = weigh({steps(1): 1}, promise)
    assert code == 1
    assert (
        f"error: releases nothing: the first step of private training alone spends epsilon "
        f"{first.epsilon:.3g} by {first.accountant}, more than epsilon 0.01 at delta 0.0001"
    ) in text


def steps(count: int) -> DpSgdEvent:
    return DpSgdEvent(
        unit=Unit.PATIENT,
        adjacency=Adjacency.ADD_OR_REMOVE,
        noise_multiplier=1.2,
        sampling="poisson",
        sampling_rate=32 / 300,
        steps=count,
        log_ratio=0.0,
        mass=0.0,
    )


def test_explain_says_that_the_noise_of_private_training_is_there_already(
    tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "private.toml"
    path.write_text(PRIVATE.format(4), encoding="utf-8")
    told = run("explain", path, "--model", model)[1]
    assert "The noise of the promise is in the update already" in told
    assert "no noise is added" not in told
    assert "No bound on the update's norm" not in told


def test_check_without_a_promise_does_not_wait_for_the_accountant(folder: Path) -> None:
    """Only a promise needs dp-accounting, which takes a second to import."""
    code = (
        "import sys; from typer.testing import CliRunner; from sentinel.cli.policy import app; "
        "done = CliRunner().invoke(app, ['check', sys.argv[1]]); "
        "sys.exit(done.exit_code or 'dp_accounting' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)  # noqa: S603 - fixed code


def test_test_fails_with_what_came_and_with_what_is_not_covered(folder: Path) -> None:
    tests = folder / "ours.test.toml"
    text = tests.read_text(encoding="utf-8").replace("keep = 0.5", "keep = 0.6")
    head, _, rest = text.partition('[[case]]\nname = "a crafted')
    tests.write_text(head + rest[rest.index("[[case]]") :], encoding="utf-8")
    code, text = run("test", folder)
    assert code == 1
    assert "FAILED  a leaky update gets more noise and is thinned out" in text
    assert "keep of weight: expected 0.6, got 0.5" in text
    assert 'error: no case in which rule "crafted-model" applies' in text
    code, answer = run_json("test", folder)
    assert (code, answer["ok"], len(answer["files"][0]["cases"])) == (1, False, 4)


def test_a_policy_without_tests_fails_the_test(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text(EMPTY, encoding="utf-8")
    code, text = run("test", tmp_path)
    assert code == 1
    assert "has no test file; write empty.test.toml beside it" in text


def test_the_shipped_policies_pass_by_name() -> None:
    names = [row["name"] for row in run_json("list")[1]["policies"]]
    assert names == ["baseline", "chest-xray", "genomics", "tabular-ehr"]
    assert run("check", *names)[0] == 0
    assert run("test", *names)[0] == 0
    assert "chest-xray | Chest radiographs" in run("list")[1]


def test_explain_reads_like_prose() -> None:
    code, text = run("explain", "tabular-ehr", "--sensitivity", "0.6")
    assert code == 0
    for sentence in (
        "It promises nothing formal: the protection is measured, not proved",
        "An update with fewer than 16 patients behind it is withheld.",
        "When the suspicion about the global model is 0.5 or more: the round is refused.",
        "With sensitivity score 0.6, suspicion 0, 0 % of the budget spent and a healthy global",
        "every parameter | - | released, max_norm 0.04, noise_ratio 20, noise_multiplier 2, keep",
        "keep: leaky",
    ):
        assert sentence in text


def test_explain_with_a_model_puts_the_noise_beside_the_clip(model: Path) -> None:
    code, answer = run_json("explain", "tabular-ehr", "--model", model)
    assert code == 0
    assert answer["noise"]["ratio"] == pytest.approx(330**0.5)
    assert answer["noise"]["multiplier"] == pytest.approx(1.0)
    assert answer["noise"]["coordinates"] == 330
    assert answer["formal_guarantee"] is False
    assert answer["groups"][0]["knobs"]["max_norm"] == {"value": 0.04, "rules": ["baseline"]}
    text = run("explain", "tabular-ehr", "--model", model)[1]
    assert "bound on the update's norm: 0.04. The noise is at least 18.2 times the signal" in text
    assert "over 330 values; on each of them 1 times." in text
    assert "2 running statistics of normalisation layers stay" in text
    assert "WARNING" not in text
    loud = run("explain", "tabular-ehr", "--model", model, "--sensitivity", "0.6")[1]
    assert "WARNING: the noise drowns the update" in loud


def test_explain_shows_a_bound_that_follows_at_any_value(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "auto.toml"
    limits = "max_norm_floor = 0.1\nmax_norm_ceiling = 10\nnoise_ratio = 2\n"
    path.write_text(EMPTY + f'[[rule]]\nid = "all"\nmax_norm = "auto"\n{limits}', encoding="utf-8")
    first = run("explain", path, "--model", model)[1]
    assert 'Rule "all": max_norm = "auto" is shown as in the first round, 1;' in first
    assert "bound on the update's norm: 1. The noise is at least 2 times" in first
    later = run("explain", path, "--model", model, "--auto-norm", "all=5")[1]
    assert 'Rule "all": max_norm = "auto" is taken to have come to 5.' in later
    assert "Expected norm of the noise: 10; bound on the update's norm: 5." in later
    answer = run_json("explain", path, "--model", model, "--auto-norm", "all=5")[1]
    assert answer["groups"][0]["knobs"]["max_norm"] == {"value": 5.0, "rules": ["all"]}
    for wrong in ("all=11", "all=nan", "all=", "all", "other=1"):
        assert run("explain", path, "--auto-norm", wrong)[0] == 2


def test_explain_says_which_of_two_noises_is_added_once_it_knows_the_model(
    tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "each.toml"
    rule = '[[rule]]\nid = "all"\nmax_norm = 1\nnoise_ratio = 2\nnoise_multiplier = 0.5\n'
    path.write_text(EMPTY + rule, encoding="utf-8")
    bare = run("explain", path)[1]
    assert "released, max_norm 1, noise_ratio 2, noise_multiplier 0.5 |" in bare
    assert "the larger noise is added; which one that is depends on how many values" in bare
    known = run("explain", path, "--model", model)[1]
    assert "released, max_norm 1, noise_multiplier 0.5 |" in known
    assert "Expected norm of the noise: 9.08; bound on the update's norm: 1." in known
    assert "which one that is depends" not in known + run("explain", "baseline")[1]


def test_explain_says_that_an_empty_policy_releases_nothing(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text(EMPTY, encoding="utf-8")
    text = run("explain", path, "--model", model)[1]
    assert "Nothing is released: no parameter is let out." in text
    assert "action: no rule" in text
    assert "error: releases nothing" in text


def test_explain_tells_the_bounds_that_are_missing(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text(EMPTY + '[[rule]]\nid = "all"\n', encoding="utf-8")
    assert "No bound on the update's norm." in run("explain", path, "--model", model)[1]
    path.write_text(EMPTY + '[[rule]]\nid = "all"\nmax_norm = 1\n', encoding="utf-8")
    assert "WARNING: no noise is added." in run("explain", path, "--model", model)[1]
    path.write_text(EMPTY + '[[rule]]\nid = "h"\nmatch = ["0.**"]\n', encoding="utf-8")
    text = run("explain", path, "--model", model)[1]
    assert "1.bias, 1.weight | 20 | withheld | action: no rule" in text


def test_explain_says_why_a_parameter_stays_that_only_a_rule_with_when_matches(
    tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "when.toml"
    rules = '[[rule]]\nid = "h"\nmatch = ["0.**"]\n[[rule]]\nid = "w"\nwhen = {suspicion = 0}\n'
    path.write_text(EMPTY + rules + "keep = 0.5\n", encoding="utf-8")
    text = run("explain", path, "--model", model)[1]
    assert "1.bias, 1.weight | 20 | withheld | action: no rule without `when` lets it out" in text


def test_new_in_json_names_what_was_written(tmp_path: Path) -> None:
    written = [str(tmp_path / "ours.toml"), str(tmp_path / "ours.test.toml")]
    assert run_json("new", tmp_path / "ours.toml") == (0, {"written": written})


def test_explain_tells_refusals() -> None:
    assert "The round is refused" in run("explain", "baseline", "--unhealthy")[1]
    _, answer = run_json("explain", "baseline", "--suspicion", "0.5")
    assert (answer["action"], answer["decided_by"]) == (
        "refuse-round",
        ["baseline", "crafted-model"],
    )


def test_names_in_brackets_are_no_markup(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal too, a parameter is shown by its own name."""
    odd = tmp_path / "odd.safetensors"
    save_file({"a[bold].w": torch.zeros(2)}, odd)
    monkeypatch.setattr(
        policy_screen,
        "Console",
        lambda **kw: Console(force_terminal=True, no_color=True, width=120, **kw),
    )
    assert "a[bold].w" in run("explain", "baseline", "--model", odd)[1]
    assert "0.weight" in run("explain", "baseline", "--model", model)[1]


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """A server chooses the names of parameters; control characters in them are not printed."""
    odd = tmp_path / "odd.safetensors"
    save_file({"a\x1b[2Jb": torch.zeros(2)}, odd)
    text = run("explain", "baseline", "--model", odd)[1]
    assert "\x1b" not in text
    assert "a\ufffd[2Jb" in text


def test_schema_is_printed_or_written(tmp_path: Path) -> None:
    assert json.loads(run("schema")[1]) == json_schema()
    assert run("schema", "-o", tmp_path / "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == json_schema()
    assert run_json("schema", "-o", tmp_path / "s.json") == (
        0,
        {"written": [str(tmp_path / "s.json")]},
    )
    assert run_json("schema") == (0, json_schema())
    assert run("schema", "-o", tmp_path / "none" / "s.json")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "/none.toml"),
        ("check", "no-such-policy"),
        ("check",),
        ("test", "/none"),
        ("explain", "/none.toml"),
        ("explain", "baseline", "--model", "/none.safetensors"),
        ("explain", "baseline", "--sensitivity", "2"),
        ("explain", "/"),
        ("frobnicate",),
    ],
)
def test_misuse_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_a_folder_without_policies_is_misuse(tmp_path: Path) -> None:
    code, text = run("check", tmp_path)
    assert (code, "holds no policy file" in text) == (2, True)
