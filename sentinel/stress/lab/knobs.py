"""Knobs: the same policy with one of its knobs turned."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.terms import Action, Unit

if TYPE_CHECKING:
    from sentinel.policy import LoadedPolicy
    from sentinel.policy.schema import Rule


class Knob(enum.StrEnum):
    """What can be turned."""

    NOISE_RATIO = "noise_ratio"
    NOISE_MULTIPLIER = "noise_multiplier"
    KEEP = "keep"
    MAX_NORM = "max_norm"


NOISES = frozenset({Knob.NOISE_RATIO, Knob.NOISE_MULTIPLIER})  # two units of the same noise


@dataclass(frozen=True, slots=True)
class Turned:
    """One knob at one value; the policy as it is where `knob` is None."""

    knob: Knob | None = None
    value: float = 0.0

    @property
    def words(self) -> str:
        """For a reader."""
        return "the policy as it is" if self.knob is None else f"{self.knob.value} {self.value:g}"


def turned(loaded: LoadedPolicy, turn: Turned) -> LoadedPolicy:
    """Return a policy whose rules for every round have this knob at this value.

    Turning one of the two noises sets the other aside in them: the larger of both is added, so that
    less of the one would show nothing. Rules with `when` stay as they are, and still tighten.

    Raises:
        MisuseError: the policy's promise fixes that knob.
    """
    if turn.knob is None:
        return loaded
    policy = loaded.policy
    if fixed := fixed_knob(loaded, turn.knob):
        raise MisuseError(fixed)
    rules = tuple(
        _with(rule, turn)
        if rule.when is None and rule.everywhere and rule.action is Action.RELEASE
        else rule
        for rule in policy.rules
    )
    digest = hashlib.sha256(f"{loaded.digest} {turn.words}".encode()).hexdigest()
    return replace(loaded, policy=policy.model_copy(update={"rules": rules}), digest=digest)


def bare(loaded: LoadedPolicy) -> LoadedPolicy:
    """Return the policy without its rules with `when`: what the knobs of every round do alone."""
    policy = loaded.policy.model_copy(update={"rules": loaded.policy.always})
    digest = hashlib.sha256(f"{loaded.digest} bare".encode()).hexdigest()
    return replace(loaded, policy=policy, digest=digest)


def fixed_knob(loaded: LoadedPolicy, knob: Knob) -> str | None:
    """Why this knob cannot be turned, as a sentence; None where it can."""
    policy = loaded.policy
    if policy.privacy is not None and policy.privacy.unit is Unit.SITE and knob is Knob.MAX_NORM:
        return "Under a promise for the site the clip is the promise's own; max_norm is no knob."
    if knob in NOISES and policy.noise_norm is None:
        return "The policy has no max_norm for every parameter, which noise is measured by."
    return None


def value_of(loaded: LoadedPolicy, knob: Knob) -> float | None:
    """The strictest value of a knob over the rules for every round; None where it is not set."""
    values = [
        value
        for rule in loaded.policy.always
        if rule.everywhere and isinstance(value := getattr(rule, knob.value), float | int)
    ]
    if not values:
        return None
    return max(values) if knob in NOISES else min(values)


def _with(rule: Rule, turn: Turned) -> Rule:
    update: dict[str, object] = {str(turn.knob): turn.value}
    if turn.knob in NOISES:
        update |= dict.fromkeys(NOISES - {turn.knob})
    if turn.knob is Knob.MAX_NORM:
        update |= {"max_norm_floor": None, "max_norm_ceiling": None}
    return rule.model_copy(update=update)
