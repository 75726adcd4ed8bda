"""Crew: the cores of the machine, and how work on many tensors is shared out among them."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from typing import TYPE_CHECKING, TypeVar, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

SMALL = 1 << 20  # values of a model for which a second thread only gets in the way

Task = TypeVar("Task")
Result = TypeVar("Result")


def share_out(tasks: Sequence[Task], start: Callable[[], Callable[[Task], Result]]) -> list[Result]:
    """Do every task, on as many threads as torch was given; results in the order of the tasks.

    Args:
        tasks: independent of one another.
        start: called once per thread; gives the function that does one task after the other, with
            whatever buffers it keeps.

    Raises:
        The error of the first task (in their order) that raised one; the others may be left undone,
        and none is still being done.
    """
    threads = min(_quiet.threads(), len(tasks))
    with one_thread():
        if threads <= 1 or _hands.within():
            return list(map(start(), tasks))
        return _together(tasks, start, threads)


def both(first: Callable[[], Task], second: Callable[[], Result]) -> tuple[Task, Result]:
    """Do two things that have nothing to do with each other; the error of the first one first."""
    found: list[object] = share_out([first, second], lambda: lambda task: task())
    return cast("tuple[Task, Result]", tuple(found))


def _together(
    tasks: Sequence[Task], start: Callable[[], Callable[[Task], Result]], threads: int
) -> list[Result]:
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    numbers = count()
    stop = threading.Event()

    def work() -> None:
        do = start()
        while not (errors or stop.is_set()) and (number := next(numbers)) < len(tasks):
            try:
                results[number] = do(tasks[number])
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                errors[number] = error

    shares = [_hands.submit(work, threads) for _ in range(threads)]
    try:
        wait(shares)
    except BaseException:  # an interrupt: nothing goes on behind the caller's back
        stop.set()
        wait(shares)
        raise
    if errors:
        raise errors[min(errors)]
    for share in shares:
        share.result()
    return [results[number] for number in range(len(tasks))]


class _Hands:
    """Threads that stay for the next call, so that each keeps its part of the C library's memory.

    A child after a fork has none of its parent's threads, and makes its own.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def within(self) -> bool:
        """Whether the caller is one of them: waiting for the others could then take forever."""
        return getattr(self._here, "working", False)

    def submit(self, work: Callable[[], None], threads: int) -> Future[None]:
        """Let one thread work, as the caller would but for gradients, which are not recorded."""
        in_inference = torch.is_inference_mode_enabled()
        streams = _cuda_streams()

        def quietly() -> None:
            self._here.working = True
            with contextlib.ExitStack() as stack:
                for stream in streams:
                    stack.enter_context(torch.cuda.stream(stream))
                stack.enter_context(torch.inference_mode(in_inference))
                stack.enter_context(torch.no_grad())
                work()

        with self._lock:
            if self._pool is None or self._size < threads:
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sentinel")
                self._size = threads
            return self._pool.submit(quietly)


def _cuda_streams() -> list[torch.cuda.Stream]:
    """The caller's stream of each GPU: what it has queued there comes before what a thread does."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types there
        return []
    return [torch.cuda.current_stream(at) for at in range(torch.cuda.device_count())]


_hands = _Hands()


def few_threads(state: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """One thread for work on a small model; as many as torch likes for a large one."""
    small = sum(value.numel() for value in state.values()) < SMALL
    return one_thread() if small else contextlib.nullcontext()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread in each of our threads, for a while.

    A chunk is too small to share out: on a busy machine the threads of torch wait for one another
    many times longer than the work takes (25 M values: 10 s against 0.9 s were seen).
    """
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()


class _Quiet:
    """How many blocks want one thread.

    The number of threads is the process's own, so blocks that overlap must not each put back what
    they saw: the first one in notes it, the last one out puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A child has none of the threads that were inside."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            torch.set_num_threads(self._before)

    def threads(self) -> int:
        """How many threads torch was given."""
        with self._lock:
            return self._before if self._inside else torch.get_num_threads()

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(1 if self._inside else self._before)


_quiet = _Quiet()
