"""`sentinel stress`: runs on a site's own code, writes two private files, refuses in a sentence."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sentinel.cli.console import say_error
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
SHORT = ["--attacks", "rows", "--no-curves", "--budget", "0.1"]


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
    result = runner.invoke(app, ["stress", *NAMES, *policy(site, least=10_000), *SHORT[:-1], "0.2"])
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
        ([*NAMES, "--policy", "tabular-ehr", "--budget", "nan"], "a number of minutes"),
        ([*NAMES, "--policy", "tabular-ehr", "--budget", "inf"], "at most 10080"),
        ([*NAMES, "--policy", "tabular-ehr", "--budget", "1e9"], "at most 10080"),
        ([*NAMES, "--policy", "tabular-ehr", "--out", "site_under_test.py"], "must be a folder"),
    ],
)
def test_misuse_ends_with_two_and_leaves_the_disk_as_it_was(site, options, expected) -> None:
    before = sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
    result = runner.invoke(app, ["stress", *options])
    assert result.exit_code == 2
    assert expected in result.output
    assert sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.parametrize("out", ["/proc/found", "taken"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(site, out) -> None:
    (site / "taken" / "stress.html").mkdir(parents=True)
    result = runner.invoke(app, ["stress", *NAMES, *policy(site), "--budget", "60", "--out", out])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "cannot be written" in result.output or "in the place of" in result.output


def test_conditions_stand_once_and_figures_within_eighty_columns(site: Path) -> None:
    command = ["stress", *NAMES, *policy(site), "--no-curves", "--budget", "0.05"]
    said = runner.invoke(app, command).output.splitlines()
    conditions = [line for line in said if "record" in line and line.endswith("server")]
    assert conditions
    assert len(conditions) == len(set(conditions))
    figures = [line for line in said if line.startswith("  ")]
    assert max(map(len, figures)) <= 80
    assert "knowing nothing" not in " ".join(figures)


def test_an_inconclusive_test_ends_with_one_and_says_which_attack_shows_nothing(
    site, monkeypatch
) -> None:
    """Rows of two records: none was read, and nearly all may have been."""
    monkeypatch.setattr(Rows, "wanted", 2)
    result = runner.invoke(app, ["stress", *NAMES, *policy(site), *SHORT])
    assert result.exit_code == 1, result.output
    assert "Inconclusive" in result.stdout
    assert "rows (2 records)" in result.stdout
    assert "shows too little" in result.stdout


def test_what_the_sites_code_prints_does_not_break_the_json(site: Path) -> None:
    code = SITE.replace("    rows =", "    print('Mrs Smith')\n    rows =")
    (site / "printing_site.py").write_text(code)
    names = ["--model", "printing_site:net", "--data", "printing_site:data"]
    result = runner.invoke(app, ["stress", *names, *policy(site), *SHORT, "--json"])
    assert "Smith" not in result.stdout
    assert json.loads(result.stdout)["schema"] == 1


PICTURES = """
import torch

def net():
    torch.manual_seed(0)
    first, last = torch.nn.Linear(3 * 144, 32), torch.nn.Linear(32, 2)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.ReLU(), last)

def data():
    pixels = torch.rand(160, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"train": ((pixels - 0.5) / 0.25, torch.arange(160) % 2), "mean": [0.5] * 3, "std": STD}
