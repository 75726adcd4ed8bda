"""Tracing: a child's own system calls on one folder, counted, failed, or made its last.

The tracer sees what no patched function can: the writes of SQLite and of the tensor library, each
between two instructions of theirs. Linux on x86-64; `available()` says whether it works here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_TRACE_ME, _PEEK, _POKE, _NEXT, _OPTIONS = 0, 3, 6, 24, 0x4200
_MARK_CALLS, _KILL_ORPHANS = 0x1, 0x100000
_AX, _DX, _SI, _DI, _CALL = 80, 96, 104, 112, 120  # places of registers in struct user

_BY_FILE = {
    0: "read",
    1: "write",
    17: "pread64",
    18: "pwrite64",
    20: "writev",
    73: "flock",
    74: "fsync",
    75: "fdatasync",
    77: "ftruncate",
    91: "fchmod",
    285: "fallocate",
    296: "pwritev",
}
_BY_PATH = {
    2: "open",
    82: "rename",
    83: "mkdir",
    86: "link",
    87: "unlink",
    90: "chmod",
    257: "openat",
    258: "mkdirat",
    263: "unlinkat",
    264: "renameat",
    268: "fchmodat",
    316: "renameat2",
}
_PATH_SECOND = {257, 258, 263, 264, 268, 316}
_READS = {"read", "pread64"}
_WRITES = ("write ", "pwrite64 ")
_PAGE = 4096  # bytes; a path may begin in one page and end in the next


@dataclass
class Fault:
    """What goes wrong, and at which operation, counted from 0.

    Attributes:
        kill: SIGKILL before this operation.
        error: errno that operations `first` to `last` end with.
        short: this operation, if a write, writes half of what it was asked to.
        reads: count operations that only read as well.
    """

    kill: int | None = None
    error: int = 0
    first: int = 0
    last: int = -1
    short: int | None = None
    reads: bool = False


@dataclass
class Trace:
    """What was seen: status as of `waitpid`, operations, and the place of the fault."""

    status: int = 0
    operations: list[str] = field(default_factory=list)
    hit: str = ""


def available() -> bool:
    """Whether a child can be traced here."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return False
    trace = run_traced(lambda: None, "/nowhere", Fault())
    return os.WIFEXITED(trace.status) and os.WEXITSTATUS(trace.status) == 0


def run_traced(child: Callable[[], None], folder: str, fault: Fault) -> Trace:
    """Run `child` in a fork, with the fault in what it does to `folder`."""
    pid = os.fork()
    if pid == 0:
        if _ptrace(_TRACE_ME, 0):
            os._exit(77)  # not permitted here
        os.kill(os.getpid(), signal.SIGSTOP)
        child()
        os._exit(0)
    trace = Trace()
    _, trace.status = os.waitpid(pid, 0)
    if os.WIFEXITED(trace.status):
        return trace
    _ptrace(_OPTIONS, pid, 0, _MARK_CALLS | _KILL_ORPHANS)
    _follow(_Traced(pid, folder), fault, trace)
    return trace


def _follow(traced: _Traced, fault: Fault, trace: Trace) -> None:
    entering, result, deliver = True, None, 0
    while True:
        _ptrace(_NEXT, traced.pid, 0, deliver)
        _, trace.status = os.waitpid(traced.pid, 0)
        if not os.WIFSTOPPED(trace.status):
            return
        deliver = os.WSTOPSIG(trace.status)
        if deliver != signal.SIGTRAP | 0x80:
            continue
        deliver = 0
        if entering:
            name = traced.operation(reads=fault.reads)
            result = None if name is None else _strike(traced, fault, trace, name)
        elif result is not None:
            traced.set(_AX, result)
        entering = not entering


def _strike(traced: _Traced, fault: Fault, trace: Trace, name: str) -> int | None:
    """Count one operation and do what the fault says; what the call shall return, if that."""
    at = len(trace.operations)
    trace.operations.append(name)
    if at == fault.kill:
        trace.hit = name
        os.kill(traced.pid, signal.SIGKILL)
    elif fault.first <= at <= fault.last:
        trace.hit = trace.hit or name
        traced.set(_CALL, -1)
        return -fault.error
    elif at == fault.short and name.startswith(_WRITES):
        trace.hit = name
        traced.set(_DX, traced.get(_DX) // 2)
    return None


class _Traced:
    """A stopped child, and which of its calls touch the folder."""

    def __init__(self, pid: int, folder: str) -> None:
        self.pid = pid
        self._folder = folder

    def get(self, register: int) -> int:
        return _ptrace(_PEEK, self.pid, register)

    def set(self, register: int, value: int) -> None:
        _ptrace(_POKE, self.pid, register, value)

    def operation(self, *, reads: bool) -> str | None:
        """The call and the file it touches; None where it is not to be counted."""
        call = self.get(_CALL)
        if call in _BY_FILE:
            name, path = _BY_FILE[call], self._path_of(self.get(_DI))
            wanted = reads or name not in _READS
        elif call in _BY_PATH:
            name = _BY_PATH[call]
            path = self._text(self.get(_SI if call in _PATH_SECOND else _DI))
            flags = self.get(_DX if call == 257 else _SI)
            changes = bool(flags & (os.O_CREAT | os.O_TRUNC))
            wanted = reads or not name.startswith("open") or changes
        else:
            return None
        return f"{name} {path[len(self._folder) :]}" if wanted and self._ours(path) else None

    def _ours(self, path: str) -> bool:
        return path == self._folder or path.startswith(self._folder + "/")

    def _path_of(self, handle: int) -> str:
        try:
            return str(Path(f"/proc/{self.pid}/fd/{handle}").readlink())
        except OSError:
            return ""

    def _text(self, address: int) -> str:
        """What lies at an address, up to its zero, page by page: the next one need not exist."""
        text = b""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - no path
            memory.seek(address)
            while b"\0" not in text and (
                more := memory.read(_PAGE - (address + len(text)) % _PAGE)
            ):
                text += more
        return text.split(b"\0", 1)[0].decode(errors="replace")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    (unsigned,) = struct.unpack("Q", struct.pack("q", data))
    return int(_libc.ptrace(request, pid, address, unsigned))
