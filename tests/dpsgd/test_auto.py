"""`max_norm = "auto"` beside private training: the noise comes before any rule, so it is free."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sentinel
from sentinel.bounds import learn
from sentinel.policy import load_policy
from sentinel.policy.checks import check, failed

if TYPE_CHECKING:
    from pathlib import Path

POLICY = """
schema = 1
name = "private"
[privacy]
unit = "{unit}"
patients = 40
batch = 20
epsilon = 500.0
delta = 1e-4
clip_norm = 1.0
noise_multiplier = 1.0
[[rule]]
id = "follows"
max_norm = "auto"
max_norm_floor = 0.05
max_norm_ceiling = 5.0
[[rule]]
id = "masked"
when = {{ sensitivity = 0.003 }}
keep = 0.5
"""
UNITS = pytest.mark.parametrize("unit", ["patient", "record"])


class Hospital:
    """A private guard under a bound that follows, and rounds of a few steps."""

    def __init__(self, folder: Path, unit: str) -> None:
        """Make them, with invented patients of two records each."""
        self.path = folder / "policy.toml"
        self.path.write_text(POLICY.format(unit=unit))
        self.path.chmod(0o600)
        self.guard = sentinel.Guard(self.path, folder / "site", unsafe_skip_inspection=True)
        drawn = torch.Generator().manual_seed(3)
        rows = torch.randn(40, 5, generator=drawn)
        loader = DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=8)
        model = nn.Linear(5, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ids = [row // 2 for row in range(40)] if unit == "patient" else None
        self.model, self.optimizer, self.loader = self.guard.private(
            model, optimizer, loader, patients=ids
        )

    def round(self, number: int, base: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """What left, and the evidence that it was decided by."""
        with self.guard.round(number, base, self.model) as opened:
            for x, y in self.loader:
                self.optimizer.zero_grad()
                nn.functional.mse_loss(self.model(x), y).backward()
                self.optimizer.step()
        out = opened.release()
        return out, opened.decided.evidence


def bounds_of(folder: Path) -> str:
    """What is remembered, as it stands on disk."""
    (file,) = (folder / "site" / "history").glob("*.bounds.json")
    return file.read_text()


@UNITS
def test_a_receiver_could_have_computed_every_bound(tmp_path: Path, unit: str) -> None:
    """From the global models, what left, and the policy: the same memory, byte by byte."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    hospital, receiver = Hospital(ours, unit), Hospital(theirs, unit)
    house = receiver.guard._door.house
    base = {name: value.clone() for name, value in hospital.model.state_dict().items()}
    bounds = []
    for number in range(6):
        out, evidence = hospital.round(number, base)
        key = hospital.guard.round(number, base).key
        known = house.memory(key).norms(house.rules.autos)
        assert evidence.auto_norms == known
        bounds += known.values()
        public = replace(evidence, sensitivity=0.0)
        learn(house, key, public, base, out, deltas=False, aliases={})
        assert bounds_of(ours) == bounds_of(theirs)
        norm = sum(float((out[name] - base[name]).square().sum()) for name in out) ** 0.5
        assert norm <= 2 * bounds[-1] * (1 + 1e-6)  # twice where half of the values stay
        base = out
    assert len(set(bounds)) == 6  # it moves
    assert all(0.05 <= bound <= 5.0 for bound in bounds)


@UNITS
def test_check_has_nothing_against_it(tmp_path: Path, unit: str) -> None:
    """Also not that no noise_ratio goes with it: the noise is in the training already."""
    hospital = Hospital(tmp_path, unit)
    found = check(load_policy(hospital.path).policy, dt.date(2026, 1, 1))
    assert [one.message for one in found if one.rule == "follows"] == []
    assert not failed(found)
