"""Deadlines: how long a part of the test may take, on a clock that only goes forward."""

from __future__ import annotations

import time
from dataclasses import dataclass


class OutOfTimeError(Exception):
    """Raised by an attack that what is left of its time would cripple."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment after which nothing new is begun.

    Attributes:
        at: on `time.monotonic()`, in seconds.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds left, 0 where it has passed."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.at

    def share(self, part: float) -> Deadline:
        """A deadline after `part` of what is left, never later than this one."""
        return Deadline(min(self.at, time.monotonic() + self.left * part))
