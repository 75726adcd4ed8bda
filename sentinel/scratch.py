"""Scratch: room on disk for tensors that would not fit into memory.

It is made of files without a name, which the system writes out and reads back as it needs. Only
what was made ready to leave is ever put there: what carries the noise of a promise, or all that the
plan asked for.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sentinel.durable import draft_of, open_private
from sentinel.memory import LARGE, room

if TYPE_CHECKING:
    from sentinel.memory import Rooms

_ENDLESS = 1 << 62
_NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_GROUP = Path("/sys/fs/cgroup")  # the container's own, as it sees it


def rooms_for(size: int, folder: Path) -> Rooms:
    """Memory, or files in `folder` where `size` bytes would take more than half of what is free."""
    return room if 2 * size <= free() else Scratch(folder)


class Scratch:
    """Room in files without a name: readable by nobody else, gone with the process.

    The space is taken at once, so that a full disk is an error here, not a signal later on.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder of ours."""
        self._folder = folder

    def __call__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor; a large one on the CPU lies in a file.

        Raises:
            OSError: there is no space for it.
        """
        size = shape.numel() * dtype.itemsize
        if torch.device(device).type != "cpu" or size < LARGE:
            return torch.empty(shape, dtype=dtype, device=device)
        handle = self._open()
        try:
            os.posix_fallocate(handle, 0, size)
            mapped = mmap.mmap(handle, size, flags=mmap.MAP_SHARED)
        finally:
            os.close(handle)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def _open(self) -> int:
        try:
            return os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_NAMELESS_FILES:
                raise
        draft = draft_of(self._folder / "scratch")
        handle = open_private(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        draft.unlink()
        return handle


def free() -> int:
    """Bytes that this process could still fill: of the machine, its container and its own limit."""
    return min(_of_machine(), _of_container(), _of_process())


def _of_machine() -> int:
    return _figures(Path("/proc/meminfo")).get("MemAvailable:", _ENDLESS) * 1024


def _of_container() -> int:
    """The limit less what cannot be given back; files that were read can."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return _ENDLESS
    return max(0, limit - _figures(_GROUP / "memory.stat").get("anon", 0))


def _of_process() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return _ENDLESS
    return max(0, limit - _figures(Path("/proc/self/status")).get("VmData:", 0) * 1024)


def _figures(path: Path) -> dict[str, int]:
    """The whole numbers that stand second in the lines of a file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
