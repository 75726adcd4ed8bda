"""Scratch folders for guards that are thrown away after the test."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder with a random name is made in it


@contextmanager
def scratch() -> Iterator[Path]:
    """A private folder, in memory where the system has such a place; gone afterwards."""
    fast = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    with TemporaryDirectory(prefix="sentinel-stress-", dir=_MEMORY if fast else None) as home:
        yield Path(home)
