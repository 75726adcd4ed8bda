"""Durable: files and folders that survive `kill -9`, a full disk and a hostile neighbour."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OWNER_ONLY = 0o600


def private_folder(path: Path) -> Path:
    """Make `path` (0700) where it is missing, and check that it is ours alone.

    Raises:
        Withheld: STATE_UNSAFE where it is a symbolic link, no folder, owned by someone else, or
            writable by group or others.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    problem = None
    if not stat.S_ISDIR(info.st_mode):
        problem = "is no folder (a symbolic link is not followed)"
    elif info.st_uid != os.geteuid():
        problem = "belongs to another user"
    elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = "can be written by group or others; use mode 0700"
    if problem:
        raise Withheld(Reason.STATE_UNSAFE, f"The state folder {path.name!r} {problem}.")
    return path


def open_private(path: Path, flags: int) -> int:
    """Open a file of ours: 0600, never through a symbolic link, closed on exec."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, _OWNER_ONLY)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    handle = open_private(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a crash leaves the old content or the new, whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    handle = open_private(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` across threads and processes; a killed holder frees it."""
    handle = open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
