"""The steps as a training loop meets them, on real models, ledgers, logs and detectors."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import sentinel
from sentinel.audit import AuditLog, read_log
from sentinel.errors import MisuseError, RoundRefused, Withheld
from sentinel.privacy import Promise
from sentinel.state import StateFolder
from sentinel.terms import Adjacency, Reason, Unit, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLAIN = """
schema = 1
name = "plain"

[[rule]]
id = "baseline"
max_norm = 0.5
"""
NOISY = PLAIN + "noise_ratio = 1.0\n"
SITE = """
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 20.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 2.0
[[rule]]
id = "baseline"
"""


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))


def train(model: nn.Module, step: float = 1.0, rows: int = 64) -> None:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(rows, 6, generator=generator)
    target = (features.sum(1, keepdim=True) > 0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=step)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(features), target).backward()
        optimizer.step()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def distance(left: dict, right: dict) -> float:
    return math.sqrt(sum(float((left[n].double() - right[n].double()).pow(2).sum()) for n in left))


@pytest.fixture
def make_guard(tmp_path: Path) -> Callable[..., sentinel.Guard]:
    def make(text: str = PLAIN, **options: object) -> sentinel.Guard:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o600)
        return sentinel.Guard(path, tmp_path / "site", **options)

    return make


def records(tmp_path: Path) -> list[str]:
    return [entry.record.type for entry in read_log(tmp_path / "site" / "audit")]


def test_an_update_is_clipped_and_released_with_the_global_structure(make_guard, tmp_path) -> None:
    model = net()
    start = state_of(model)
    with make_guard().round(1, start, model) as rnd:
        train(model, step=20.0)
    raw = distance(state_of(model), start)
    out = rnd.release()
    assert raw > 0.5
    assert 0.45 < distance(out, start) <= 0.5
    assert [(n, v.shape, v.dtype) for n, v in out.items()] == [
        (n, v.shape, v.dtype) for n, v in start.items()
    ]
    assert records(tmp_path) == [
        "guard.started",
        "round.opened",
        "update.decided",
        "update.released",
    ]


def test_the_update_is_not_zero_where_the_global_state_is_the_models_own(make_guard) -> None:
    model = net()
    with make_guard().round(1, model.state_dict(), model) as rnd:
        start = state_of(model)
        train(model)
        out = rnd.release()
    assert distance(out, start) > 0.01


def test_the_global_state_is_loaded_on_entry(make_guard) -> None:
    model = net(1)
    with make_guard().round(1, state_of(net(2)), model):
        assert distance(state_of(model), state_of(net(2))) == 0.0


def test_noise_has_the_norm_that_the_policy_says(make_guard) -> None:
    model = net()
    start = state_of(model)
    guard = make_guard(NOISY)
    norms = []
    for number in range(5):
        with guard.round(number, start, model) as rnd:
            pass  # no training: all that leaves is noise
        norms.append(distance(rnd.release(), start))
    assert sum(norms) / 5 == pytest.approx(0.5, rel=0.1)
    assert len({round(norm, 9) for norm in norms}) == 5


@pytest.mark.parametrize("width", [32, 2048])
def test_noise_on_each_value_is_as_large_in_a_wide_model(make_guard, width) -> None:
    """What leaves beside a clipped update has noise_multiplier x max_norm, at any width."""
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))
    start = state_of(model)
    guard = make_guard(PLAIN + "noise_ratio = 1.0\nnoise_multiplier = 1.5\n")
    left = []
    for number in range(8):
        with guard.round(number, start, model) as rnd:
            train(model, step=20.0)
        out = rnd.release()
        left += [(out[name] - start[name]).flatten() for name in start]
    assert float(torch.cat(left).double().std()) == pytest.approx(1.5 * 0.5, rel=0.1)


def test_a_released_round_gives_the_stored_bytes_whatever_the_local_state_is(
    make_guard, tmp_path
) -> None:
    model = net()
    start = state_of(model)
    with make_guard(NOISY).round(3, start, model) as rnd:
        train(model)
    first = rnd.release()
    assert not rnd.replayed
    assert distance(rnd.release(), first) == 0.0
    with make_guard(NOISY).round(3, start, model) as again:
        train(model, step=9.0)
    assert distance(again.release(), first) == 0.0
    assert again.replayed
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    assert records(tmp_path).count("update.replayed") == 2


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[3])
import sentinel
from sentinel.releases import Releases
guard = sentinel.Guard(sys.argv[1], sys.argv[2])
place = sys.argv[4]
if place == "stored":
    Releases.end = lambda *_: os.kill(os.getpid(), 9)
state = {"w.weight": torch.zeros(4, 3), "w.bias": torch.zeros(4)}
with guard.round(1, state) as rnd:
    pass
out = rnd.release({name: value + 0.01 for name, value in state.items()})
print(out["w.weight"].flatten().tolist(), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("place", ["stored", "released"])
def test_a_round_survives_kill_9_and_is_released_once(make_guard, tmp_path, place) -> None:
    make_guard(NOISY)
    command = [sys.executable, "-c", KILLED, tmp_path / "policy.toml", tmp_path / "site"]
    done = subprocess.run(  # noqa: S603 - our own code
        [*command, Path(__file__).parent.parent, place], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    state = {"w.weight": torch.zeros(4, 3), "w.bias": torch.zeros(4)}
    with make_guard(NOISY).round(1, state) as rnd:
        pass
    out = rnd.release({name: value - 5 for name, value in state.items()})
    assert rnd.replayed is (place == "released")
    if place == "released":
        assert out["w.weight"].flatten().tolist() == json.loads(done.stdout)
    assert StateFolder(tmp_path / "site").ledger.head().seq == (1 if place == "released" else 2)


def test_another_global_model_under_a_released_number_is_refused(make_guard) -> None:
    model = net()
    with make_guard().round(1, state_of(model), model) as rnd:
        train(model)
    rnd.release()
    with pytest.raises(Withheld) as caught, make_guard().round(1, state_of(net(5)), model):
        pytest.fail("the block may not be entered")
    assert caught.value.reason is Reason.OTHER_GLOBAL_MODEL
    with make_guard(run="next").round(1, state_of(net(5)), model) as rnd:
        pass
    rnd.release()


def test_after_pruning_a_tombstone_refuses(make_guard, tmp_path) -> None:
    model = net()
    start = state_of(model)
    with make_guard().round(1, start, model) as rnd:
        train(model)
    rnd.release()
    StateFolder(tmp_path / "site").releases.keep_newest(0)
    with pytest.raises(Withheld) as caught:
        make_guard().round(1, start, model).__enter__()
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_wrong_order_raises(make_guard) -> None:
    model = net()
    rnd = make_guard().round(1, state_of(model), model)
    with pytest.raises(
        MisuseError,
        match=r"^The round is not entered yet; expected: open or trained or released\.$",
    ):
        rnd.release()
    with rnd, pytest.raises(MisuseError, match="open"):
        rnd.__enter__()
    rnd.release()
    with pytest.raises(MisuseError, match="released"):
        rnd.__enter__()


def test_an_exception_in_the_block_aborts_the_round(make_guard, tmp_path) -> None:
    model = net()
    rnd = make_guard().round(1, state_of(model), model)
    with pytest.raises(ZeroDivisionError), rnd:
        raise ZeroDivisionError
    with pytest.raises(MisuseError, match="aborted"):
        rnd.release()
    assert records(tmp_path)[-1] == "round.aborted"


def test_a_nan_is_withheld_charged_and_final(make_guard, tmp_path, capsys) -> None:
    model = net()
    start = state_of(model)
    with make_guard().round(1, start, model) as rnd, torch.no_grad():
        model[0].weight[3, 2] = math.nan
    with pytest.raises(Withheld, match=r"'0\.weight'") as caught:
        rnd.release()
    assert caught.value.reason is Reason.NOT_FINITE
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    assert "reason=not-finite" in capsys.readouterr().err
    with pytest.raises(Withheld, match="the answer stands"):
        make_guard().round(1, start, model).__enter__()


def test_too_few_patients_and_a_missing_number_are_withheld_before_training(make_guard) -> None:
    guard = make_guard(PLAIN.replace("[[rule]]", "[limits]\nmin_patients = 32\n[[rule]]"))
    model = net()
    for patients, reason in [(31, Reason.TOO_FEW_PATIENTS), (None, Reason.PATIENTS_UNKNOWN)]:
        with pytest.raises(Withheld) as caught:
            guard.round(1, state_of(model), model, patients=patients).__enter__()
        assert caught.value.reason is reason
    with guard.round(1, state_of(model), model, patients=32) as rnd:
        pass
    rnd.release()


def test_the_rate_limit_and_an_expired_policy_withhold(make_guard) -> None:
    limited = make_guard(PLAIN.replace("[[rule]]", "[limits]\nrounds_per_day = 2\n[[rule]]"))
    model = net()
    for number in range(2):
        with limited.round(number, state_of(model), model) as rnd:
            pass
        rnd.release()
    with pytest.raises(Withheld) as caught:
        limited.round(2, state_of(model), model).__enter__()
    assert caught.value.reason is Reason.RATE_LIMITED
    expired = make_guard(PLAIN.replace("schema = 1", "schema = 1\nexpires = 2020-01-01"))
    with pytest.raises(Withheld) as caught:
        expired.round(3, state_of(model), model).__enter__()
    assert caught.value.reason is Reason.POLICY_EXPIRED


def test_a_site_promise_is_charged_stops_at_its_budget_and_is_noised(make_guard, tmp_path) -> None:
    guard = make_guard(SITE)
    model = net()
    start = state_of(model)
    outs: list[dict[str, torch.Tensor]] = []

    def release_next() -> None:
        with guard.round(len(outs), start, model) as rnd:
            train(model, step=20.0)
        outs.append(rnd.release())

    def release_until_stopped() -> None:
        for _ in range(1000):
            release_next()

    with pytest.raises(Withheld) as caught:
        release_until_stopped()
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    promise = Promise(Unit.SITE, Adjacency.REPLACE, 20.0, 1e-5)
    state = StateFolder(tmp_path / "site")
    assert len(outs) == state.ledger.head().seq > 10
    assert 15 < state.ledger.spent("default", promise).epsilon <= 20.0
    coordinates = sum(value.numel() for value in start.values())
    assert distance(outs[-1], start) == pytest.approx(1.0 * math.sqrt(coordinates), rel=0.3)
    decided = [e.record for e in read_log(state.audit) if e.record.type == "update.decided"]
    assert all(record.data_bits == 0 and record.clipped is None for record in decided)


def test_a_patient_promise_without_private_training_is_withheld(make_guard) -> None:
    text = SITE.replace('"site"\nepsilon', '"patient"\npatients = 500\nepsilon')
    text = text.replace("delta = 1e-5", "delta = 1e-4")
    model = net()
    with pytest.raises(Withheld) as caught:
        make_guard(text).round(1, state_of(model), model).__enter__()
    assert caught.value.reason is Reason.PROMISE_NOT_KEPT


def test_a_crafted_model_is_refused_recorded_and_alerted_and_the_run_goes_on(
    make_guard, tmp_path, capsys
) -> None:
    guard = make_guard(
        PLAIN + '[[rule]]\nid = "crafted"\nwhen = { suspicion = 0.5 }\naction = "refuse-round"\n'
    )
    model = nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, 1))
    honest = state_of(model)
    crafted = {**honest, "0.weight": torch.ones(256, 13) / 13}
    crafted["0.bias"] = -torch.linspace(-2, 2, 256)
    with pytest.raises(RoundRefused) as caught, guard.round(1, crafted, model):
        pytest.fail("the block may not be entered")
    assert caught.value.reason is Reason.CRAFTED_MODEL
    assert "reason=crafted-model" in capsys.readouterr().err
    refused = list(read_log(tmp_path / "site" / "audit"))[-1].record
    assert refused.type == "round.refused"
    assert refused.verdict is Verdict.BINNING
    with guard.round(2, honest, model) as rnd:
        pass
    rnd.release()


def test_a_model_full_of_nan_is_refused_as_unhealthy(make_guard) -> None:
    guard = make_guard(
        PLAIN + '[[rule]]\nid = "broken"\nwhen = { unhealthy = true }\naction = "refuse-round"\n'
    )
    model = net()
    broken = {name: torch.full_like(value, math.nan) for name, value in state_of(model).items()}
    with pytest.raises(RoundRefused) as caught:
        guard.round(1, broken, model).__enter__()
    assert caught.value.reason is Reason.UNHEALTHY_MODEL


def test_without_a_model_the_local_state_is_handed_over(make_guard) -> None:
    start = state_of(net())
    guard = make_guard()
    with guard.round(1, start) as rnd:
        with pytest.raises(MisuseError, match="no model"):
            rnd.release()
        out = rnd.release({name: value + 1 for name, value in start.items()}, kind="delta")
    assert distance(out, {n: torch.zeros_like(v) for n, v in out.items()}) <= 0.5


def test_a_released_round_is_not_given_in_another_form(make_guard) -> None:
    model = net()
    with make_guard().round(1, state_of(model), model) as rnd:
        train(model)
    rnd.release(kind="delta")
    with pytest.raises(MisuseError, match="released as 'delta'"):
        rnd.release()


def test_a_protected_function_trains_in_place_and_numbers_its_rounds(make_guard, tmp_path) -> None:
    guard = make_guard(NOISY)
    start = state_of(net())

    @guard.protect
    def step(state: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
        """Train in place."""
        for value in state.values():
            value.add_(by)
        return state

    first = step(start, 0.1)
    assert distance(step(start, 0.3), first) == 0.0  # the same global model: the same round
    second = step({name: value + 1 for name, value in start.items()}, 0.1)
    assert distance(second, first) > 0.5
    assert step.__doc__ == "Train in place."
    step(start, 0.1, round_number=77)
    numbers = [
        entry.record.number
        for entry in read_log(tmp_path / "site" / "audit")
        if entry.record.type == "round.opened"
    ]
    assert numbers == [0, 0, 1, 77]


def test_metrics_leave_only_where_the_policy_lists_them_and_after_a_release(make_guard) -> None:
    limits = '[limits]\nmetrics = ["num-examples"]\n[[rule]]'
    start = state_of(net())

    def released(guard: sentinel.Guard, number: int) -> sentinel.Round:
        rnd = guard.round(number, start)
        with pytest.raises(MisuseError, match="not entered yet"):
            rnd.metrics({"num-examples": 12})
        with rnd:
            pass
        rnd.release({name: value + 0.01 for name, value in start.items()})
        return rnd

    rnd = released(make_guard(PLAIN.replace("[[rule]]", limits)), 1)
    assert rnd.metrics({"num-examples": 12, "loss": 0.1}) == {"num-examples": 12}
    assert rnd.metrics({"num-examples": torch.tensor(3)}) == {"num-examples": 3.0}
    for bad in (math.nan, 10**400, "12", True):
        with pytest.raises(MisuseError, match="finite"):
            rnd.metrics({"num-examples": bad})
    assert (
        released(make_guard(SITE.replace("[[rule]]", limits)), 2).metrics({"num-examples": 12})
        == {}
    )


@pytest.mark.parametrize("number", [-1, 1.0, True, "1", 2**60])
def test_a_round_number_that_is_none_is_misuse(make_guard, number) -> None:
    with pytest.raises(MisuseError, match="number"):
        make_guard().round(number, state_of(net()))


def test_another_dataset_than_the_policys_is_misuse(make_guard) -> None:
    with pytest.raises(MisuseError, match="only repeat"):
        make_guard(dataset="elsewhere")
    make_guard(dataset="default")


def test_a_ledger_put_back_from_a_backup_stops_everything(make_guard, tmp_path) -> None:
    model = net()
    guard = make_guard()
    with guard.round(1, state_of(model), model) as rnd:
        pass
    rnd.release()
    backup = {p.name: p.read_bytes() for p in (tmp_path / "site").glob("ledger.sqlite*")}
    with guard.round(2, state_of(model), model) as rnd:
        pass
    rnd.release()
    for path in (tmp_path / "site").glob("ledger.sqlite*"):
        path.unlink()
    for name, content in backup.items():
        (tmp_path / "site" / name).write_bytes(content)
    for attempt in (make_guard, lambda: guard.round(3, state_of(model), model).__enter__()):
        with pytest.raises(Withheld) as caught:
            attempt()
        assert caught.value.reason is Reason.LEDGER_BEHIND_LOG


def test_a_log_that_was_cut_short_stops_everything(make_guard, tmp_path) -> None:
    model = net()
    with make_guard().round(1, state_of(model), model) as rnd:
        pass
    rnd.release()
    log = tmp_path / "site" / "audit" / "audit.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(Withheld) as caught:
        make_guard()
    assert caught.value.reason is Reason.LOG_DAMAGED


def test_a_full_disk_withholds_and_the_round_can_go_on_later(make_guard, monkeypatch) -> None:
    model = net()
    start = state_of(model)
    guard = make_guard()
    with guard.round(1, start, model) as rnd:
        train(model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentinel.releases.replace_file", full)
    with pytest.raises(Withheld) as caught:
        rnd.release()
    assert caught.value.reason is Reason.STORAGE_FAILED
    monkeypatch.undo()
    with guard.round(1, start, model) as again:
        train(model)
    again.release()
    assert not again.replayed


def test_an_unforeseen_error_withholds_without_its_text(make_guard, monkeypatch) -> None:
    model = net()
    with make_guard().round(1, state_of(model), model) as rnd:
        train(model)

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("patient 4711 has value 0.123")

    monkeypatch.setattr("sentinel.release.decide", breaks)
    with pytest.raises(Withheld) as caught:
        rnd.release()
    assert caught.value.reason is Reason.INTERNAL_ERROR
    assert "4711" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_several_guards_work_on_one_folder(make_guard, tmp_path) -> None:
    model = net()
    start = state_of(model)
    one, two = make_guard(federation="a"), make_guard(federation="b")
    for number in range(3):
        for guard in (one, two):
            with guard.round(number, start, model) as rnd:
                pass
            rnd.release()
    state = StateFolder(tmp_path / "site")
    assert state.ledger.head().seq == 6
    assert records(tmp_path).count("update.released") == 6


def test_skipping_inspection_is_named_as_a_weakened_control(make_guard, tmp_path, capsys) -> None:
    make_guard(unsafe_skip_inspection=True)
    started = next(iter(read_log(tmp_path / "site" / "audit"))).record
    assert "inspection-off" in started.weaknesses
    assert "weakness=inspection-off" in capsys.readouterr().err


def test_connecting_to_an_agent_says_that_there_is_none() -> None:
    with pytest.raises(MisuseError, match="embedded mode"):
        sentinel.connect("/run/sentinel/agent.sock")


def test_everything_on_disk_belongs_to_its_owner_alone(make_guard, tmp_path) -> None:
    model = net()
    with make_guard().round(1, state_of(model), model) as rnd:
        train(model)
    rnd.release()
    found = list((tmp_path / "site").rglob("*"))
    assert len(found) > 8
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)


def test_batch_norm_statistics_and_counters_stay(make_guard) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    start = state_of(model)
    with make_guard().round(1, start, model) as rnd:
        train(model)
    out = rnd.release()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(out[name], start[name])
        assert not torch.equal(model.state_dict()[name], start[name])
    assert not torch.equal(out["1.weight"], start["1.weight"])


def test_a_guarded_round_leaves_the_global_generators_as_they_were(make_guard) -> None:
    """The user's own randomness neither steers the noise nor is changed by it."""
    guard = make_guard(NOISY)
    model = net()
    start = state_of(model)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    outs = []
    for number in range(2):
        torch.manual_seed(3)
        with guard.round(number, start, model) as rnd:
            pass
        outs.append(rnd.release())
        assert torch.equal(torch.get_rng_state(), before)
    assert distance(*outs) > 0.1


