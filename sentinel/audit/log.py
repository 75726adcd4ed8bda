"""Log: records on disk, one JSON line each, every line naming the hash of the line before it.

- A line is written and synced before the call returns: what was acknowledged is there.
- Guards in several processes append to one log; a lock orders them.
- A line that a crash cut short was never acknowledged: it is dropped, and a record says so.
- Any other damage stops everything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.audit.records import (
    LogRecovered,
    Record,
    UpdateReleased,
    log2_bucket,
    record_from_json,
)
from sentinel.durable import locked, open_private, private_folder, storage, sync_folder
from sentinel.errors import Withheld
from sentinel.terms import GENESIS, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_TAIL = 1 << 16  # longer than any record
FILE_NAME = "audit.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with its place in the log.

    Attributes:
        seq: its number, from 1.
        previous: hash of the line before it.
        hash: SHA-256 of its own line, without the newline.
    """

    seq: int
    previous: str
    hash: str
    record: Record


class AuditLog:
    """The log in one folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder (0700) where it is missing."""
        self._path = private_folder(folder) / FILE_NAME
        self._lock = folder / ".lock"

    def append(self, build: Callable[[], Record]) -> Entry:
        """Write one record, durably.

        Args:
            build: makes the record while the log is locked, so that the ledger's head in it is
                never older than the one in the record before.

        Raises:
            Withheld: STORAGE_FAILED where it could not be written and synced, LOG_DAMAGED where the
                log's last line cannot be read.
        """
        try:
            with locked(self._lock):
                return self._append(build())
        except OSError as error:
            raise Withheld(
                Reason.STORAGE_FAILED,
                "The audit log could not be written; check space and permissions of the state "
                "folder. Nothing is released without a record.",
            ) from error

    def last(self) -> Entry | None:
        """The last record that was acknowledged; None where the log is empty.

        Raises:
            Withheld: STORAGE_FAILED where it could not be read, LOG_DAMAGED where it is no record.
        """
        with storage(), locked(self._lock):
            line, _ = _tail(self._path)
        return None if line is None else _entry(line)

    def hash_at(self, seq: int) -> str | None:
        """The hash of one record; None where there is none. Reads from the end, so recent is quick.

        Raises:
            Withheld: STORAGE_FAILED where the log could not be read, LOG_DAMAGED where a line on
                the way is no record.
        """
        if seq == 0:
            return GENESIS
        with storage(), locked(self._lock):
            for line in _lines_backwards(self._path):
                entry = _entry(line)
                if entry.seq == seq:
                    return entry.hash
                if entry.seq < seq:
                    return None
        return None

    def was_released(self, round_key: str) -> bool:
        """Whether the log says that a round was released. Reads the whole log.

        Raises:
            Withheld: STORAGE_FAILED where the log cannot be read, LOG_DAMAGED where it is broken.
        """
        with storage():
            return any(
                isinstance(entry.record, UpdateReleased) and entry.record.round == round_key
                for entry in read_log(self._path.parent, torn_end=True)
            )

    def _append(self, record: Record) -> Entry:
        created = not self._path.exists()
        line, torn = _tail(self._path)
        before = None if line is None else _entry(line)
        handle = open_private(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            if torn:
                os.ftruncate(handle, os.fstat(handle).st_size - torn)
                before = _write(handle, before, _recovered(record, torn))
            entry = _write(handle, before, record)
        finally:
            os.close(handle)
        if created:
            sync_folder(self._path.parent)
        return entry


def read_log(folder: Path, *, torn_end: bool = False) -> Iterator[Entry]:
    """Every record in order, the chain checked.

    Args:
        folder: the log's folder.
        torn_end: pass over a last line that a crash cut short: it was never acknowledged.

    Raises:
        Withheld: LOG_DAMAGED at the first line that was changed, removed, added or cut short, with
            its number.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return
    seq, previous = 0, GENESIS
    with path.open("rb") as file:
        for line in file:
            seq += 1
            if not line.endswith(b"\n"):
                if torn_end:
                    return
                raise _damaged(
                    f"line {seq} was cut short (by a crash, if it is the last; the guard then "
                    "drops it with its next record)"
                )
            entry = _entry(line[:-1])
            if entry.seq != seq or entry.previous != previous:
                raise _damaged(f"line {seq} does not follow the line before it")
            previous = entry.hash
            yield entry


def _write(handle: int, before: Entry | None, record: Record) -> Entry:
    """Append one line and sync it; on failure take back what was written of it."""
    seq = 1 if before is None else before.seq + 1
    previous = GENESIS if before is None else before.hash
    line = _line(seq, previous, record)
    size = os.fstat(handle).st_size
    try:
        if os.write(handle, line + b"\n") != len(line) + 1:
            raise OSError("short write")  # noqa: TRY301 - handled with every other OSError
        os.fdatasync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise
    return Entry(seq, previous, hashlib.sha256(line).hexdigest(), record)


def _line(seq: int, previous: str, record: Record) -> bytes:
    body = record.model_dump(mode="json")
    whole = {"seq": seq, "previous": previous, "data_bits": record.data_bits, **body}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


@functools.lru_cache(maxsize=16)  # the last lines are read again at every step of a round
def _entry(line: bytes) -> Entry:
    try:
        whole = json.loads(line)
        seq, previous = int(whole.pop("seq")), str(whole.pop("previous"))
        bits = int(whole.pop("data_bits"))
        record = record_from_json(json.dumps(whole))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged("a line is no record of a known type") from None
    if bits != record.data_bits or _line(seq, previous, record) != line:
        raise _damaged(f"line {seq} is not written as this log writes it")
    return Entry(seq, previous, hashlib.sha256(line).hexdigest(), record)


def _damaged(problem: str) -> Withheld:
    return Withheld(
        Reason.LOG_DAMAGED,
        f"The audit log is damaged: {problem}. Nothing is released; keep the file as it is.",
    )


def _tail(path: Path) -> tuple[bytes | None, int]:
    """The last whole line, without its newline, and how many bytes of a torn line follow it."""
    if not path.exists():
        return None, 0
    handle = open_private(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        start = max(0, size - _TAIL)
        tail = os.pread(handle, _TAIL, start)
    finally:
        os.close(handle)
    whole, newline, torn = tail.rpartition(b"\n")
    if not newline:
        if start:
            raise _damaged("its end is no record")
        return None, len(torn)
    return whole.rpartition(b"\n")[2], len(torn)


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Whole lines, the last one first, without their newlines; a torn end is passed over."""
    if not path.exists():
        return
    handle = open_private(path, os.O_RDONLY)
    try:
        end, rest = os.fstat(handle).st_size, b""
        while end > 0:
            start = max(0, end - _TAIL)
            block = os.pread(handle, end - start, start) + rest
            first, *lines = block.split(b"\n")
            if end == os.fstat(handle).st_size:
                lines = lines[:-1]  # after the last newline: nothing, or a torn line
            yield from reversed(lines)
            end, rest = start, first
        if rest:
            yield rest
    finally:
        os.close(handle)


def _recovered(record: Record, torn: int) -> LogRecovered:
    return LogRecovered(
        at=record.at,
        process=record.process,
        ledger_seq=record.ledger_seq,
        ledger_head=record.ledger_head,
        dropped_bytes=log2_bucket(torn),
    )
