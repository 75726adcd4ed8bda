"""The errors: the caller's mistake, or something withheld. Each carries a reason code.

No message ever holds a tensor value, a record, or text that came from data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
