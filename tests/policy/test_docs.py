"""Every command that docs/policies.md shows does what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sentinel.cli.policy import app
from sentinel.policy import decide
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.terms import Action, Evidence

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_worked_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow the page from top to bottom: run what it runs, add what it adds."""
    net = {
        "encoder": torch.nn.Sequential(
            torch.nn.Linear(13, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32)
        ),
        "classifier": torch.nn.Linear(32, 1),
    }
    monkeypatch.chdir(tmp_path)
    save_file(torch.nn.ModuleDict(net).state_dict(), "model.safetensors")
    text = DOCS.read_text(encoding="utf-8")
    worked = text[text.index("## A worked example") :]
    policy, shown = Path("our-site.toml"), 0
    for kind, block in _BLOCK.findall(worked):
        if kind == "toml":
            file = Path("our-site.test.toml") if "[[case]]" in block else policy
            file.write_text(f"{file.read_text(encoding='utf-8')}\n{block}", encoding="utf-8")
            continue
        command, _, expected = block.partition("\n")
        arguments = command.removeprefix("$ sentinel policy ").split()
        assert CliRunner().invoke(app, arguments).output == expected, command
        shown += 1
        if "clasifier" in expected:  # the page corrects it in its next sentence
            corrected = policy.read_text(encoding="utf-8").replace("clasifier", "classifier")
            policy.write_text(corrected, encoding="utf-8")
    assert shown == 8


def test_the_bound_that_follows_is_explained_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    section = text[text.index("## A bound that follows") : text.index("## A promise")]
    (_, policy), (_, shown) = _BLOCK.findall(section)
    Path("follows.toml").write_text(policy, encoding="utf-8")
    command, _, expected = shown.partition("\n")
    arguments = command.removeprefix("$ sentinel policy ").split()
    assert CliRunner().invoke(app, arguments).output == expected


def blocks_with(text: str) -> list[str]:
    """The TOML blocks of the page that hold a text."""
    page = DOCS.read_text(encoding="utf-8")
    return [block for kind, block in _BLOCK.findall(page) if kind == "toml" and text in block]


def test_the_pair_of_rules_for_noise_holds_back_what_the_page_says() -> None:
    (pair,) = blocks_with("not-the-head")
    policy = parse_toml(f'schema = 1\nname = "p"\n{pair}'.encode(), "page", Policy)
    names = {"encoder.weight": 640, "classifier.weight": 10}
    plan = decide(policy, Evidence(names, 0.0, 0.0, 0.0, unhealthy=False))
    actions = {name: treatment.action for name, treatment in plan.treatments.items()}
    assert actions == {"encoder.weight": Action.RELEASE, "classifier.weight": Action.WITHHOLD}


def test_the_two_noises_compare_as_the_page_says() -> None:
    said = re.search(
        r"On ([\d,]+) values a `noise_multiplier` of ([\d.]+) is a `noise_ratio` of (\d+)",
        DOCS.read_text(encoding="utf-8"),
    )
    assert said is not None
    values, multiplier, ratio = (float(figure.replace(",", "")) for figure in said.groups())
    head = 'schema = 1\nname = "p"\n[[rule]]\nid = "all"\nmax_norm = 0.5\n'
    stds = []
    for asked in (f"noise_multiplier = {multiplier}", f"noise_ratio = {ratio}"):
        policy = parse_toml(f"{head}{asked}\n".encode(), "page", Policy)
        plan = decide(policy, Evidence({"w": int(values)}, 0.0, 0.0, 0.0, unhealthy=False))
        stds.append(plan.treatments["w"].noise_std)
    assert stds[0] == pytest.approx(stds[1])


def test_the_promise_of_the_page_pays_for_as_many_releases_as_it_says(tmp_path: Path) -> None:
    (promise,) = blocks_with('unit = "site"')
    path = tmp_path / "promise.toml"
    path.write_text(f'schema = 1\nname = "p"\n{promise}[[rule]]\nid = "all"\n', encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0, done.output
    (count,) = re.findall(r"\((\d+) here\)", DOCS.read_text(encoding="utf-8"))
    assert f"pays for {count} releases" in done.output


def test_the_promise_per_patient_of_the_page_is_one(tmp_path: Path) -> None:
    (promise,) = blocks_with('unit = "patient"')
    path = tmp_path / "promise.toml"
    path.write_text(f'schema = 1\nname = "p"\n{promise}[[rule]]\nid = "all"\n', encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0, done.output
    assert "guard.private" in done.output


def test_the_first_rule_of_the_page_is_a_rule() -> None:
    block = next(block for _, block in _BLOCK.findall(DOCS.read_text(encoding="utf-8")))
    text = 'schema = 1\nname = "p"\n[[rule]]\nid = "base"\nmax_norm = 1\n' + block
    assert parse_toml(text.encode(), "page", Policy).rules[1].keep == 0.5
