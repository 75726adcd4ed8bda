"""Scratch: room on disk for tensors that would not fit into memory.

It is made of a file without a name, which the system writes out and reads back as it needs. Only
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

from sentinel.durable import draft_of, open_private, storage
from sentinel.memory import LARGE, room

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.memory import Rooms

_ENDLESS = 1 << 62
_NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_ALIGNED = 64  # bytes, as torch aligns its own memory
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def rooms_for(size: int, folder: Path) -> Rooms:
    """Memory, or files in `folder` where `size` bytes would take more than half of what is free.

    Raises:
        Withheld: STORAGE_FAILED where the disk has no room for them.
    """
    if size < LARGE or 2 * size <= free():  # what is small is in memory either way
        return room
    return Scratch(folder, size)


class Scratch:
    """Room in files without a name: readable by nobody else, gone with the process.

    Guarantees:
        The space is taken at once, so that a full disk is an error here, not a signal later on.
        A file lives as long as a tensor in it, and each holds many.

    Edges:
        tensors under 1 MiB, or on a GPU:       ordinary memory
        more than was asked for:                another file, as large as the first or as is needed
        a file system without nameless files:   the name is removed at once
        no space, or a limit on files:          STORAGE_FAILED
        a child after a fork:                   shares the memory, and sees what is written to it
    """

    def __init__(self, folder: Path, size: int) -> None:
        """Take `size` bytes in a folder of ours."""
        self._folder, self._size = folder, size
        self._mapped, self._used = self._take(size), 0

    def __call__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor; a large one on the CPU lies in a file.

        Raises:
            Withheld: STORAGE_FAILED.
        """
        size = shape.numel() * dtype.itemsize
        if torch.device(device).type != "cpu" or size < LARGE:
            return torch.empty(shape, dtype=dtype, device=device)
        if self._used + size > len(self._mapped):
            self._mapped, self._used = self._take(max(size, self._size)), 0
        start, self._used = self._used, self._used + -(-size // _ALIGNED) * _ALIGNED
        count = shape.numel()
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=start).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        with storage():
            handle = self._open()
            try:
                os.posix_fallocate(handle, 0, size)
                return mmap.mmap(handle, size, flags=mmap.MAP_SHARED)
            finally:
                os.close(handle)

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
    return min(_of_machine(), *_of_groups(), _of_process())


def _of_machine() -> int:
    return _figures(Path("/proc/meminfo")).get("MemAvailable:", _ENDLESS) * 1024


def _of_groups() -> Iterator[int]:
    """What the limit of each control group around this process leaves, in both versions of them.

    Files that were read count as free: they are given back where memory is short.
    """
    for group in _groups():
        for limit, held in (
            ("memory.max", ("anon", "shmem")),
            ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
        ):
            try:
                most = int((group / limit).read_text())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            figures = _figures(group / "memory.stat")
            yield max(0, most - sum(figures.get(name, 0) for name in held))


def _groups() -> Iterator[Path]:
    """Folders of the groups that this process is in, as far as it can see them."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _GROUPS / "memory" if kinds else _GROUPS
        own = root / path.lstrip("/")
        yield from (above for above in (own, *own.parents) if above.is_relative_to(root))


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
