"""Tasks shared out over processes, or done one after the other in this one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


def performed(work: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Iterator[tuple[T, R]]:
    """Do every task, and yield it with its result as it is done.

    Args:
        work: what is done, on one thread of torch; with several jobs it must be picklable.
        tasks: the longest first.
        jobs: processes.
    """
    threads = torch.get_num_threads()
    if jobs == 1:
        try:
            torch.set_num_threads(1)  # sums in another order would give other figures
            for task in tasks:
                yield task, work(task)
        finally:
            torch.set_num_threads(threads)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_on_one_thread) as pool:
        waiting = {pool.submit(work, task): task for task in tasks}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _on_one_thread() -> None:
    torch.set_num_threads(1)
