"""Memory: room for tensors, that goes back to the system when they are dropped.

The allocator of the C library keeps what a large tensor leaves behind and, aligned as torch asks
for it, often cannot use it again: after three releases a process held three updates. A map of its
own goes back at once, wiped; asked for in pages of 2 MiB it is also there sooner.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Protocol

import torch

LARGE = 1 << 20  # bytes; below it the allocator does well
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has them


class Rooms(Protocol):
    """Where the memory of tensors comes from."""

    def __call__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor."""


def room(shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised contiguous tensor; a large one on the CPU has a memory map of its own."""
    size = shape.numel() * dtype.itemsize
    if size < LARGE or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _HUGE_PAGES is not None:
        with contextlib.suppress(OSError):  # a kernel without them
            own.madvise(_HUGE_PAGES)
    return torch.frombuffer(own, dtype=dtype).view(shape)
