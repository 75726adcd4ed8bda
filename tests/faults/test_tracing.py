"""The tracer itself: it must see every operation, or the faults land elsewhere."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

import pytest
from tracing import Fault, available, run_traced

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(not available(), reason="system calls of a child cannot be traced here")
@pytest.mark.parametrize("left", [1, 7, 4096])
def test_a_path_that_crosses_pages_is_read_whole(left: int, tmp_path: Path) -> None:
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    at = mmap.PAGESIZE - left
    path = bytes(tmp_path / "made") + b"\0"
    pages[at : at + len(path)] = path
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + at
    make = ctypes.CDLL(None).mkdir

    trace = run_traced(lambda: make(ctypes.c_void_p(address), 0o700), str(tmp_path), Fault())

    assert trace.operations == ["mkdir /made"]
    assert (tmp_path / "made").is_dir()