"""


@pytest.mark.parametrize(
    ("std", "name", "expected"),
    [
        ("0.25", "normalised", ""),
        ("[0.25] * 2", "two_of_three", "each of the 3 channels; got 3 and 2"),
        ("None", "mean_alone", "mean and std go together"),
    ],
)
def test_normalised_pictures_are_taken_with_the_mean_and_std_of_the_loader(
    site: Path, std, name, expected
) -> None:
    (site / f"{name}.py").write_text(PICTURES.replace("STD", std))
    command = ["stress", "--model", f"{name}:net", "--data", f"{name}:data", *policy(site), *SHORT]
    result = runner.invoke(app, [*command, "--json"])
    if expected:
        assert result.exit_code == 2
        assert expected in " ".join(result.output.split())
        return
    found = json.loads(result.stdout)["subjects"][0]
    assert found["kind"] == "image"
    assert found["attacks"][0]["raw"]["measures"][1]["mean"] == 1.0


def test_nothing_to_be_said_is_no_pass(site: Path) -> None:
    """One of the first conditions is withheld, the other does not fit into the time."""
    command = ["stress", *NAMES, *policy(site, least=16), "--attacks", "rows", "--no-curves"]
    result = runner.invoke(app, [*command, "--budget", "0.000001"])
    assert result.exit_code == 1
    assert "othing" in result.output


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_fits_nowhere_is_told_with_its_reason_and_not_as_want_of_time(site, options) -> None:
    command = ["stress", *NAMES, *policy(site), "--attacks", "labels", "--no-curves", *options]
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert "it takes a model with an output for each class" in result.stderr
    assert "more time" not in result.stderr
    assert not (site / "stress-output").exists()
    if options:
        found = json.loads(result.stdout)
        assert found["error"].startswith("Nothing was measured")
        assert "labels" in found["not_tried"][-1]["what"]
        assert "an output for each class" in found["not_tried"][-1]["why"]


def test_a_time_too_short_for_anything_is_told_as_want_of_time(site: Path, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.runner._Lab._try", lambda *_: None)
    result = runner.invoke(app, ["stress", *NAMES, *policy(site), *SHORT])
    assert result.exit_code == 1
    assert "more time with --budget" in result.stderr
    assert result.stderr.count("\n") < 10


STOPPING = """
import signal
import torch

class Pressing(torch.nn.Module):
    passes = 0

    def forward(self, x):
        Pressing.passes += 1
        try:
            if Pressing.passes > {passes}:
                signal.raise_signal(signal.{number})
        except {caught}:
            pass
        return x

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(Pressing(), torch.nn.Linear(8, 32), torch.nn.ReLU(),
                               torch.nn.Linear(32, 1))
