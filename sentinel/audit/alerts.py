"""Alerts: one operational event per refusal or weakened control, behind an allow-list.

An alert is a closed event with a reason code; each code has its line in docs/runbook.md. Nothing
else can be written: a field or a value that is not on the list raises before a byte is out.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from typing import TYPE_CHECKING, Any

import structlog

from sentinel.terms import Reason, Verdict, Weakness

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import TextIO


class AlertEvent(enum.StrEnum):
    """What may be said."""

    ROUND_REFUSED = "round refused"
    UPDATE_WITHHELD = "update withheld"
    CONTROL_WEAKENED = "control weakened"
    GUARD_NOT_STARTED = "guard not started"


_ALLOWED: dict[str, type] = {
    "reason": Reason,
    "verdict": Verdict,
    "weakness": Weakness,
    "round": int,
}


class Alerts:
    """Writes alerts, one line each, to a stream (standard error where left out)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Build a logger of its own; the application's structlog configuration stays as it is."""
        self._log = structlog.wrap_logger(
            structlog.PrintLogger(stream or sys.stderr),
            processors=[
                _allow_listed,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.LogfmtRenderer(key_order=["timestamp", "event"]),
            ],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )

    def send(self, event: AlertEvent, **fields: Reason | Verdict | Weakness | int) -> None:
        """Write one alert; a stream that is closed or full keeps no refusal from being raised."""
        with contextlib.suppress(OSError, ValueError):
            self._log.msg(event, **fields)


def _allow_listed(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Raise for anything but an alert's own words."""
    for name, value in event.items():
        expected = AlertEvent if name == "event" else _ALLOWED.get(name)
        if expected is None or type(value) is not expected:
            raise TypeError("an alert holds reason codes and round numbers only")
    return {name: value if type(value) is int else str(value) for name, value in event.items()}
