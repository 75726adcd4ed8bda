"""The demo as a whole: every figure that is asked for, one report that stands alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from sentinel.cli.main import app
from sentinel.demo import run
from sentinel.demo.heart_result import Settings
from sentinel.demo.report import montage, report_html
from sentinel.demo.xray_result import XraySettings
from sentinel.stress.passive.estimate import Estimation
from sentinel.stress.passive.images import ImageAttacker
from sentinel.stress.passive.inversion import Matching

if TYPE_CHECKING:
    from pathlib import Path

HEARTS = Settings(repeats=1, rounds=3, turns_at=2)
XRAYS = XraySettings(
    lone=1,
    shown=2,
    lone_search=Matching(iterations=20),
    attacker=ImageAttacker({"smoothed": Matching(iterations=2)}, {"prior": Estimation(rounds=1)}),
)
ASKED = {
    "auc_unguarded",
    "auc_guarded",
    "rows_read_unguarded",
    "rows_read_guarded",
    "rows_near_unguarded",
    "rows_near_guarded",
    "rows_near_guarded_uninspected",
    "rounds_refused",
    "false_refusals",
    "ssim_raw",
    "lone_image_withheld",
    "ssim_sanitized",
    "ssim_class_mean",
    "reid_top1",
    "batch_size",
    "net",
    "training_stage",
}


@pytest.fixture(scope="module")
def result() -> run.DemoResult:
    return run.run_demo(HEARTS, XRAYS)


def test_every_figure_that_is_asked_for_is_there_and_finite(result: run.DemoResult) -> None:
    figures = run.figures(result)
    assert figures.keys() >= ASKED
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    near = figures["rows_near_guarded"]
    assert near["difference"] == pytest.approx(near["share"] - near["held_out_share"])
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.slow
def test_the_whole_demo_reaches_its_aims(tmp_path: Path) -> None:
    """The figures in the README, at the bounds that they have to keep, by the command it names."""
    done = CliRunner().invoke(app, ["demo", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    full = json.loads(done.stdout)
    assert full["repeats"] == 10
    assert full["auc_lost_interval"][0] <= 0.02  # a mean of ten has a standard error of about .007
    assert full["auc_guarded"] >= full["auc_unguarded"] - 0.04
    assert full["rows_read_unguarded"] > 0
    assert full["rows_read_guarded"] == full["rows_read_guarded_uninspected"] == 0
    assert full["rows_near_guarded"]["upper_95"] <= 0.02
    assert full["rows_near_guarded_uninspected"]["upper_95"] <= 0.02
    assert full["auc_guarded_by_site"] != full["auc_unguarded_by_site"]
    for form in ("unguarded", "guarded", "guarded_uninspected"):
        assert full[f"guesses_{form}"] > 1000
    assert full["rounds_refused"] == 4 * full["repeats"]
    assert full["false_refusals"] == full["honest_updates_withheld"] == 0
    assert full["ssim_raw"] >= 0.9
    assert full["lone_image_withheld"] is True
    assert full["ssim_sanitized"] <= full["ssim_class_mean"] + 0.02
    assert full["reid_top1"] <= full["reid_chance_limit"]
    assert full["seconds_hearts"] + full["seconds_xrays"] < 200


class Reader(HTMLParser):
    """Collects what a report refers to and what it says, and checks that its tags close."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note sources; remember what has to close."""
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check the order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect the words."""
        self.text += data


def test_the_report_stands_alone_and_says_what_was_measured(result: run.DemoResult) -> None:
    reader = Reader()
    reader.feed(report_html(result))
    assert reader.open == []
    assert len(reader.sources) == 2 + 4 * 2
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    for said in (
        "no formal guarantee",
        f"{result.hearts.unguarded.exact} of {result.hearts.unguarded.records}",
        "reason=crafted-model",
        "too-few-patients",
        f"{result.xrays.ssim_raw:.2f}",
    ):
        assert said in " ".join(reader.text.split())


def words(result: run.DemoResult) -> str:
    """What a report says, without its tags."""
    reader = Reader()
    reader.feed(report_html(result))
    return " ".join(reader.text.split())


def test_a_difference_stands_with_its_estimate_and_its_bound(result: run.DemoResult) -> None:
    reads = result.hearts.unguarded
    assert reads.advantage < reads.interval.high
    assert f"{reads.advantage:.3f} (up to {reads.interval.high:.3f})" in words(result)


def test_what_rounds_to_zero_has_no_minus_sign(result: run.DemoResult) -> None:
    example = result.hearts.examples[0]
    nothing = dict.fromkeys(example.truth, -0.04)
    example = replace(example, unguarded=nothing, sanitized=nothing)
    hearts = replace(result.hearts, examples=(example,), auc_losses=(-0.0004,))
    text = words(replace(result, hearts=hearts))
    assert "-0.0 " not in text
    assert "over hospitals: +0.000." in text


def test_every_round_has_a_letter_and_its_decision_in_words(result: run.DemoResult) -> None:
    """Colour alone and a tooltip say nothing to some readers."""
    html, notes = report_html(result), result.hearts.notes
    cells = re.findall(r'<span class="mark (\w+)" title="[^"]*">(\w)</span>', html)
    assert cells == [
        (note.outcome.action, {"released": "S", "refused": "R"}[note.outcome.action])
        for note in sorted(notes, key=lambda note: note.site)
    ]
    details = html[html.index("<details>") : html.index("</details>")]
    assert details.count("<tr>") == 1 + HEARTS.rounds
    assert details.count("refused; reason crafted-model; verdict binning; suspicion") == 4
    assert details.count("released; suspicion") == len(notes) - 4


@pytest.mark.parametrize(
    ("keep", "rules", "said"),
    [
        (1.0, ("baseline",), "let out by rule baseline: its norm of"),
        (1.0, ("baseline",), "all coordinates are kept."),
        (0.25, ("baseline", "leaky"), "let out by rules baseline, leaky: its norm of"),
        (0.25, ("baseline", "leaky"), "25% of the coordinates are kept."),
    ],
)
def test_the_treatment_of_the_x_rays_reads_like_prose(
    result: run.DemoResult, keep: float, rules: tuple[str, ...], said: str
) -> None:
    treatment = replace(result.xrays.treatment, keep=keep, rules=rules)
    text = words(replace(result, xrays=replace(result.xrays, treatment=treatment)))
    assert said in text
    assert f"The net: {result.xrays.net}" in text
    found = round(result.xrays.reid_top1 * result.xrays.batch_size)
    assert f"ranks the true one first for {found} of {result.xrays.batch_size}," in text


def test_the_montage_shows_every_picture(result: run.DemoResult) -> None:
    assert montage(result.xrays).shape == (4 * 32 * 3, 3 * 32 * 3)


def test_the_command_writes_the_report_for_its_owner_alone(
    result: run.DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def run_demo(hearts: Settings, xrays: XraySettings, **_: object) -> run.DemoResult:
        asked.update(hearts=hearts, xrays=xrays)
        return result

    monkeypatch.setattr(run, "run_demo", run_demo)
    command = ["demo", "--out", str(tmp_path / "new" / "out"), "--repeats", "7", "--seed", "3"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output).keys() >= ASKED
    assert (asked["hearts"].repeats, asked["hearts"].seed, asked["xrays"].seed) == (7, 3, 3)
    assert (tmp_path / "new" / "out" / "report.html").stat().st_mode & 0o077 == 0
    told = CliRunner().invoke(app, command).output
    assert "with the guard" in told
    assert "report.html" in told