@pytest.mark.parametrize("text", [PLAIN, SITE])
@pytest.mark.parametrize("way", ["in place", "assign", "withheld head"])
def test_a_global_state_that_training_changed_releases_nothing(
    make_guard, tmp_path, text, way
) -> None:
    """Otherwise the difference would be measured from the trained weights, and they would leave."""
    head = '[[rule]]\nid = "head"\nmatch = ["2.**"]\naction = "withhold"\n'
    guard = make_guard(text + (head if way == "withheld head" else ""))
    model = net()
    received = state_of(model)
    if way == "in place":
        with guard.round(1, received) as rnd:
            for value in received.values():
                value.add_(5.0)
        local = {name: value.clone() for name, value in received.items()}
    else:
        with guard.round(1, received, model) as rnd:
            if way == "assign":
                model.load_state_dict(received, assign=True)
            else:
                received["2.weight"].mul_(0.5)
            train(model, step=5.0)
        local = None
    with pytest.raises(Withheld) as caught:
        rnd.release(local)
    assert caught.value.reason is Reason.GLOBAL_MODEL_CHANGED
    assert "update.released" not in records(tmp_path)


def test_guards_that_race_for_the_last_round_of_the_day_release_it_once(make_guard) -> None:
    text = PLAIN.replace("[[rule]]", "[limits]\nrounds_per_day = 1\n[[rule]]")
    start = state_of(net())
    rounds = [make_guard(text, run=f"run-{number}").round(1, start) for number in range(3)]
    for rnd in rounds:
        rnd.__enter__()
    outcomes = []
    for rnd in rounds:
        try:
            rnd.release({name: value + 0.01 for name, value in start.items()})
            outcomes.append("released")
        except Withheld as error:
            outcomes.append(str(error.reason))
    assert sorted(outcomes) == ["rate-limited", "rate-limited", "released"]


