"""Durable: files and folders that survive `kill -9`, a full disk and a hostile neighbour."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OWNER_ONLY = 0o600
_IN_THE_WAY = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO}
_STALE = 3600.0  # seconds; writing a draft takes seconds


@contextmanager
def storage() -> Iterator[None]:
    """Turn an error of the file system into a refusal: whatever could not be kept may not leave.

    Raises:
        Withheld: STATE_UNSAFE where something that is no file or folder of ours is in the way (a
            symbolic link, a file in the place of a folder), else STORAGE_FAILED.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise Withheld(
                Reason.STATE_UNSAFE,
                "Something that is no file or folder of the guard's own lies in the state folder, "
                "a symbolic link perhaps. Move it away, or name another folder.",
            ) from None
        raise Withheld(
            Reason.STORAGE_FAILED,
            "The state folder could not be read or written; check space and permissions.",
        ) from None


def remove_drafts(folder: Path, now: float) -> None:
    """Remove drafts that a killed process left behind: those older than an hour.

    The tensor library writes a draft of its own, `.tmp` and six letters, of a model's size.
    """
    for pattern in (".*.draft", ".tmp??????"):
        for draft in folder.glob(pattern):
            if draft.lstat().st_mtime < now - _STALE:
                draft.unlink(missing_ok=True)


def private_folder(path: Path) -> Path:
    """Make `path` (0700) where it is missing, and check that it is ours alone.

    Raises:
        Withheld: STATE_UNSAFE where it is a symbolic link, no folder, owned by someone else, or
            writable by group or others, or where a folder above it is writable by anybody.
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
    if problem is None and any(map(_open_to_all, path.resolve().parents)):
        problem = "lies in a folder in which anybody can rename it away (mode o+w, not sticky)"
    if problem:
        raise Withheld(Reason.STATE_UNSAFE, f"The state folder {path.name!r} {problem}.")
    return path


def _open_to_all(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


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


def draft_of(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, its owner's alone, which is gone at the end unless published."""
    draft = draft_of(path)
    os.close(open_private(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def publish(draft: Path, path: Path) -> None:
    """Give a durable draft its name: a crash leaves what was there, or the draft, whole."""
    draft.replace(path)
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a crash leaves the old content or the new, whole."""
    with drafted(path) as draft:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(draft, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` across threads and processes; a killed holder frees it."""
    handle = open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
