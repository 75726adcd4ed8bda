"""Tally: how often each event was charged, kept up to date by reading new rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.privacy.events import event_from_json
from sentinel.terms import GENESIS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from sentinel.privacy.events import PromisedEvent, UnboundedEvent

# NOT INDEXED: by place in the file, so that only new rows are read.
_NEW = (
    "SELECT dataset, event, COUNT(*) FROM event NOT INDEXED WHERE seq > ? AND seq <= ? "
    "GROUP BY dataset, event"
)


class Tally:
    """Counts of one process, so that a check takes as long after 10^6 rounds as after one.

    Guarantees:
        Rows are never changed, so what was counted stays true; the row at which counting stopped
        is looked at again each time, and where it is another one (the file was put back while it
        was in use) everything is counted anew.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._counts: dict[str, dict[PromisedEvent | UnboundedEvent, int]] = {}
        self._seq, self._hash = 0, GENESIS

    def counted(
        self, db: sqlite3.Connection, dataset: str
    ) -> Mapping[PromisedEvent | UnboundedEvent, int]:
        """Each event on `dataset`, and how often it was charged.

        Raises:
            ValueError: where an event cannot be read.
        """
        self._catch_up(db)
        return self._counts.get(dataset, {})

    def _catch_up(self, db: sqlite3.Connection) -> None:
        if not self._stands(db):
            self._counts, self._seq, self._hash = {}, 0, GENESIS
        last = db.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        if last is None or last[0] == self._seq:
            return
        new = [
            (name, event_from_json(text), times)
            for name, text, times in db.execute(_NEW, (self._seq, last[0]))
        ]
        for name, event, times in new:
            counts = self._counts.setdefault(name, {})
            counts[event] = counts.get(event, 0) + times
        self._seq, self._hash = last

    def _stands(self, db: sqlite3.Connection) -> bool:
        """Whether the row at which counting stopped is still there."""
        if self._seq == 0:
            return True
        row = db.execute("SELECT hash FROM event WHERE seq = ?", (self._seq,)).fetchone()
        return row is not None and row[0] == self._hash