"""


def stopping(site: Path, name: str, passes: int, number: str, caught: str = "OSError") -> Any:
    """What comes of a test whose model is stopped at its pass after so many."""
    code = STOPPING.format(passes=passes, number=number, caught=caught)
    (site / f"{name}.py").write_text(code)
    command = ["--model", f"{name}:net", "--data", "site_under_test:data", *policy(site)]
    # A job in the background has Ctrl-C switched off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = runner.invoke(app, ["stress", *command, "--budget", "10", "--json"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    return found


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_test_that_is_stopped_while_it_is_planned_lists_everything(site: Path, number) -> None:
    """The first pass sees whether the model fits the records, the second how fast it is."""
    result = stopping(site, f"planning_{number.lower()}", 1, number)
    assert result.exit_code == 1
    assert "The test was stopped." in result.stderr
    found = json.loads(result.stdout)
    assert found["error"].startswith("Nothing was measured")
    listed = {one["what"] for one in found["not_tried"]}
    assert {"rows", "membership", "server qbi"} <= listed
    assert all(one["for_want_of_time"] for one in found["not_tried"])
    assert not (site / "stress-output").exists()


def test_a_test_that_is_stopped_while_the_model_is_loaded_says_so(site: Path) -> None:
    result = stopping(site, "loading", 0, "SIGINT")
    assert result.exit_code == 1
    assert "The test was stopped." in result.stderr
    assert json.loads(result.stdout)["not_tried"] == []


def test_code_of_the_site_that_swallows_the_interrupt_does_not_keep_the_test_going(site) -> None:
    result = stopping(site, "swallowing", 40, "SIGINT", caught="BaseException")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    stopped = found["subjects"][0]["interrupted"] if "subjects" in found else True
    assert stopped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_test_writes_a_partial_report_and_leaves_nothing(site: Path, number) -> None:
    # A job in the background has Ctrl-C switched off, and hands that down.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script = heard + "from sentinel.cli.main import main; main()"
    command = [sys.executable, "-c", script, "stress", *NAMES, *policy(site), "--budget", "2"]
    memory = Path("/dev/shm")  # noqa: S108 - only listed
    before = set(memory.glob("sentinel-stress-*"))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:  # noqa: S603 - our own command
        while not set(memory.glob("sentinel-stress-*")) - before and running.poll() is None:
            time.sleep(0.1)
        time.sleep(10.0)  # something is measured, also on a busy machine
        running.send_signal(number)
        said = running.communicate(timeout=180)[1]
    assert running.returncode == 1
    assert b"Traceback" not in said
    found = json.loads((site / "stress-output" / "stress.json").read_text())
    assert found["subjects"][0]["interrupted"]
    assert not set(memory.glob("sentinel-stress-*")) - before


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
    assert "weakest value that was tried" in " ".join(result.output.split())
    assert "Calibrated on rows alone" in result.output
    assert stat.S_IMODE((site / "found.toml").stat().st_mode) == 0o600
    assert runner.invoke(app, ["policy", "check", "found.toml"]).exit_code == 0
    again = runner.invoke(app, [*command, "--out", "found.toml"])
    assert again.exit_code == 2
    assert "exists" in again.output


def test_a_time_that_is_up_too_early_ends_with_one_and_writes_nothing(site: Path) -> None:
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", "rows=1"]
    command += ["--budget", "0.00001", "--out", "found.toml"]
    result = runner.invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "The time was up" in result.output
    assert not (site / "found.toml").exists()
    found = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert found["cut"]
    assert "max_norm" not in found  # there was no time to see one


@pytest.mark.parametrize("budget", ["0", "nan", "inf", "1e9"])
def test_calibrate_takes_a_number_of_minutes(site: Path, budget) -> None:
    command = ["stress", "calibrate", *NAMES, *policy(site), "--out", "found.toml"]
    result = runner.invoke(app, [*command, "--budget", budget])
    assert result.exit_code == 2
    assert "a number of minutes above 0, and at most 10080" in result.output


def test_a_search_that_was_cut_short_says_that_a_weaker_ratio_may_do(site, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 1)
    monkeypatch.setattr("sentinel.stress.lab.calibration.SEARCH_SHARE", 0.0)
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", "rows=1"]
    result = runner.invoke(app, [*command, "--out", "found.toml"])
    assert result.exit_code == 0, result.output
    assert "a weaker one may do" in result.output
    assert "a weaker one may do" in (site / "found.toml").read_text()


@pytest.mark.parametrize(
    ("target", "out", "expected"),
    [
        ("rows=nan", "found.toml", "finite number"),
        ("rows=0", "found.toml", "must be above 0"),
        ("rows=0.1", "/proc/found.toml", "be written"),
    ],
)
def test_calibrate_refuses_before_anything_runs(site, target, out, expected) -> None:
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", target, "--out", out]
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert expected in result.output


@pytest.mark.slow
def test_a_target_out_of_reach_ends_with_one_and_writes_nothing(site: Path, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 1)
    command = ["stress", "calibrate", *NAMES, *policy(site), "--target", "rows=0.001"]
    result = runner.invoke(app, [*command, "--out", "found.toml", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["reached"] is False
    assert not (site / "found.toml").exists()


def demo(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the demo, and look at what does not depend on time or luck; exit code and figures."""
    command = ["stress", "--demo", "--out", str(folder / "found"), "--json", *options]
    result = runner.invoke(app, command)
    found = json.loads(result.stdout)
    hearts, xrays = found["subjects"]
    lone = hearts["attacks"][0]
    assert (lone["attack"], lone["records"]) == ("rows", 1)
    assert lone["raw"]["measures"][1]["mean"] > 0.9
    assert lone["released"]["kept_in"] == {"too-few-patients": lone["updates_planned"]}
    picture = xrays["attacks"][0]
    assert (picture["attack"], picture["records"]) == ("pictures", 1)
    assert picture["raw"]["measures"][0]["mean"] > 0.85
    return result.exit_code, found


@pytest.mark.slow
def test_a_minute_of_the_demo_shows_that_raw_updates_leak(tmp_path, monkeypatch) -> None:
    """A minute of this process's own time: the machine may be busy."""
    monkeypatch.setattr(time, "monotonic", time.process_time)
    demo(tmp_path, "--budget", "1", "--no-curves")


@pytest.mark.soak
def test_the_demo_does_what_it_planned_within_five_minutes(tmp_path: Path) -> None:
    """On an idle machine of two cores. Whether a leak is seen is up to the guard's noise."""
    exit_code, found = demo(tmp_path)
    unclear = [subject["leaks"] or subject["inconclusive"] for subject in found["subjects"]]
    assert exit_code == int(any(unclear))
    assert not any(row["partial"] for subject in found["subjects"] for row in subject["attacks"])
    assert not any(subject["control_missed"] for subject in found["subjects"])
    assert not [row for subject in found["subjects"] for row in subject["attacks"] if row["error"]]
    assert sum(subject["seconds"] for subject in found["subjects"]) < 290


def test_a_name_between_colons_is_printed_as_it_was_typed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    say_error("my_site:boom: is no factory")
    assert capfd.readouterr().err == "my_site:boom: is no factory\n"
