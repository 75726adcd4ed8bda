"""Crew: one thread while a release works, and the process as it was afterwards."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.crew import few_threads, one_thread, share_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


def test_results_come_in_the_order_of_the_tasks_from_several_threads() -> None:
    seen: set[str] = set()
    gate = threading.Barrier(3, timeout=30)

    def start() -> Callable[[int], int]:
        gate.wait()  # every thread is there, or none begins

        def square(number: int) -> int:
            seen.add(threading.current_thread().name)
            return number**2

        return square

    assert share_out(range(100), start) == [number**2 for number in range(100)]
    assert threading.current_thread().name not in seen


def test_the_first_error_is_raised_and_nothing_works_on_afterwards() -> None:
    running: list[int] = []

    def fail(number: int) -> None:
        running.append(number)
        time.sleep(0.05)
        running.remove(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        share_out(range(3), lambda: fail)
    assert not running


def test_an_error_at_the_start_of_a_thread_is_raised() -> None:
    def start() -> Callable[[int], int]:
        raise MemoryError

    with pytest.raises(MemoryError):
        share_out(range(3), start)


def test_work_within_work_does_not_wait_for_itself() -> None:
    def outer(number: int) -> list[int]:
        return share_out(range(number), lambda: lambda inner: inner + 1)

    assert share_out([2, 3, 4, 5, 6, 7], lambda: outer)[-1] == [1, 2, 3, 4, 5, 6, 7]


def test_a_forked_child_has_threads_of_its_own() -> None:
    share_out(range(5), lambda: lambda number: number)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, bytes(share_out(range(5), lambda: lambda number: number)))
        os._exit(0)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], 30)
    assert ready
    assert os.read(receive, 5) == bytes(range(5))
    os.waitpid(child, 0)
    os.close(receive)


def test_inference_mode_goes_along_and_gradients_are_not_recorded() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            told = share_out(
                range(3),
                lambda: lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
            )
        assert told == [(inference, False)] * 3


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts are raised, also where the tests run behind a shell that ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_raised_once_nothing_works_any_more() -> None:
    done: list[int] = []

    def slowly(number: int) -> None:
        time.sleep(0.05)
        done.append(number)

    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        share_out(range(1000), lambda: slowly)
    finished = len(done)
    time.sleep(0.2)
    assert len(done) == finished < 1000
    assert torch.get_num_threads() == 3


def test_a_child_forked_amid_a_release_has_all_its_threads() -> None:
    receive, send = os.pipe()
    with one_thread():
        child = os.fork()
        if child == 0:
            os.write(send, bytes([torch.get_num_threads()]))
            os._exit(0)
        os.waitpid(child, 0)
    assert os.read(receive, 1) == bytes([3])
    os.close(receive)
    os.close(send)
