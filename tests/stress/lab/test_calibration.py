"""Calibration finds noise that ends an attack, no more than it takes, on records it may look at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.policy.store import parse_policy
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.calibration import (
    HIGHEST,
    LOWEST,
    Measured,
    _allowed,
    _Calibration,
    calibrate,
)
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.finding import Tally
from sentinel.stress.lab.setting import Setting
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.finding import Finding

PROMISE = """
schema = 1
name = "promise"
[privacy]
unit = "{unit}"
epsilon = 8.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = 16.0
{more}
[[rule]]
id = "all"
"""


def promise(unit: str = "site", more: str = "") -> LoadedPolicy:
    return parse_policy(PROMISE.format(unit=unit, more=more).encode(), "promise.toml")


@pytest.mark.slow
def test_the_weakest_noise_that_ends_close_reads_is_found_and_written(
    table, plain, monkeypatch
) -> None:
    """Updates of one record, which need far more than the least that is tried."""
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 24)
    found = calibrate(table, plain(), {"rows": 0.2}, seconds=600.0)
    assert LOWEST < found.noise_ratio < HIGHEST
    assert all(one.tally.interval().high <= 0.2 for one in found.evidence)
    policy = parse_policy(found.text.encode(), "found.toml").policy
    assert policy.rules[0].noise_ratio == found.noise_ratio
    assert policy.rules[0].max_norm == found.max_norm
    assert policy.name == "plain-calibrated"
    assert "No formal guarantee" in found.text
    assert "max_norm: the median norm of this site's updates" in found.text


@pytest.mark.slow
def test_a_target_that_the_least_noise_reaches_takes_the_least(table, plain) -> None:
    found = calibrate(table, plain(), {"rows": 1.0}, seconds=600.0)
    assert found.noise_ratio == LOWEST
    assert parse_policy(found.text.encode(), "f.toml").policy.rules[0].noise_ratio == LOWEST


def test_few_records_without_a_hit_do_not_show_a_small_target(table, plain, monkeypatch) -> None:
    """No row was read of two, which leaves gains of far over .02 open."""
    monkeypatch.setattr("sentinel.stress.lab.calibration.KEEPS", (1.0,))
    found = calibrate(table, plain(), {"rows": 0.02}, seconds=600.0)
    assert found.text is None
    assert not found.cut
    assert found.evidence[0].tally.gain <= 0.0
    assert not found.evidence[0].reached


def test_more_updates_are_made_until_the_bound_shows_the_target_or_cannot(
    table, plain, monkeypatch
) -> None:
    """And so many, settled beforehand, are drawn anew to confirm it."""
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 40)
    monkeypatch.setattr("sentinel.stress.lab.calibration.LOWEST", 60.0)
    found = calibrate(table, plain(), {"rows": 0.2}, seconds=600.0)
    assert found.noise_ratio >= 60.0
    assert 10 < len(found.evidence[0].tally.values) < 40
    assert found.tried >= 3


def test_a_time_that_is_up_before_the_target_is_shown_gives_no_file(table, plain) -> None:
    found = calibrate(table, plain(), {"rows": 1.0}, seconds=1e-6)
    assert found.text is None
    assert found.cut


def test_a_search_without_time_confirms_the_strictest_ratio_and_says_it_was_cut(
    table, plain, monkeypatch
) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.SEARCH_SHARE", 0.0)
    found = calibrate(table, plain(), {"rows": 1.0}, seconds=600.0)
    assert found.cut
    assert found.noise_ratio == HIGHEST
    assert "a weaker one may do" in found.text


def test_a_search_that_was_cut_short_is_no_measurement(table, plain, monkeypatch) -> None:
    """A picture attacker in a hurry would let less noise pass."""

    class Hurried(type(ATTACKS["rows"])):
        """Ends before it is through."""

        def run(self, *arguments: object) -> Finding:
            return replace(super().run(*arguments), cut=True)

    monkeypatch.setitem(ATTACKS, "rows", Hurried())
    found = calibrate(table, plain(), {"rows": 1.0}, seconds=600.0)
    assert found.text is None
    assert found.cut


def test_under_a_promise_private_records_are_refused_and_public_ones_taken(table) -> None:
    with pytest.raises(MisuseError, match="public"):
        calibrate(table, promise(), {"rows": 0.1}, seconds=1.0)
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(80, 8, generator=generator)
    public = Records(rows, (rows[:, 0] > 0).float())
    seen = _allowed(replace(table, public=public), promise(), 0)
    found = torch.cat([seen.train.inputs, seen.held_out.inputs])
    assert sorted(found.tolist()) == sorted(rows.tolist())
    assert seen.public is None


def test_public_records_in_order_of_their_class_are_halved_with_both_in_each(table) -> None:
    generator = torch.Generator().manual_seed(9)
    public = Records(torch.randn(80, 8, generator=generator), (torch.arange(80) >= 40).float())
    seen = _allowed(replace(table, public=public), promise(), 0)
    assert len(seen.train) == len(seen.held_out) == 40
    assert all(10 < int(part.labels.sum()) < 30 for part in (seen.train, seen.held_out))


def test_under_a_promise_the_file_says_that_its_clip_norm_is_the_bound(table) -> None:
    """The median norm of the updates was not taken, so that it is not spoken of."""
    work = _Calibration(table, promise(), {"rows": 1.0}, Deadline.after(600.0), 0)
    assert work._set_norm() == 1.0
    text = work._text(16.0, 1.0, ())
    assert "max_norm: clip_norm of the promise" in text
    assert "median" not in text


def test_noise_on_each_value_does_not_stand_in_for_the_ratio_that_is_searched(table, plain) -> None:
    """It would end every attack at the least ratio; the file says that it was set aside."""
    loaded = plain(more="noise_multiplier = 50.0")
    work = _Calibration(table, loaded, {"rows": 1.0}, Deadline.after(600.0), 0)
    text = work._text(0.5, 1.0, ())
    rule = parse_policy(text.encode(), "found.toml").policy.rules[0]
    assert (rule.noise_ratio, rule.noise_multiplier) == (0.5, None)
    assert "Set aside: noise_multiplier = 50 of the rules for every round" in text
    assert "Set aside" in " ".join(work._calibrated(text, 0.5, 1.0, 1.0).notes)
    plainer = _Calibration(table, plain(), {"rows": 1.0}, Deadline.after(600.0), 0)
    assert "Set aside" not in plainer._text(0.5, 1.0, ())


def test_the_floor_of_the_search_and_the_attacks_left_out_are_told(table, plain) -> None:
    """In the file and where people read, and not where a stronger ratio was found."""
    work = _Calibration(table, plain(), {"rows": 1.0}, Deadline.after(600.0), 0)
    one = Measured("rows", Setting(), Tally("read", (0.0,), (0.0,)), 1.0)
    work._evidence = (one,)
    for ratio, floor in ((LOWEST, True), (1.0, False)):
        text = work._text(ratio, 1.0, work._evidence)
        notes = " ".join(work._calibrated(text, ratio, 1.0, 1.0).notes)
        flat = " ".join(line.removeprefix("#").strip() for line in text.splitlines())
        for said in (flat, notes):
            assert ("is the weakest value that was tried" in said) is floor
            assert "Calibrated on rows alone, not on " in said
            assert all(name in said for name in ("membership", "columns", "labels"))
        assert parse_policy(text.encode(), "f.toml").policy.rules[0].noise_ratio == ratio


def test_private_training_has_no_noise_ratio_to_calibrate(table) -> None:
    with pytest.raises(MisuseError, match="private training"):
        calibrate(
            table, promise("record", "patients = 500\nbatch = 10"), {"rows": 0.1}, seconds=1.0
        )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"guess": 0.1}, "no attack"),
        ({"rows": 0.0}, "must be above 0"),
        ({"rows": 0.1, "pictures": 0.1}, "the records are no pictures"),
        ({"property": 0.1}, "names no property"),
    ],
)
def test_targets_that_cannot_be_measured_are_misuse(table, plain, targets, expected) -> None:
    with pytest.raises(MisuseError, match=expected):
        calibrate(table, plain(), targets, seconds=1.0)


def test_targets_that_nobody_named_are_those_that_fit(table, texts, plain) -> None:
    """Words for texts; for a table whose net hides its rows there are none."""
    assert calibrate(texts, plain(), None, seconds=1e-6).cut
    with pytest.raises(MisuseError, match="None of the attacks"):
        calibrate(replace(table, model=nn.Linear(8, 1)), plain(), None, seconds=1.0)
