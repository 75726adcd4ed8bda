"""The errors: the caller's mistake, or something withheld. Each carries a reason code.

No message ever holds a tensor value, a record, or text that came from data.
"""

from __future__ import annotations

from sentinel.terms import Reason


class SentinelError(Exception):
    """Base of every error this package raises on purpose."""


class MisuseError(SentinelError):
    """The caller asked for something that cannot be right; nothing was changed."""


class PolicyError(MisuseError):
    """A policy file that cannot be used; the message names file, key, and what was expected."""


class Withheld(SentinelError):
    """Nothing leaves; `reason` says why, and docs/runbook.md what to do."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep the reason code beside the sentence."""
        super().__init__(f"{message} [{reason}]")
        self.reason = reason


class RoundRefused(Withheld):
    """The incoming global model was inspected and the policy refuses to train on it."""


def unforeseen(error: Exception) -> Withheld:
    """What to raise for an error that nobody foresaw: its type and place, never its text.

    The text of a foreign error may hold values.
    """
    if isinstance(error, OSError):
        return Withheld(
            Reason.STORAGE_FAILED,
            "The state folder could not be read or written; check space and permissions.",
        )
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "?" if place is None else place.tb_frame.f_globals.get("__name__", "?")
    line = 0 if place is None else place.tb_lineno
    return Withheld(
        Reason.INTERNAL_ERROR,
        f"{type(error).__name__} at {module}:{line}; nothing was released. Please report it.",
    )