def test_an_update_too_large_to_measure_is_charged_and_final_under_a_promise(
    make_guard, tmp_path
) -> None:
    start = {name: torch.zeros(3, dtype=torch.float64) for name in "ab"}
    with make_guard(SITE).round(1, start) as rnd:
        pass
    with pytest.raises(Withheld) as caught:
        rnd.release({name: torch.full((3,), 7e153, dtype=torch.float64) for name in "ab"})
    assert caught.value.reason is Reason.NOT_FINITE
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    with pytest.raises(Withheld, match="the answer stands"):
        make_guard(SITE).round(1, start).__enter__()


def test_an_unforeseen_error_before_the_charge_is_charged_and_closes_the_round(
    make_guard, tmp_path, monkeypatch
) -> None:
    start = state_of(net())
    with make_guard(SITE).round(1, start) as rnd:
        pass

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("7.25")

    monkeypatch.setattr("sentinel.mechanism.gaussian.treat_all", breaks)
    with pytest.raises(Withheld) as caught:
        rnd.release({name: value + 1 for name, value in start.items()})
    monkeypatch.undo()
    assert caught.value.reason is Reason.INTERNAL_ERROR
    assert "7.25" not in str(caught.value)
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    with pytest.raises(Withheld):
        make_guard(SITE).round(1, start).__enter__()


