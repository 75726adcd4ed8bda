"""`sentinel stress`: runs on a site's own code, writes two private files, refuses in a sentence."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sentinel.cli.main import app
from sentinel.stress.lab.attacks.rows import Rows

runner = CliRunner()

SITE = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

def data():
    rows = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
    return {"train": (rows, (rows[:, 0] > 0).float()), "rate": 0.1}
"""
POLICY = """
schema = 1
name = "own"
[limits]
min_patients = {least}
[[rule]]
id = "baseline"
max_norm = {norm}
noise_ratio = {noise}
"""
NAMES = ["--model", "site_under_test:net", "--data", "site_under_test:data"]
SHORT = ["--attacks", "rows", "--no-curves", "--budget", "0.02"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the site's own code."""
    (tmp_path / "site_under_test.py").write_text(SITE)
    monkeypatch.setattr(Rows, "wanted", 10)  # enough for what these tests say
    monkeypatch.chdir(tmp_path)
    return tmp_path


def policy(folder: Path, noise: float = 40.0, norm: float = 0.1, least: int = 1) -> list[str]:
    path = folder / "own.toml"
    path.write_text(POLICY.format(noise=noise, norm=norm, least=least))
    path.chmod(0o600)
    return ["--policy", str(path)]


def test_two_private_files_and_json_that_says_the_same(site: Path) -> None:
    command = ["stress", *NAMES, *policy(site), *SHORT, "--out", "found", "--json"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    files = sorted((site / "found").iterdir())
    assert [path.name for path in files] == ["stress.html", "stress.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((site / "found").stat().st_mode) == 0o700
    found = json.loads(result.stdout)
    assert found == json.loads(files[1].read_text())
    assert found["schema"] == 1
    first = found["subjects"][0]["attacks"][0]
    assert first["raw"]["measures"][1]["mean"] == 1.0
    assert first["released"]["measures"][1]["mean"] == 0.0
    assert str(site / "found") in files[0].read_text()


def test_a_leak_ends_with_one_and_says_so(site: Path) -> None:
    result = runner.invoke(
        app, ["stress", *NAMES, *policy(site, noise=0.001, norm=10.0), *SHORT, "--redact"]
    )
    assert result.exit_code == 1
    assert "lets through too much" in result.output
    assert (site / "stress-output" / "stress.html").exists()


def test_everything_withheld_ends_with_one_and_says_so(site: Path) -> None:
    result = runner.invoke(app, ["stress", *NAMES, *policy(site, least=10_000), *SHORT])
    assert result.exit_code == 1
    assert "let no update out" in result.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "Give --model"),
        (["--demo", "--policy", "tabular-ehr"], "leave the others out"),
        ([*NAMES, "--policy", "nothing-like-it"], "no policy is called"),
        (["--model", "net", "--data", "d:d", "--policy", "tabular-ehr"], "package.module:name"),
        ([*NAMES, "--policy", "tabular-ehr", "--attacks", "guess"], "no attack 'guess'"),
        ([*NAMES, "--policy", "tabular-ehr", "--budget", "0"], "above 0"),
        ([*NAMES, "--policy", "tabular-ehr", "--out", "site_under_test.py"], "must be a folder"),
    ],
)
def test_misuse_ends_with_two_and_leaves_the_disk_as_it_was(site, options, expected) -> None:
    before = sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
    result = runner.invoke(app, ["stress", *options])
    assert result.exit_code == 2
    assert expected in result.output
    assert sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.slow
def test_the_installed_command_runs_and_the_sites_ledger_stays_closed(site: Path) -> None:
    script = "from sentinel.cli.main import main; main()"
    command = [sys.executable, "-c", script, "stress", *NAMES, *policy(site), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "never saw them" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_page_on_stress_tests_shows_code_and_a_command_that_run(tmp_path, monkeypatch) -> None:
    """As they stand there, but for the time that the command is given."""
    text = (Path(__file__).parents[2] / "docs" / "stress.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = re.findall(r"```bash\nsentinel (.*?)\n```", text, re.DOTALL)
    (tmp_path / "my_site.py").write_text(code[0])
    monkeypatch.chdir(tmp_path)
    test = next(command for command in commands if "--budget 10" in command)
    short = test.replace("--budget 10", "--budget 0.02 --no-curves --attacks rows")
    result = runner.invoke(app, short.split())
    assert (tmp_path / "stress-output" / "stress.html").exists(), result.output
    for command in commands:  # each option is one that there is
        asked = runner.invoke(app, [*command.split(), "--help"])
        assert asked.exit_code == 0, command


def test_calibrate_writes_a_policy_that_check_passes(site: Path, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 1)
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", "rows=1"]
    result = runner.invoke(app, [*command, "--out", "found.toml"])
    assert result.exit_code == 0, result.output
    assert stat.S_IMODE((site / "found.toml").stat().st_mode) == 0o600
    assert runner.invoke(app, ["policy", "check", "found.toml"]).exit_code == 0
    again = runner.invoke(app, [*command, "--out", "found.toml"])
    assert again.exit_code == 2
    assert "exists" in again.output


@pytest.mark.slow
def test_a_target_out_of_reach_ends_with_one_and_writes_nothing(site: Path, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 1)
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", "rows=-2"]
    result = runner.invoke(app, [*command, "--out", "found.toml", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["reached"] is False
    assert not (site / "found.toml").exists()


@pytest.mark.slow
def test_the_demo_is_through_within_five_minutes_and_raw_updates_leak(tmp_path: Path) -> None:
    result = runner.invoke(app, ["stress", "--demo", "--out", str(tmp_path / "found"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sum(subject["seconds"] for subject in found["subjects"]) < 290
    hearts, xrays = found["subjects"]
    lone = hearts["attacks"][0]
    assert (lone["attack"], lone["records"]) == ("rows", 1)
    assert lone["raw"]["measures"][1]["mean"] > 0.9
    assert lone["released"]["kept_in"] == {"too-few-patients": lone["updates_planned"]}
    picture = xrays["attacks"][0]
    assert (picture["attack"], picture["records"]) == ("pictures", 1)
    assert picture["raw"]["measures"][0]["mean"] > 0.85
