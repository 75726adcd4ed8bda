"""Edges of a guard and its rounds that their docstrings name, and that no other test is about."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import sentinel
from sentinel.audit import read_log
from sentinel.bounds import auto_norms
from sentinel.errors import MisuseError, RoundRefused, Withheld
from sentinel.state import StateFolder
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    State = dict[str, torch.Tensor]

PLAIN = """
schema = 1
name = "plain"
[limits]
metrics = ["num-examples"]
[[rule]]
id = "baseline"
max_norm = 0.5
"""


@pytest.fixture
def make_guard(tmp_path: Path) -> Callable[..., sentinel.Guard]:
    def make(text: str = PLAIN, **options: Any) -> sentinel.Guard:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o600)
        options.setdefault("unsafe_skip_inspection", True)
        return sentinel.Guard(path, tmp_path / "site", **options)

    return make


def recorded(tmp_path: Path) -> list[str]:
    return [entry.record.type for entry in read_log(tmp_path / "site" / "audit")]


def odd_state() -> State:
    """A parameter of every kind that the docstring names."""
    tied = torch.ones(4, 3)
    return {
        "0d": torch.tensor(1.0),
        "bfloat16": torch.ones(3, 2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "float16": torch.ones(5, dtype=torch.float16),
        "float64": torch.ones(2, dtype=torch.float64),
        "head": tied,
        "running_mean": torch.zeros(3),
        "steps": torch.tensor(7),
        "tail": tied,
    }


def moved(state: State, by: float) -> State:
    """Every entry moved; tied ones stay tied."""
    found: dict[int, torch.Tensor] = {}
    for value in state.values():
        shifted = ~value if value.dtype is torch.bool else (value + by).to(value.dtype)
        found.setdefault(value.data_ptr() or id(value), shifted)
    return {name: found[value.data_ptr() or id(value)] for name, value in state.items()}


def squares(left: State, right: State, names: set[str]) -> float:
    return sum(float((left[name].double() - right[name].double()).square().sum()) for name in names)


# Guard.


@pytest.mark.parametrize(
    "wrong", [{"policy": 3}, {"federation": ""}, {"run": "a\nb"}, {"dataset": "elsewhere"}]
)
def test_a_guard_that_is_refused_opens_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        sentinel.Guard(**{"policy": "baseline", "state_dir": tmp_path / "site", **wrong})
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("patients", [-1, 1.5, True, "12", math.nan, 2**60])
def test_patients_that_are_no_whole_number_are_misuse(make_guard, patients) -> None:
    with pytest.raises(MisuseError, match="patients"):
        make_guard().round(1, odd_state(), patients=patients)


@pytest.mark.parametrize("state", [{}, None, [], nn.Linear(2, 1), {3: torch.ones(1)}, {"w": 3.0}])
def test_a_global_state_that_is_none_is_misuse(make_guard, state) -> None:
    with pytest.raises(MisuseError, match="global_state"):
        make_guard().round(1, state)


def test_a_round_that_is_not_entered_costs_and_records_nothing(make_guard, tmp_path) -> None:
    guard = make_guard()
    before = recorded(tmp_path)
    guard.round(1, odd_state())
    assert recorded(tmp_path) == before
    assert StateFolder(tmp_path / "site").ledger.head().seq == 0


def test_a_protected_function_that_raises_aborts_its_round(make_guard, tmp_path) -> None:
    @make_guard().protect
    def train(_: State) -> State:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(odd_state())
    assert recorded(tmp_path)[-1] == "round.aborted"


@pytest.mark.parametrize("given", [None, [], {}, 3])
def test_a_protected_function_that_gives_no_state_releases_nothing(
    make_guard, tmp_path, given
) -> None:
    train = make_guard().protect(lambda _: given)
    with pytest.raises(MisuseError):
        train(odd_state())
    assert "update.released" not in recorded(tmp_path)
    assert StateFolder(tmp_path / "site").ledger.head().seq == 0


def test_a_number_that_is_given_leaves_the_counter_where_it_is(make_guard, tmp_path) -> None:
    train = make_guard().protect(lambda state: moved(state, 0.1))
    train(odd_state())
    train(moved(odd_state(), 1.0), round_number=70)
    train(moved(odd_state(), 2.0))
    log = read_log(tmp_path / "site" / "audit")
    numbers = [entry.record.number for entry in log if entry.record.type == "round.opened"]
    assert numbers == [0, 70, 1]


def test_a_counter_that_cannot_be_read_withholds_and_stays(make_guard, tmp_path) -> None:
    guard = make_guard()
    train = guard.protect(lambda state: moved(state, 0.1))
    train(odd_state())
    counter = guard._state.counter("default", "default")
    counter.write("not a number")
    with pytest.raises(Withheld) as caught:
        train(odd_state())
    assert caught.value.reason is Reason.STATE_UNSAFE
    assert counter.read() == "not a number"
    assert recorded(tmp_path).count("round.opened") == 1
    train(odd_state(), round_number=5)  # as the error says


# Round.


def test_a_model_that_the_policy_refuses_is_not_loaded(make_guard) -> None:
    broken = '[[rule]]\nid = "broken"\nwhen = { unhealthy = true }\naction = "refuse-round"\n'
    model = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {name: torch.full_like(value, math.nan) for name, value in before.items()}
    rnd = make_guard(PLAIN + broken, unsafe_skip_inspection=False).round(1, bad, model)
    with pytest.raises(RoundRefused):
        rnd.__enter__()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(MisuseError, match="refused"):
        rnd.__enter__()


def test_a_round_may_be_withheld_from_outside_until_it_has_ended(make_guard, tmp_path) -> None:
    guard = make_guard()
    new, opened, ended, aborted = (guard.round(number, odd_state()) for number in range(4))
    new.withhold(Reason.RANK_LOST)
    with pytest.raises(MisuseError, match="refused"):
        new.__enter__()
    opened.__enter__()
    opened.withhold(Reason.RANK_LOST)
    with pytest.raises(MisuseError, match="withheld"):
        opened.release(odd_state())
    with pytest.raises(ZeroDivisionError), aborted:
        raise ZeroDivisionError
    before = recorded(tmp_path)
    for rnd in (new, opened, aborted):
        rnd.withhold(Reason.INTERNAL_ERROR)
    assert recorded(tmp_path) == before
    with pytest.raises(MisuseError, match="aborted"):
        aborted.release(odd_state())
    with ended:
        pass
    out = ended.release(moved(odd_state(), 0.1))
    ended.withhold(Reason.RANK_LOST)
    with guard.round(2, odd_state()) as again:
        pass
    stored = again.release(odd_state())
    assert all(torch.equal(stored[name], value) for name, value in out.items())


@pytest.mark.parametrize("by", [0.01, 0.25, 1e3])
def test_every_kind_of_entry_leaves_inside_one_norm_or_stays(make_guard, by: float) -> None:
    """0-d, empty, narrow, tied, whole, true or false, statistic; tied ones count once."""
    base = odd_state()
    with make_guard().round(1, base) as rnd:
        pass
    out = rnd.release(moved(base, by))
    assert {n: (v.shape, v.dtype) for n, v in out.items()} == {
        n: (v.shape, v.dtype) for n, v in base.items()
    }
    stays = {"empty", "flags", "running_mean", "steps"}
    assert all(torch.equal(out[name], base[name]) for name in stays)
    assert torch.equal(out["head"], out["tail"])
    once = set(base) - stays - {"tail"}
    assert math.sqrt(squares(out, base, once)) <= 0.5
    for name in once:
        assert not torch.equal(out[name], base[name]), name
    if by == 0.25:  # 26 values of 1/4: tied ones once, the 0-d one among them
        assert float(out["float64"][0] - 1.0) == pytest.approx(0.5 / math.sqrt(26), rel=1e-5)


def test_an_update_of_zeros_is_released_like_any_other(make_guard, tmp_path) -> None:
    base = odd_state()
    with make_guard().round(1, base) as rnd:
        pass
    out = rnd.release(odd_state())
    assert all(torch.equal(out[name], value) for name, value in base.items())
    assert recorded(tmp_path)[-1] == "update.released"
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0d", "bfloat16", "float16", "float64", "tail"])
def test_what_is_not_finite_is_withheld_in_every_kind_of_entry(
    make_guard, tmp_path, name: str, bad: float
) -> None:
    local = moved(odd_state(), 0.1)
    local[name].view(-1)[-1:].fill_(bad)
    with make_guard().round(1, odd_state()) as rnd:
        pass
    with pytest.raises(Withheld) as caught:
        rnd.release(local)
    assert caught.value.reason is Reason.NOT_FINITE
    assert StateFolder(tmp_path / "site").ledger.head().seq == 1
    with pytest.raises(Withheld, match="the answer stands"):
        make_guard().round(1, odd_state()).__enter__()


def test_squares_beyond_float64_are_withheld(make_guard) -> None:
    local = moved(odd_state(), 0.1)
    local["float64"].fill_(1e200)
    with make_guard().round(1, odd_state()) as rnd:
        pass
    with pytest.raises(Withheld) as caught:
        rnd.release(local)
    assert caught.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("bad", [math.inf, -math.inf, torch.ones(2), None])
def test_a_metric_that_is_no_finite_number_is_misuse(make_guard, bad) -> None:
    with make_guard().round(1, odd_state()) as rnd:
        pass
    rnd.release(odd_state())
    with pytest.raises(MisuseError, match="finite"):
        rnd.metrics({"num-examples": bad})


def test_a_bound_about_tensors_that_are_all_withheld_stays_where_it_is(make_guard) -> None:
    text = PLAIN + (
        '[[rule]]\nid = "auto"\nmatch = ["head"]\nmax_norm = "auto"\n'
        "max_norm_floor = 0.01\nmax_norm_ceiling = 1.0\n"
        '[[rule]]\nid = "stays"\nmatch = ["head"]\naction = "withhold"\n'
    )
    guard = make_guard(text)
    for number in range(3):
        with guard.round(number, odd_state()) as rnd:
            pass
        rnd.release(moved(odd_state(), 0.3))
    assert auto_norms(guard._door.house, rnd.key) == {"auto": pytest.approx(0.1)}