@pytest.mark.parametrize("removed", ["ledger and log", "releases"])
def test_state_that_was_removed_in_part_releases_nothing_again(
    make_guard, tmp_path, removed
) -> None:
    start = state_of(net())
    with make_guard(NOISY).round(1, start) as rnd:
        pass
    rnd.release({name: value + 0.01 for name, value in start.items()})
    site = tmp_path / "site"
    if removed == "releases":
        shutil.rmtree(site / "releases")
        with make_guard(NOISY).round(1, start) as again:
            pass
        with pytest.raises(Withheld) as caught:
            again.release({name: value + 0.01 for name, value in start.items()})
        assert caught.value.reason is Reason.ROUND_CLOSED
        return
    shutil.rmtree(site / "audit")
    for path in site.glob("ledger*"):
        path.unlink()
    with pytest.raises(Withheld) as caught:
        make_guard(NOISY)
    assert caught.value.reason is Reason.LEDGER_BEHIND_LOG


def test_a_log_rewritten_whole_is_seen_by_the_guard(make_guard, tmp_path) -> None:
    start = state_of(net())
    guard = make_guard()
    for number in range(2):
        with guard.round(number, start) as rnd:
            pass
        rnd.release({name: value + 0.01 for name, value in start.items()})
    folder = tmp_path / "site" / "audit"
    entries = [entry.record for entry in read_log(folder)]
    (folder / "audit.jsonl").unlink()
    log = AuditLog(folder)
    for record in entries:
        log.append(lambda record=record: record.model_copy(update={"at": record.at + 1}))
    with pytest.raises(Withheld) as caught:
        make_guard()
    assert caught.value.reason is Reason.LOG_DAMAGED


