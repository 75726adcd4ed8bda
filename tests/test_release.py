"""What a release writes down, and edges of it and of its gate that no other test is about."""

from __future__ import annotations

import datetime as dt
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import sentinel
from sentinel.audit import UpdateDecided, read_log, verify_log
from sentinel.cli.main import app
from sentinel.errors import MisuseError, Withheld
from sentinel.gate import gate, require_open, require_sound
from sentinel.privacy import Ledger, UnboundedEvent
from sentinel.release import release
from sentinel.releases import Ending, Fate
from sentinel.state import StateFolder
from sentinel.terms import Reason

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
        ids = list(range(40)) if unit == "patient" else None
        private = guard.private(model, optimizer, loader, patients=ids)
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


# Edges of a release.

BASE = {"w": torch.zeros(4), "b": torch.zeros(2)}
MOVED = {name: value + 0.25 for name, value in BASE.items()}


def guard_of(folder: Path, *lines: str) -> sentinel.Guard:
    """A guard under the policy that has these lines above its rule."""
    path = folder / "policy.toml"
    path.write_text(POLICY.format(promise="\n".join(lines)))
    path.chmod(0o600)
    return sentinel.Guard(path, folder / "state", unsafe_skip_inspection=True)


def opened(guard: sentinel.Guard, base: dict[str, torch.Tensor] = BASE) -> tuple[Any, Any]:
    """The house of a guard, and a round that may be released."""
    with guard.round(1, base) as rnd:
        pass
    return guard._door.house, rnd._opened


def test_a_round_that_was_released_is_given_again_without_the_local_state(tmp_path) -> None:
    house, round_one = opened(guard_of(tmp_path))
    first = release(house, round_one, lambda: MOVED, "weights")
    for _ in range(2):
        again = release(house, round_one, lambda: pytest.fail("was asked for"), "weights")
        assert (first.replayed, again.replayed) == (False, True)
        assert all(torch.equal(again.state[name], value) for name, value in first.state.items())
    assert house.ledger.head().seq == 1


def test_what_another_round_or_form_would_need_is_not_asked_for_either(tmp_path) -> None:
    house, round_one = opened(guard_of(tmp_path))
    release(house, round_one, lambda: MOVED, "weights")
    with pytest.raises(MisuseError, match="'weights'"):
        release(house, round_one, lambda: pytest.fail("was asked for"), "delta")
    other = replace(round_one, global_model="0" * 64)
    with pytest.raises(Withheld) as caught:
        release(house, other, lambda: pytest.fail("was asked for"), "weights")
    assert caught.value.reason is Reason.OTHER_GLOBAL_MODEL
    house.releases.keep_newest(0)
    with pytest.raises(Withheld) as caught:
        release(house, round_one, lambda: pytest.fail("was asked for"), "weights")
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_a_global_state_that_changed_is_withheld_uncharged_and_the_round_may_go_on(
    tmp_path,
) -> None:
    base = {name: value.clone() for name, value in BASE.items()}
    house, round_one = opened(guard_of(tmp_path), base)
    base["w"][0] = 1.0
    with pytest.raises(Withheld) as caught:
        release(house, round_one, lambda: MOVED, "weights")
    assert caught.value.reason is Reason.GLOBAL_MODEL_CHANGED
    assert house.ledger.head().seq == 0
    base["w"][0] = 0.0
    assert not release(house, round_one, lambda: MOVED, "weights").replayed


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("base w", Reason.LOCAL_MODEL_CHANGED),
        ("local w", Reason.LOCAL_MODEL_CHANGED),
        ("base n", Reason.GLOBAL_MODEL_CHANGED),
    ],
)
def test_a_state_that_changes_during_the_release_is_charged_and_nothing_is_kept(
    tmp_path, place: str, reason: Reason
) -> None:
    """By a thread that trains on, say: here, once the update has been measured."""
    kinds = {"base": {**BASE, "n": torch.tensor(3)}, "local": {**MOVED, "n": torch.tensor(3)}}
    kinds = {kind: {n: v.clone() for n, v in state.items()} for kind, state in kinds.items()}
    house, round_one = opened(guard_of(tmp_path), kinds["base"])
    kind, name = place.split()

    def measure(deltas: Any) -> Any:
        score = round_one.measure(deltas)
        kinds[kind][name].add_(1)
        return score

    with pytest.raises(Withheld) as caught:
        release(house, replace(round_one, measure=measure), lambda: kinds["local"], "weights")
    assert caught.value.reason is reason
    assert house.ledger.head().seq == 1
    assert house.releases.ending(round_one.key) is None
    assert list((tmp_path / "state" / "releases").glob("*.safetensors")) == []


