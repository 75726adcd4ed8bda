"""Walk a tensor in pieces that fit the cache, so that wide arithmetic needs no wide copy."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

SMALL = 1 << 20  # values of a model for which a second thread only gets in the way
CHUNK = 1 << 16  # values: 512 KiB as float64, inside the second-level cache


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield one-dimensional views of `tensor` (contiguous, any shape), in order.

    Writing to a view writes to the tensor. A zero-size tensor yields nothing.
    """
    if tensor.numel():
        yield from torch.split(tensor.view(-1), CHUNK)


def few_threads(state: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """One thread for work on a small model; as many as torch likes for a large one."""
    small = sum(value.numel() for value in state.values()) < SMALL
    return one_thread() if small else nullcontext()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread in this thread of ours, for a while.

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


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Sum of squares of a contiguous floating tensor, accumulated in float64.

    NaN or Inf anywhere gives a result that is not finite. Float32 input cannot overflow.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for piece in chunks(tensor):
        wide = piece.double()
        total += torch.dot(wide, wide)
    return float(total)