def test_an_expired_policy_stays_expired_when_the_clock_is_put_back(
    make_guard, monkeypatch
) -> None:
    tomorrow = (dt.datetime.now(dt.UTC) + dt.timedelta(days=1)).date()
    make_guard()  # writes a record of today
    text = PLAIN.replace("schema = 1", f"schema = 1\nexpires = {tomorrow - dt.timedelta(days=2)}")
    guard = make_guard(text)
    house = guard._door.house
    early = replace(house, clock=lambda: dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    monkeypatch.setattr(guard._door, "house", early)
    with pytest.raises(Withheld) as caught:
        guard.round(1, state_of(net())).__enter__()
    assert caught.value.reason is Reason.POLICY_EXPIRED


def test_a_refusal_at_the_gate_is_recorded_and_alerted(make_guard, tmp_path, capsys) -> None:
    guard = make_guard(PLAIN.replace("[[rule]]", "[limits]\nmin_patients = 9\n[[rule]]"))
    with pytest.raises(Withheld):
        guard.round(5, state_of(net()), patients=3).__enter__()
    refused = list(read_log(tmp_path / "site" / "audit"))[-1].record
    assert (refused.type, refused.number, refused.verdict) == ("round.refused", 5, None)
    assert refused.reason is Reason.TOO_FEW_PATIENTS
    assert "reason=too-few-patients round=5" in capsys.readouterr().err


def test_a_guard_that_cannot_start_says_so_in_an_alert(make_guard, tmp_path, capsys) -> None:
    (tmp_path / "site").write_text("a file in the place of the folder")
    with pytest.raises(Withheld) as caught:
        make_guard()
    assert caught.value.reason is Reason.STATE_UNSAFE
    assert 'event="guard not started" reason=state-unsafe' in capsys.readouterr().err


def test_a_buffer_that_modules_share_stays_under_each_of_its_names(make_guard) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("stat", torch.zeros(3))
            self.child = nn.Module()
            self.child.register_buffer("stat", self.stat)

    model = Shares()
    start = state_of(model)
    with make_guard().round(1, start, model) as rnd, torch.no_grad():
        model.stat.add_(1.0)
        model.layer.weight.add_(0.01)
    out = rnd.release()
    assert torch.equal(out["stat"], start["stat"])
    assert torch.equal(out["child.stat"], start["child.stat"])
    assert not torch.equal(out["layer.weight"], start["layer.weight"])


def test_a_model_that_does_not_fit_is_refused_by_name_and_left_as_it_is(make_guard) -> None:
    model = net()
    before = state_of(model)
    other = {**before, "0.weight": torch.zeros(7, 6)}
    with pytest.raises(Withheld, match=r"'0\.weight'") as caught:
        make_guard().round(1, other, model).__enter__()
    assert caught.value.reason is Reason.STRUCTURE_MISMATCH
    assert distance(state_of(model), before) == 0.0
    whole_numbers = {**before, "0.bias": torch.zeros(32, dtype=torch.int64)}
    with pytest.raises(Withheld, match="kind of dtype"):
        make_guard().round(2, whole_numbers, model).__enter__()


def test_a_log_that_cannot_be_written_does_not_hide_the_error_of_the_block(
    make_guard, monkeypatch
) -> None:
    rnd = make_guard().round(1, state_of(net()))
    rnd.__enter__()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentinel.audit.log.os.write", full)
    with pytest.raises(ZeroDivisionError), rnd_block(rnd):
        raise ZeroDivisionError


@contextlib.contextmanager
def rnd_block(rnd: sentinel.Round) -> Iterator[None]:
    """The rest of a `with` block that has been entered already."""
    try:
        yield
    except BaseException as error:
        rnd.__exit__(type(error), error, error.__traceback__)
        raise


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": None},
        {"policy": 3},
        {"policy": {}},
        {"state_dir": 3},
        {"federation": ""},
        {"run": "a\nb"},
    ],
)
def test_arguments_that_cannot_be_right_are_misuse(tmp_path, wrong) -> None:
    with pytest.raises(MisuseError):
        sentinel.Guard(**{"policy": "baseline", "state_dir": tmp_path / "s", **wrong})


