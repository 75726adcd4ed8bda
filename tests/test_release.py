"""What a release writes down of the promise under which it left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import sentinel
from sentinel.audit import UpdateDecided, read_log, verify_log
from sentinel.cli.main import app
from sentinel.privacy import Ledger, UnboundedEvent

if TYPE_CHECKING:
    from pathlib import Path

POLICY = """
schema = 1
name = "p"
{promise}
[[rule]]
id = "baseline"
"""
PROMISE = """
[privacy]
unit = "{unit}"
patients = 40
epsilon = 50.0
delta = 1e-3
clip_norm = 0.5
noise_multiplier = 2.0
"""
STEPS = 10  # of an epoch: 40 patients, 4 in a batch


def released(folder: Path, unit: str | None) -> Path:
    """Train one round under a policy and release it; the state folder."""
    batch = "batch = 4\n" if unit in ("patient", "record") else ""
    promise = "" if unit is None else PROMISE.format(unit=unit) + batch
    path = folder / "policy.toml"
    path.write_text(POLICY.format(promise=promise))
    path.chmod(0o600)
    guard = sentinel.Guard(path, folder / "state")
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.randn(40, 1)), batch_size=4)
    if batch:
        private = guard.private(model, optimizer, loader, patients=list(range(40)))
        model, optimizer, loader = private
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with guard.round(1, start, model) as rnd:
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    rnd.release()
    return folder / "state"


@pytest.mark.parametrize(
    ("unit", "steps"), [(None, None), ("site", None), ("patient", STEPS), ("record", STEPS)]
)
def test_the_log_says_unit_and_steps_as_the_ledger_does(tmp_path, unit, steps) -> None:
    state = released(tmp_path, unit)
    (decided,) = (
        entry.record
        for entry in read_log(state / "audit")
        if isinstance(entry.record, UpdateDecided)
    )
    assert (decided.promised, decided.unit, decided.steps) == (unit is not None, unit, steps)
    ledger = Ledger(state / "ledger.sqlite")
    (row,) = ledger.rows()
    assert (row.round, row.seq) == (decided.round, decided.ledger_seq)
    if not isinstance(row.event, UnboundedEvent):
        assert (row.event.unit, getattr(row.event, "steps", None)) == (unit, steps)
    verify_log(state / "audit", ledger.hash_at, [(row.log_head.seq, row.log_head.hash)])


def test_the_log_on_the_screen_says_the_level_and_what_was_promised(tmp_path) -> None:
    state = released(tmp_path, "patient")
    shown = CliRunner().invoke(app, ["audit", "show", "--state-dir", str(state)])
    lines = shown.output.splitlines()
    assert all(line.split()[2] == "L0" for line in lines)
    (decided,) = (line for line in lines if "update.decided" in line)
    assert f"unit=patient steps={STEPS}" in decided
