"""Deadlines: how long a part of the test may take, on a clock that only goes forward."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


class OutOfTimeError(Exception):
    """Raised by what the end of its time would cripple; nothing came of it."""


@dataclass(slots=True)
class Stop:
    """Whether somebody asked for the end of the test.

    Code of the site, or of a library, may swallow an interrupt; it does not swallow this.
    """

    asked: bool = False


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment after which nothing new is begun.

    Attributes:
        at: on `time.monotonic()`, in seconds.
        stop: where it is asked for, the moment has come.
    """

    at: float
    stop: Stop = field(default_factory=Stop)

    @classmethod
    def after(cls, seconds: float, stop: Stop | None = None) -> Deadline:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds, stop or Stop())

    @classmethod
    def never(cls) -> Deadline:
        """One that does not pass."""
        return cls(math.inf)

    @property
    def left(self) -> float:
        """Seconds left, 0 where it has passed."""
        return 0.0 if self.stop.asked else max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.stop.asked or time.monotonic() >= self.at

    def require(self, seconds: float = 0.0) -> None:
        """See that so much time is left.

        Raises:
            OutOfTimeError: it is not.
        """
        if self.passed or seconds > self.left:
            raise OutOfTimeError

    def before(self, other: Deadline) -> Deadline:
        """The earlier of both."""
        return self if self.at <= other.at else other

    def share(self, part: float) -> Deadline:
        """A deadline after `part` of what is left, never later than this one."""
        return Deadline(min(self.at, time.monotonic() + self.left * part), self.stop)