def test_a_model_that_is_none_is_misuse_and_a_number_of_numpy_is_a_number(make_guard) -> None:
    guard = make_guard()
    with pytest.raises(MisuseError, match=r"torch\.nn\.Module"):
        guard.round(1, state_of(net()), nn.Linear)
    assert guard.round(np.int64(4), state_of(net()), patients=np.int32(9)).key.number == 4


def test_releases_are_pruned_as_the_policy_says(make_guard, tmp_path) -> None:
    guard = make_guard(PLAIN.replace("[[rule]]", "[limits]\nkeep_releases = 2\n[[rule]]"))
    start = state_of(net())
    for number in range(4):
        with guard.round(number, start) as rnd:
            pass
        rnd.release({name: value + 0.01 for name, value in start.items()})
    assert len(list((tmp_path / "site" / "releases").glob("*.safetensors"))) == 2
    with pytest.raises(Withheld) as caught:
        guard.round(0, start).__enter__()
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_a_tied_parameter_that_a_rule_withholds_is_not_called_released(make_guard) -> None:
    rule = (
        '[[rule]]\nid = "tight"\nwhen = { sensitivity = 0.0 }\nmatch = ["a"]\naction = "withhold"\n'
    )
    start = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with make_guard(PLAIN + rule).round(1, start) as rnd:
        pass
    shared = torch.full((3,), 0.01)
    with pytest.raises(Withheld) as caught:
        rnd.release({"a": shared, "b": shared})
    assert caught.value.reason is Reason.NOTHING_LET_OUT


