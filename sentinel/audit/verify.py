"""Verify: check a log for somebody who trusts nobody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.audit.log import read_log
from sentinel.errors import Withheld
from sentinel.terms import GENESIS, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Findings:
    """What a whole log holds.

    Attributes:
        head: hash of the last record; note it down to see later whether history was rewritten.
        types: how many records of each type.
        data_bits: bits of raw updates in the log, at most.
    """

    records: int
    head: str
    types: dict[str, int]
    data_bits: int


def verify_log(
    folder: Path,
    ledger_hash: Callable[[int], str | None] | None = None,
    noted: Iterable[tuple[int, str]] = (),
    *,
    torn_end: bool = False,
) -> Findings:
    """Check every record, the chain, and the ledger heads in it.

    Args:
        folder: the log's folder.
        ledger_hash: the ledger's hash at a sequence number; None where it has no such row.
        noted: (number, hash) of records that the ledger names.
        torn_end: pass over a last line that a crash cut short, or that a guard is writing.

    Raises:
        Withheld: LOG_DAMAGED, also where the log lacks a record that the ledger names, or
            LEDGER_BEHIND_LOG where a record names a ledger row that the ledger does not have.

    Guarantees:
        A change to any earlier record changes every later hash, and the ledger names some of them.
        Whoever can write the folder can rewrite log and ledger together: compare `head` with one
        that was noted elsewhere.
    """
    types: Counter[str] = Counter()
    bits, seq, head, ledger_seq = 0, 0, GENESIS, 0
    named = dict(noted)
    for entry in read_log(folder, torn_end=torn_end):
        record = entry.record
        if record.ledger_seq < ledger_seq:
            raise Withheld(
                Reason.LOG_DAMAGED,
                f"Record {entry.seq} names an earlier ledger row than the record before it.",
            )
        if ledger_hash is not None and ledger_hash(record.ledger_seq) != record.ledger_head:
            raise Withheld(
                Reason.LEDGER_BEHIND_LOG,
                f"Record {entry.seq} names ledger row {record.ledger_seq}, which the ledger does "
                "not have: it was put back from a backup, or replaced.",
            )
        if named.pop(entry.seq, entry.hash) != entry.hash:
            raise _not_named(entry.seq)
        types[str(record.model_dump()["type"])] += 1
        bits += record.data_bits
        seq, head, ledger_seq = entry.seq, entry.hash, record.ledger_seq
    if named.pop(0, GENESIS) != GENESIS or named:
        raise _not_named(min(named, default=0))
    return Findings(seq, head, dict(types), bits)


def _not_named(seq: int) -> Withheld:
    return Withheld(
        Reason.LOG_DAMAGED,
        f"Record {seq} is missing, or is not the one that the ledger names: history was rewritten.",
    )
