"""Calibration finds noise that ends an attack, no more than it takes, on records it may look at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.policy.store import parse_policy
from sentinel.stress.lab.calibration import HIGHEST, LOWEST, _allowed, calibrate
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from sentinel.policy import LoadedPolicy

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
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 10)
    found = calibrate(table, plain(), {"rows": 0.0}, seconds=300.0)
    assert LOWEST < found.noise_ratio < HIGHEST
    assert all(one.reached for one in found.evidence)
    policy = parse_policy(found.text.encode(), "found.toml").policy
    assert policy.rules[0].noise_ratio == found.noise_ratio
    assert policy.rules[0].max_norm == found.max_norm
    assert policy.name == "plain-calibrated"
    assert "No formal guarantee" in found.text


@pytest.mark.slow
def test_a_target_that_the_least_noise_reaches_takes_the_least(table, plain) -> None:
    found = calibrate(table, plain(), {"rows": 1.0}, seconds=300.0)
    assert found.noise_ratio == LOWEST
    assert parse_policy(found.text.encode(), "f.toml").policy.rules[0].noise_ratio == LOWEST


def test_a_target_that_nothing_reaches_gives_no_file(table, plain, monkeypatch) -> None:
    monkeypatch.setattr("sentinel.stress.lab.calibration.KEEPS", (1.0,))
    found = calibrate(table, plain(), {"rows": -2.0}, seconds=300.0)
    assert found.text is None
    assert not found.evidence[0].reached


def test_under_a_promise_private_records_are_refused_and_public_ones_taken(table) -> None:
    with pytest.raises(MisuseError, match="public"):
        calibrate(table, promise(), {"rows": 0.0}, seconds=1.0)
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(80, 8, generator=generator)
    public = Records(rows, (rows[:, 0] > 0).float())
    seen = _allowed(replace(table, public=public), promise())
    assert torch.equal(torch.cat([seen.train.inputs, seen.held_out.inputs]), rows)
    assert seen.public is None


def test_private_training_has_no_noise_ratio_to_calibrate(table) -> None:
    with pytest.raises(MisuseError, match="private training"):
        calibrate(
            table, promise("record", "patients = 500\nbatch = 10"), {"rows": 0.0}, seconds=1.0
        )


@pytest.mark.parametrize(
    ("targets", "expected"), [({"guess": 0.0}, "no attack"), ({"pictures": 0.0}, "None of")]
)
def test_targets_that_cannot_be_measured_are_misuse(table, plain, targets, expected) -> None:
    with pytest.raises(MisuseError, match=expected):
        calibrate(table, plain(), targets, seconds=1.0)