SENSITIVE = '[[rule]]\nid = "too-leaky"\nwhen = { sensitivity = 0.9 }\naction = "withhold-update"\n'


def test_the_update_of_a_single_record_is_withheld_as_too_sensitive(make_guard, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, 1))
    start = state_of(model)
    guard = make_guard(PLAIN + SENSITIVE)
    row = torch.randn(1, 13, generator=torch.Generator().manual_seed(0))
    with guard.round(1, start, model) as rnd:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        nn.functional.binary_cross_entropy_with_logits(model(row), torch.ones(1, 1)).backward()
        optimizer.step()
    with pytest.raises(Withheld, match=r"rule too-leaky; sensitivity score") as caught:
        rnd.release()
    assert caught.value.reason is Reason.TOO_SENSITIVE
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    with pytest.raises(Withheld, match="the answer stands"):
        guard.round(1, start, model).__enter__()


def test_a_rule_that_withholds_for_another_reason_than_the_score_says_so(make_guard) -> None:
    text = (
        PLAIN + '[[rule]]\nid = "closed"\naction = "withhold-update"\nwhen = { suspicion = 0.0 }\n'
    )
    start = state_of(net())
    with make_guard(text).round(1, start) as rnd:
        pass
    with pytest.raises(Withheld, match="rule closed") as caught:
        rnd.release({name: value + 0.01 for name, value in start.items()})
    assert caught.value.reason is Reason.WITHHELD_BY_RULE


def test_a_policy_that_lets_nothing_out_releases_nothing(make_guard) -> None:
    text = 'schema = 1\nname = "x"\n[[rule]]\nid = "all"\naction = "withhold"\n'
    start = state_of(net())
    with make_guard(text).round(1, start) as rnd:
        pass
    with pytest.raises(Withheld) as caught:
        rnd.release({name: value + 0.01 for name, value in start.items()})
    assert caught.value.reason is Reason.NOTHING_LET_OUT


def test_a_glob_that_matches_nothing_in_the_model_is_an_error_when_a_round_opens(
    make_guard,
) -> None:
    text = PLAIN + '[[rule]]\nid = "typo"\nmatch = ["clasifier.**"]\naction = "withhold"\n'
    with pytest.raises(sentinel.PolicyError, match=r"'typo'.*'clasifier\.\*\*'"):
        make_guard(text).round(1, state_of(net())).__enter__()


def test_a_memory_of_earlier_models_that_cannot_be_read_stops_the_round(
    make_guard, tmp_path
) -> None:
    start = state_of(net())
    with make_guard().round(1, start):
        pass
    next((tmp_path / "site" / "history").glob("*.history.json")).write_bytes(b"\xff\x00junk")
    with pytest.raises(Withheld) as caught:
        make_guard().round(2, start).__enter__()
    assert caught.value.reason is Reason.STATE_UNSAFE


