"""The steps as a training loop meets them, on real models, ledgers, logs and detectors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import sentinel
from sentinel.audit import read_log
from sentinel.errors import MisuseError, RoundRefused, Withheld
from sentinel.privacy import Promise
from sentinel.state import StateFolder
from sentinel.terms import Adjacency, Reason, Unit, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

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
    StateFolder(tmp_path / "site").releases.prune(rnd.key)
    with make_guard().round(1, start, model) as again:
        pass
    with pytest.raises(Withheld) as caught:
        again.release()
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_wrong_order_raises(make_guard) -> None:
    model = net()
    rnd = make_guard().round(1, state_of(model), model)
    with pytest.raises(MisuseError, match="not entered yet"):
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
    with make_guard().round(1, start, model) as again:
        train(model)
    with pytest.raises(Withheld, match="the answer stands"):
        again.release()


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
        with pytest.raises(MisuseError, match="memory of the global state"):
            rnd.release(start)
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


def test_metrics_leave_only_where_the_policy_lists_them(make_guard) -> None:
    guard = make_guard(PLAIN.replace("[[rule]]", '[limits]\nmetrics = ["num-examples"]\n[[rule]]'))
    rnd = guard.round(1, state_of(net()))
    assert rnd.metrics({"num-examples": 12, "loss": 0.1}) == {"num-examples": 12}
    with pytest.raises(MisuseError, match="finite"):
        rnd.metrics({"num-examples": math.nan})
    promised = make_guard(
        SITE.replace("[[rule]]", '[limits]\nmetrics = ["num-examples"]\n[[rule]]')
    )
    assert promised.round(2, state_of(net())).metrics({"num-examples": 12}) == {}


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
