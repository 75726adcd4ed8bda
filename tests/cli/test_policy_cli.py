"""`sentinel policy`, as a person and as a script use it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from sentinel.cli import policy as cli
from sentinel.cli import policy_screen
from sentinel.policy import load_policy
from sentinel.policy.schema import json_schema

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


def test_check_warns_of_a_file_that_could_not_be_used(folder: Path) -> None:
    (folder / "ours.toml").chmod(0o666)
    code, text = run("check", folder)
    assert code == 0
    assert "would be refused where it is used" in text


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
        "every parameter | - | released, max_norm 0.1, noise_ratio 20, keep 0.5",
        "keep: leaky",
    ):
        assert sentence in text


def test_explain_with_a_model_puts_the_noise_beside_the_clip(model: Path) -> None:
    code, answer = run_json("explain", "tabular-ehr", "--model", model)
    assert code == 0
    assert answer["noise"]["ratio"] == pytest.approx(10.0)
    assert answer["noise"]["coordinates"] == 330
    assert answer["formal_guarantee"] is False
    assert answer["groups"][0]["knobs"]["max_norm"] == {"value": 0.1, "rules": ["baseline"]}
    text = run("explain", "tabular-ehr", "--model", model)[1]
    assert "bound on the update's norm: 0.1. The noise is at least 10 times the signal" in text
    assert "2 running statistics of normalisation layers stay" in text
    assert "WARNING" not in text
    loud = run("explain", "tabular-ehr", "--model", model, "--sensitivity", "0.6")[1]
    assert "WARNING: the noise drowns the update" in loud


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