def test_an_unforeseen_error_at_the_door_refuses_the_round_without_its_text(
    make_guard, tmp_path, monkeypatch, capsys
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("value 0.123")

    monkeypatch.setattr("sentinel.detection.inspect_global_model", breaks)
    with pytest.raises(Withheld) as caught:
        make_guard().round(1, state_of(net())).__enter__()
    assert caught.value.reason is Reason.INTERNAL_ERROR
    assert "0.123" not in str(caught.value) + capsys.readouterr().err
    assert records(tmp_path)[-1] == "round.refused"


def test_an_answer_that_cannot_be_kept_is_not_told(make_guard, monkeypatch) -> None:
    """A retry with another local state would be a second answer about the same patients."""
    start = state_of(net())
    with make_guard(PLAIN + SENSITIVE.replace("0.9", "0.0")).round(1, start) as rnd:
        pass

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentinel.releases.Releases.end", full)
    with pytest.raises(Withheld) as caught:
        rnd.release({name: value + 0.01 for name, value in start.items()})
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert "too-leaky" not in str(caught.value)


STRICT = """
[[rule]]
id = "leaky"
when = { sensitivity = 0.99 }
action = "withhold-update"
"""


def two_records(model: nn.Module) -> torch.Tensor:
    """Train on two records, which is no less revealing than on one, but seldom looks so."""
    records = torch.randn(2, 6, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.functional.binary_cross_entropy_with_logits(model(records), torch.ones(2, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return records


def test_a_probe_that_reads_every_record_withholds_the_update(
    make_guard: Callable[..., sentinel.Guard],
) -> None:
    guard, model = make_guard(PLAIN + STRICT), net()
    base = state_of(model)
    with guard.round(0, base, model) as unprobed:
        two_records(model)
    unprobed.release()
    with guard.round(1, base, model) as opened:
        opened.probe(two_records(model))
    with pytest.raises(Withheld) as error:
        opened.release()
    assert error.value.reason is Reason.TOO_SENSITIVE


def test_a_probe_of_what_is_not_in_the_update_changes_no_score(
    make_guard: Callable[..., sentinel.Guard],
) -> None:
    guard, model = make_guard(), net()
    base = state_of(model)
    with guard.round(0, base, model) as plain:
        train(model)
    plain.release()
    with guard.round(1, base, model) as probed:
        train(model)
        probed.probe(torch.randn(32, 6, generator=torch.Generator().manual_seed(10)))
    probed.release()
    assert probed.decided.evidence.sensitivity == pytest.approx(
        plain.decided.evidence.sensitivity, abs=0.1
    )
    assert probed.decided.score.sharpness == "probed"


def test_under_a_promise_no_record_is_looked_at(
    make_guard: Callable[..., sentinel.Guard],
) -> None:
    guard, model = make_guard(SITE), net()
    base = state_of(model)

    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: object, *_: object, **__: object) -> object:
            if getattr(function, "__name__", "") in {"__len__", "__get__"}:
                return super().__torch_function__(function, *_, **__)
            raise AssertionError("a record was read")

    with guard.round(0, base, model) as opened:
        train(model)
        with pytest.raises(MisuseError, match="promise"):
            opened.probe(torch.ones(2, 6).as_subclass(Untouchable))
    opened.release()
    assert opened.decided.score.sharpness != "probed"


def test_a_probe_has_its_time_and_needs_the_model(
    make_guard: Callable[..., sentinel.Guard],
) -> None:
    guard, model = make_guard(), net()
    base, records = state_of(model), torch.zeros(2, 6)
    opened = guard.round(0, base, model)
    with pytest.raises(MisuseError):
        opened.probe(records)
    with opened:
        train(model)
        for wrong in (torch.zeros(()), torch.zeros(0, 6), [1.0]):
            with pytest.raises(MisuseError, match="tensor of inputs"):
                opened.probe(wrong)
    opened.release()
    with pytest.raises(MisuseError):
        opened.probe(records)
    handed = guard.round(1, base)
    with handed, pytest.raises(MisuseError, match="needs the model"):
        handed.probe(records)


STAYS = """
[[rule]]
id = "first-stays"
match = ["0.**"]
action = "withhold"
"""


def test_a_probe_of_a_layer_that_stays_changes_no_score(
    make_guard: Callable[..., sentinel.Guard],
) -> None:
    guard, model = make_guard(PLAIN + STAYS), net()
    base = state_of(model)
    with guard.round(0, base, model) as opened:
        opened.probe(two_records(model))
    opened.release()
    assert opened.decided.score.sharpness != "probed"
