"""Memory: the bounds of one run on disk, from round to round.

A file holds, for each rule with `max_norm = "auto"`, one `Bound`: some 520 numbers and a few
digests. They describe global models and released updates, which the server has seen, and are no
tensor of either. The file is replaced whole, so that `kill -9` leaves the old bounds or the new.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from sentinel.adaptive.bound import REMEMBERED, STEPS, Bound
from sentinel.adaptive.sketch import WIDTH
from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from sentinel.adaptive.bound import Seen
    from sentinel.terms import AutoNorm

_VERSION = 1
_DIGEST = 64  # hexadecimal digits
_LARGEST_NUMBER = 2**53


class Keeper(Protocol):
    """A small text that is replaced whole, durably."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold it alone."""

    def read(self) -> str | None:
        """The text; None where there is none yet."""

    def write(self, text: str) -> None:
        """Replace the text."""


class Memory:
    """The bounds of one run.

    Guarantees:
        What it holds are `Bound`s, so no tensor and no figure of an update that did not leave. The
        file is replaced whole; `learn` holds its lock from reading to writing.

    Edges:
        no file yet:                      `norms` gives every bound fresh
        a file that cannot be understood: Withheld (STATE_UNSAFE); it is neither mended nor replaced
        killed while writing:             the old file or the new one, whole
        two processes `learn` at once:    both rounds count
        a rule that is gone:              forgotten with the next round
        limits that have changed:         hold at once
    """

    def __init__(self, keeper: Keeper) -> None:
        """Remember in `keeper`."""
        self._keeper = keeper

    def norms(self, limits: Mapping[str, AutoNorm]) -> dict[str, float]:
        """The bound of the next round: rule -> L2 norm, within its limits.

        Raises:
            Withheld: STATE_UNSAFE where what is remembered cannot be read.
        """
        return {rule: bound.norm for rule, bound in self._bounds(limits).items()}

    def learn(
        self, limits: Mapping[str, AutoNorm], seen: Mapping[str, Seen], used: Mapping[str, float]
    ) -> None:
        """Count one released round, once.

        Args:
            limits: rule -> floor and ceiling.
            seen: rule -> what the round shows; a rule that is left out keeps its bound.
            used: rule -> the bound that was in force.

        Raises:
            Withheld: as `norms`.
        """
        with self._keeper.locked():
            bounds = self._bounds(limits)
            for rule, one in seen.items():
                bounds[rule] = bounds[rule].after(one, used[rule], limits[rule])
            self._keeper.write(_written(bounds))

    def _bounds(self, limits: Mapping[str, AutoNorm]) -> dict[str, Bound]:
        text = self._keeper.read()
        known = {} if text is None else _understood(text)
        return {
            rule: known[rule].within(limit) if rule in known else Bound.fresh(limit)
            for rule, limit in limits.items()
        }


def _written(bounds: Mapping[str, Bound]) -> str:
    rules = {rule: asdict(bound) for rule, bound in bounds.items()}
    return json.dumps({"version": _VERSION, "rules": rules}, allow_nan=False)


def _understood(text: str) -> dict[str, Bound]:
    try:
        data = json.loads(text, parse_constant=_refused)
        _require(data.pop("version") == _VERSION)
        return {rule: _bound(fields) for rule, fields in data.pop("rules").items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Withheld(
            Reason.STATE_UNSAFE,
            'What is remembered for max_norm = "auto" cannot be read; put the state folder back as '
            "it was, or give a number in the policy. A new run begins anew.",
        ) from None


def _refused(word: str) -> NoReturn:
    raise ValueError(word)


def _require(sound: bool) -> None:  # noqa: FBT001  the only argument
    if not sound:
        raise ValueError


def _bound(fields: dict[str, Any]) -> Bound:
    """A bound from JSON, every figure of it checked."""
    bound = Bound(
        norm=_number(fields.pop("norm")),
        variance=_number(fields.pop("variance")),
        reach=fields.pop("reach"),
        number=fields.pop("number"),
        counted=tuple(_digest(one) for one in fields.pop("counted")),
        model=_numbers(fields.pop("model"), {0, WIDTH}),
        step=_numbers(fields.pop("step"), {0, WIDTH}),
        coherent=_numbers(fields.pop("coherent"), set(range(STEPS + 1))),
    )
    _require(not fields and bound.norm > 0 and bound.variance >= 0)
    _require(type(bound.number) is int and -1 <= bound.number <= _LARGEST_NUMBER)
    _require(len(bound.counted) <= REMEMBERED and min(bound.coherent, default=0.0) >= 0)
    _require(bound.reach == "" or bound.reach == _digest(bound.reach))
    return bound


def _digest(value: object) -> str:
    _require(isinstance(value, str))
    text = str(value)
    _require(len(text) == _DIGEST and not set(text) - set("0123456789abcdef"))
    return text


def _number(value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError
    return value


def _numbers(values: list[object], lengths: set[int]) -> tuple[float, ...]:
    _require(len(values) in lengths)
    return tuple(_number(value) for value in values)
