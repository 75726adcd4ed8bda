"""Scratch folders for guards that are thrown away after the test."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder with a random name is made in it
_PREFIX, _LOCK = "sentinel-stress-", "in-use"
_YOUNG = 60.0  # seconds that a new folder has to take its lock


@contextmanager
def scratch() -> Iterator[Path]:
    """A private folder, in memory where the system has such a place; gone afterwards.

    Guarantees:
        What a killed test left behind is removed by the next one of the same user: a folder is in
        use as long as somebody holds its lock, which ends with the process.
    """
    fast = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    where = _MEMORY if fast else Path(tempfile.gettempdir())
    _sweep(where)
    with (
        TemporaryDirectory(prefix=_PREFIX, dir=where) as home,
        (Path(home) / _LOCK).open("w") as held,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        yield Path(home)


def _sweep(where: Path) -> None:
    """Remove folders of this user whose test is no more."""
    for folder in where.glob(f"{_PREFIX}*"):
        try:
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG:
                continue
            with (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # in use, or gone already
            continue
