"""Crew: one thread while a release works, and the process as it was afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from sentinel.crew import few_threads, one_thread


@pytest.fixture(autouse=True)
def _three_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def fresh_thread_count() -> int:
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    return found[0]


def test_the_number_of_threads_comes_back_also_after_an_error() -> None:
    seen = []

    def fails() -> None:
        with one_thread():
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [1]
    assert torch.get_num_threads() == 3


def test_blocks_that_overlap_in_several_threads_restore_what_was_there_first() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            inside.set()
            leave.wait(10)

    worker = threading.Thread(target=other)
    with one_thread():
        worker.start()
        assert inside.wait(10)
    leave.set()
    worker.join()
    assert fresh_thread_count() == 3


def test_a_large_model_keeps_its_threads() -> None:
    with few_threads({"w": torch.zeros(1 << 20)}):
        assert torch.get_num_threads() == 3
    with few_threads({"w": torch.zeros(4)}):
        assert torch.get_num_threads() == 1