def test_an_update_of_which_nothing_may_leave_is_charged_and_the_answer_is_final(tmp_path) -> None:
    closed = '[[rule]]\nid = "closed"\naction = "withhold"'
    house, round_one = opened(guard_of(tmp_path, closed))
    for _ in range(2):
        with pytest.raises(Withheld) as caught:
            release(house, round_one, lambda: MOVED, "weights")
        assert caught.value.reason is Reason.NOTHING_LET_OUT
        assert house.ledger.head().seq == 1
    assert house.releases.ending(round_one.key).fate is Fate.WITHHELD


# Edges of the gate.


def test_a_policy_holds_to_the_end_of_its_last_day(tmp_path) -> None:
    house = guard_of(tmp_path)._door.house
    rules = house.rules.model_copy(update={"expires": dt.date(2100, 1, 1)})
    house = replace(house, policy=replace(house.policy, policy=rules))
    last = dt.datetime(2100, 1, 1, 23, 59, 59, tzinfo=dt.UTC)
    gate(replace(house, clock=lambda: last), None)
    with pytest.raises(Withheld) as caught:
        gate(replace(house, clock=lambda: last + dt.timedelta(seconds=1)), None)
    assert caught.value.reason is Reason.POLICY_EXPIRED


def test_patients_that_the_policy_states_count_whatever_the_caller_says(tmp_path) -> None:
    promise = PROMISE.format(unit="site")
    house = guard_of(tmp_path, promise, "[limits]", "min_patients = 40")._door.house
    for said in (None, 0, 41):
        gate(house, said)


@pytest.mark.parametrize("promise", ["", PROMISE.format(unit="site")], ids=["none", "site"])
def test_the_gate_charges_and_writes_nothing(tmp_path, promise: str) -> None:
    house = guard_of(tmp_path, promise, "[limits]", "rounds_per_day = 1")._door.house
    before = house.log.last()
    for _ in range(3):
        gate(house, 5)
    assert house.ledger.head().seq == 0
    assert house.log.last() == before


@pytest.mark.parametrize("fate", list(Fate))
def test_only_a_release_of_the_same_global_model_is_open(fate: Fate) -> None:
    reasons = [None, Reason.NOT_FINITE] if fate is Fate.WITHHELD else [None]
    for reason in reasons:
        ending = Ending(fate, "a" * 64, reason=reason)
        with pytest.raises(Withheld) as caught:
            require_open(ending, "b" * 64)
        assert caught.value.reason is Reason.OTHER_GLOBAL_MODEL
        if fate is Fate.RELEASED:
            require_open(ending, "a" * 64)
            continue
        with pytest.raises(Withheld) as caught:
            require_open(ending, "a" * 64)
        assert caught.value.reason is (reason or Reason.ROUND_CLOSED)


def test_a_folder_without_records_is_sound(tmp_path) -> None:
    require_sound(StateFolder(tmp_path / "new"))


def test_a_folder_that_is_put_back_whole_is_not_told_from_inside(tmp_path) -> None:
    """What the README says of it; `audit verify --since` tells."""
    guard = guard_of(tmp_path)
    house, round_one = opened(guard)
    shutil.copytree(tmp_path / "state", tmp_path / "backup")
    release(house, round_one, lambda: MOVED, "weights")
    shutil.rmtree(tmp_path / "state")
    shutil.copytree(tmp_path / "backup", tmp_path / "state")
    put_back = StateFolder(tmp_path / "state")
    require_sound(put_back)
    assert put_back.ledger.head().seq == 0
