"""The bounds of a run survive anything, and what cannot be read is not guessed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sentinel.adaptive import Memory, Seen
from sentinel.durable import private_folder
from sentinel.errors import Withheld
from sentinel.state import SmallFile
from sentinel.terms import AutoNorm, Reason

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = {"baseline": AutoNorm(0.1, 10.0)}


def looked(number: int, fill: float = 1.0) -> Seen:
    return Seen(f"{number:064x}", number, "0" * 64, fill, 0.5, (float(number),) * 256, 1000)


def memory_in(folder: Path) -> Memory:
    return Memory(SmallFile(private_folder(folder / "history") / "run.bounds.json"))


def learn(memory: Memory, number: int, fill: float = 1.0) -> None:
    memory.learn(LIMITS, {"baseline": looked(number, fill)}, memory.norms(LIMITS))


def file_in(folder: Path) -> Path:
    return folder / "history" / "run.bounds.json"


def test_without_a_file_every_bound_is_fresh(tmp_path: Path) -> None:
    assert memory_in(tmp_path).norms(LIMITS) == {"baseline": pytest.approx(1.0)}
    assert memory_in(tmp_path).norms({}) == {}
    assert not file_in(tmp_path).exists()


def test_what_was_learnt_is_there_for_the_next_process(tmp_path: Path) -> None:
    for number in range(8):
        learn(memory_in(tmp_path), number)
    grown = memory_in(tmp_path).norms(LIMITS)
    assert grown["baseline"] > 2.0
    for number in range(8):  # given again: nothing counts twice
        learn(memory_in(tmp_path), number, fill=0.0)
    assert memory_in(tmp_path).norms(LIMITS) == grown


def test_the_file_is_small_bounded_and_nobody_elses(tmp_path: Path) -> None:
    for number in range(60):
        learn(memory_in(tmp_path), number)
    assert file_in(tmp_path).stat().st_size < 20_000
    assert file_in(tmp_path).stat().st_mode & 0o777 == 0o600


def test_limits_that_have_changed_hold_at_once(tmp_path: Path) -> None:
    for number in range(8):
        learn(memory_in(tmp_path), number)
    tighter = {"baseline": AutoNorm(0.1, 0.5)}
    assert memory_in(tmp_path).norms(tighter) == {"baseline": 0.5}


def test_a_rule_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    learn(memory_in(tmp_path), 1)
    memory = memory_in(tmp_path)
    other = {"other": AutoNorm(1.0, 4.0)}
    memory.learn(other, {"other": looked(2)}, memory.norms(other))
    assert set(json.loads(file_in(tmp_path).read_text())["rules"]) == {"other"}
    assert memory.norms(LIMITS) == {"baseline": pytest.approx(1.0)}


def _changed(**fields: Any) -> Any:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        data["rules"]["baseline"].update(fields)
        return data

    return change


def _without(data: dict[str, Any]) -> dict[str, Any]:
    del data["rules"]["baseline"]["variance"]
    return data


DAMAGE = {
    "another version": lambda data: {**data, "version": 2},
    "no rules": lambda data: {"version": data["version"]},
    "a list": lambda data: [data],
    "a field less": _without,
    "a field more": _changed(more=1.0),
    "no number": _changed(norm="1.0"),
    "a boolean": _changed(norm=True),
    "a norm of 0": _changed(norm=0.0),
    "a negative variance": _changed(variance=-1.0),
    "infinity": _changed(norm=float("inf")),
    "NaN": _changed(variance=float("nan")),
    "a round that is no number": _changed(number="1"),
    "a round out of range": _changed(number=2**60),
    "a digest that is none": _changed(counted=["x"]),
    "too many rounds": _changed(counted=["0" * 64] * 33),
    "a sketch of another width": _changed(model=[0.0] * 7),
    "a step of no numbers": _changed(step=["0"] * 256),
    "too long a window": _changed(coherent=[0.0] * 6),
    "a negative square": _changed(coherent=[-1.0]),
    "a reach that is none": _changed(reach="x"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_cannot_be_understood_withholds_and_stays(tmp_path: Path, name: str) -> None:
    learn(memory_in(tmp_path), 1)
    data = json.loads(file_in(tmp_path).read_text())
    file_in(tmp_path).write_text(json.dumps(DAMAGE[name](data)))
    _assert_withheld(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_file_that_was_cut_short_withholds(tmp_path: Path, cut: int) -> None:
    learn(memory_in(tmp_path), 1)
    file_in(tmp_path).write_bytes(file_in(tmp_path).read_bytes()[:cut])
    _assert_withheld(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10_000, b"null", b"1e999"])
def test_a_file_of_something_else_withholds(tmp_path: Path, content: bytes) -> None:
    learn(memory_in(tmp_path), 1)
    file_in(tmp_path).write_bytes(content)
    _assert_withheld(tmp_path)


def _assert_withheld(folder: Path) -> None:
    before = file_in(folder).read_bytes()
    for attempt in (lambda: memory_in(folder).norms(LIMITS), lambda: learn(memory_in(folder), 2)):
        with pytest.raises(Withheld, match="put the state folder back") as caught:
            attempt()
        assert caught.value.reason is Reason.STATE_UNSAFE
    assert file_in(folder).read_bytes() == before


def test_two_processes_that_learn_at_once_both_count(tmp_path: Path) -> None:
    """Four threads, each through a handle of its own: 40 rounds are 40 rounds."""

    def work(first: int) -> None:
        for number in range(first, 40, 4):
            memory_in(tmp_path).learn(LIMITS, {"baseline": looked(number)}, {"baseline": 1.0})

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = json.loads(file_in(tmp_path).read_text())["rules"]["baseline"]["counted"]
    assert len(set(counted)) == 32
    assert memory_in(tmp_path).norms(LIMITS) == {"baseline": pytest.approx(10.0)}


def test_a_process_killed_while_it_learns_leaves_a_whole_file(tmp_path: Path) -> None:
    """Twenty times, at other instants; the last round that it reported is in the file."""
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for number in range(10**6):
                    learn(memory_in(folder), number, fill=0.7)
                    os.write(writer, f"{number}\n".encode())
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as told:
            first = told.readline()
            time.sleep(0.002 * attempt)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = [first, *told][-1]
        assert memory_in(folder).norms(LIMITS)["baseline"] > 0
        written = json.loads(file_in(folder).read_text())["rules"]["baseline"]["number"]
        assert written in {int(last), int(last) + 1}
