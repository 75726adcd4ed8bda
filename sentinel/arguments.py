"""Arguments: what callers hand in, checked where it arrives; whatever cannot be right is misuse."""

from __future__ import annotations

import math
import operator
import os
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.policy import LoadedPolicy, load_policy

if TYPE_CHECKING:
    import enum
    from pathlib import Path

_LARGEST_NUMBER = 2**53
_LONGEST_NAME = 200


def require_name(name: str, what: str) -> str:
    """A name that can be printed."""
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise MisuseError(f"{what} must be a printable name of 1 to 200 characters.")
    return name


def require_dataset(loaded: LoadedPolicy, dataset: str | None) -> None:
    """Refuse to name another dataset than the policy does."""
    if dataset is not None and dataset != loaded.policy.dataset:
        raise MisuseError(
            f"The policy is for the dataset {loaded.policy.dataset!r}; code may only repeat that "
            "name. Change the policy file to name another."
        )


def require_policy(policy: str | Path | LoadedPolicy) -> LoadedPolicy:
    """The policy itself, whichever way it was named."""
    if isinstance(policy, LoadedPolicy):
        return policy
    if isinstance(policy, str | os.PathLike):
        return load_policy(policy)
    raise MisuseError(
        "policy must be the name of a shipped policy, the path of a policy file, or what "
        "load_policy gave."
    )


def require_whole(value: object, what: str) -> int:
    """A whole number from 0, also from numpy; a boolean or a decimal number is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise MisuseError(f"{what} must be a whole number; convert it with int(...).")
    number = operator.index(value)
    if not 0 <= number <= _LARGEST_NUMBER:
        raise MisuseError(f"{what} must be a number from 0 to 2**53.")
    return number


def require_kind(kind: object) -> None:
    """One of the two forms in which an update is released."""
    if kind not in ("weights", "delta"):
        raise MisuseError('kind must be "weights" or "delta".')


def require_stage(stage: enum.Enum, *expected: enum.Enum) -> None:
    """Refuse what does not come next; the value of a stage says in words where a round stands."""
    if stage not in expected:
        words = " or ".join(one.value for one in expected)
        raise MisuseError(f"The round is {stage.value}; expected: {words}.")


def require_number(value: object, name: str) -> float:
    """A finite number; also of numpy, and a tensor of one value."""
    refusal = MisuseError(f"Metric {name!r} must be a finite number.")
    if isinstance(value, bool | str):
        raise refusal
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise refusal from None
    if not math.isfinite(number):
        raise refusal
    return value if isinstance(value, int) else number
