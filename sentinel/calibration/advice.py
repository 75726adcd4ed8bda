"""Advice: the rule that a calibrated threshold would make, where that is stricter than what stands.

A calibrated threshold may only tighten. Where ordinary rounds of a site score above the threshold
that stands, or above the shipped one, nothing looser is advised: the rate at which that one alarms
is stated, and people decide.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from sentinel.calibration.gather import Which
from sentinel.detection import conformal
from sentinel.policy.schema import FIGURES
from sentinel.terms import Action

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sentinel.policy import Policy
    from sentinel.policy.schema import Rule

SHIPPED = 0.5  # the shipped policies refuse at this suspicion, and tighten at this sensitivity
_STEP = Decimal("0.0001")


@dataclass(frozen=True, slots=True)
class Advice:
    """What a calibration means for a policy.

    Attributes:
        least: the smallest threshold of a rule that alarms above the calibrated one only.
        standing: the threshold that stands: the policy's smallest, and never above the shipped one.
        rate: how often the standing one alarms on the calibration rounds.
        at: threshold of the advised rule: `least` and the room that was asked for.
        rule: its TOML; empty where `at` is not below `standing`, so that it would not tighten.
    """

    which: Which
    least: float
    standing: float
    rate: conformal.Rate
    at: float
    rule: str

    @property
    def exceeded(self) -> bool:
        """Whether the standing threshold alarms more often than was asked for, or may."""
        return self.least > self.standing


def advise(
    which: Which,
    scores: Sequence[float],
    found: conformal.Threshold,
    policy: Policy,
    *,
    room: float = 0.0,
) -> Advice:
    """Say what the threshold of some rounds means for a policy.

    Args:
        which: what was scored.
        scores: of the calibration rounds.
        found: their threshold.
        policy: in force.
        room: how far above the smallest threshold the rule is to be, 0 to 1: every threshold up to
            the standing one keeps the rate, and a slow trend soon crosses the smallest.
    """
    model = _lowest(which, policy)
    own = None if model is None or model.when is None else getattr(model.when, which)
    standing = SHIPPED if own is None else min(float(own), SHIPPED)
    least = just_above(found.score)
    at = just_above(found.score + room)
    rule = rule_text(which, model, at) if at < standing else ""
    return Advice(which, least, standing, conformal.rate_at(scores, standing), at, rule)


def just_above(score: float) -> float:
    """The next number of four digits: a rule applies *at* its threshold, an alarm lies above."""
    return float(Decimal(math.floor(Decimal(repr(score)) / _STEP) + 1) * _STEP)


def _lowest(which: Which, policy: Policy) -> Rule | None:
    """The rule that waits for this score alone, at the smallest threshold."""
    found = [rule for rule in policy.rules if _waits_for(rule, which)]
    return min(found, key=lambda rule: getattr(rule.when, which), default=None)


def _waits_for(rule: Rule, which: Which) -> bool:
    return rule.when is not None and rule.when.model_fields_set == {which.value}


def rule_text(which: Which, model: Rule | None, least: float) -> str:
    """A rule in TOML that asks what `model` asks, at a threshold of its own.

    Where there is no model, suspicion refuses the round and sensitivity withholds the update.
    """
    lines = ["[[rule]]", f'id = "calibrated-{which}"']
    if model is None:
        action = Action.REFUSE_ROUND if which is Which.SUSPICION else Action.WITHHOLD_UPDATE
        return "\n".join([*lines, _when(which, least), f'action = "{action.word}"'])
    if not model.everywhere:
        lines.append(f"match = {json.dumps(list(model.match))}")
    return "\n".join([*lines, _when(which, least), *_asked(model)])


def _when(which: Which, least: float) -> str:
    return f"when = {{ {which} = {least:.4f} }}"


def _asked(model: Rule) -> Iterator[str]:
    if model.action is not Action.RELEASE:
        yield f'action = "{model.action.word}"'
    for knob in FIGURES:
        value = getattr(model, knob)
        if value is not None:
            yield f"{knob} = {json.dumps(value)}"
