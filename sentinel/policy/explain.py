"""Tell, per group of parameters, what a policy does with given evidence and which rule decided.

The values come from `decide` itself; this module only says where each came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sentinel.policy.decide import (
    KNOBS,
    Knob,
    Strictest,
    applied,
    decide,
    let_out,
    reaching,
    released_values,
    site_std,
    strictest,
    unit_stds,
)
from sentinel.policy.globs import EVERYTHING, matches
from sentinel.terms import Action, Evidence, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentinel.policy.schema import Policy, Rule
    from sentinel.terms import Plan

USABLE_RATIO, USABLE_MULTIPLIER = 65.0, 1.0
"""The most noise, beside the clip, that four sites were measured to learn under at a cost of about
2 points of area under the ROC curve and 3 of accuracy: its norm, and that on each value. On 13
columns of tabular records and a perceptron of 3841 values (docs/stress.md); a convolutional net of
17 000 values lost as much accuracy at a ratio of 32 already, and more columns ask for larger
updates than such a clip lets through."""

EVERY = "every parameter"
OTHERS = "every other parameter"


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that the same rules reach.

    Attributes:
        parameters: their names; without a model, the globs that stand for them.
        coordinates: how many values they have together; 0 without a model.
        action: what happens to them.
        rules: ids of the rules that reach them now, in file order.
        knobs: knob -> its value and the ids of the rules that decided it; unset knobs are absent,
            and with a model so is the smaller of the two noises, which decides nothing.
        noise_std: standard deviation of the noise per coordinate; 0 without a model.
    """

    parameters: tuple[str, ...]
    coordinates: int
    action: Action
    rules: tuple[str, ...]
    knobs: Mapping[Knob, Strictest]
    noise_std: float


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one update beside its clip, both as L2 norms before the mask.

    Attributes:
        norm: expected norm of the noise.
        clip: bound on the norm of the signal; infinite where nothing bounds it.
        coordinates: how many values are released.
        trained: whether noise is in the update already, from every step of the training; it is no
            part of `norm`, and what bounds a step is no part of `clip`.
    """

    norm: float
    clip: float
    coordinates: int
    trained: bool = False

    @property
    def ratio(self) -> float:
        """How many times as large as the signal the noise is, at least."""
        return self.norm / self.clip

    @property
    def multiplier(self) -> float:
        """How many times as large as the whole signal the noise on each value is, at least."""
        return self.ratio / math.sqrt(max(self.coordinates, 1))

    @property
    def drowns(self) -> bool:
        """Whether the noise is so large that a small federation learns little."""
        return self.ratio > USABLE_RATIO or self.multiplier > USABLE_MULTIPLIER * (1.0 + 1e-9)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a policy does with given evidence; `noise` is None without a model."""

    action: Action
    decided_by: tuple[str, ...]
    groups: tuple[Group, ...]
    noise: Noise | None = field(default=None)


def explain(
    policy: Policy, evidence: Evidence, *, labels: Mapping[str, str] | None = None
) -> Explanation:
    """Explain the plan for `evidence`, whose coordinates are a model's.

    Args:
        policy: the policy.
        evidence: scores, and name -> number of values.
        labels: name -> what to call it; given where the names only stand for globs.

    Returns:
        Groups in the order of the model, and the noise beside the clip unless `labels` are given.
    """
    plan = decide(policy, evidence)
    now = applied(policy, evidence)
    leaving = let_out(policy, evidence.coordinates)
    grouped: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for name in evidence.coordinates:
        key = (tuple(rule.id for rule in reaching(now, name)), name in leaving)
        grouped.setdefault(key, []).append(name)
    groups = tuple(
        _group(names, reaching(now, names[0]), plan, evidence, labels) for names in grouped.values()
    )
    if not labels:
        released = released_values(plan, evidence.coordinates)
        units = unit_stds(policy.resolved(evidence.auto_norms), released)
        base = site_std(policy)
        groups = tuple(replace(group, knobs=_deciding(group, units, base)) for group in groups)
    return Explanation(
        action=plan.action,
        decided_by=plan.decided_by,
        groups=groups,
        noise=None if labels else _noise(policy, plan, evidence),
    )


def stand_ins(policy: Policy) -> dict[str, str]:
    """Return one made-up name per glob of the policy, and one for all the rest: name -> label.

    With them a policy can be explained without a model. Parameters that two globs match at once
    are shown only with a model.
    """
    labels: dict[str, str] = {}
    for glob in dict.fromkeys(glob for rule in policy.rules for glob in rule.match):
        if glob != EVERYTHING:
            labels.setdefault(glob.replace("**", "any").replace("*", "any"), glob)
    globs = tuple(labels.values())
    for depth in range(1, len(globs) + 2):  # deep enough to slip under *, *.* and so on
        other = ".".join(["other"] * depth)
        if not matches(globs, other):
            return {**labels, other: OTHERS if labels else EVERY}
    return labels


def _group(
    names: list[str],
    rules: list[Rule],
    plan: Plan,
    evidence: Evidence,
    labels: Mapping[str, str] | None,
) -> Group:
    treatment = plan.treatments[names[0]]
    knobs = {knob: found for knob in KNOBS if (found := _strictest(rules, knob)) is not None}
    return Group(
        parameters=tuple(labels[name] if labels else name for name in names),
        coordinates=0 if labels else sum(evidence.coordinates[name] for name in names),
        action=treatment.action,
        rules=tuple(rule.id for rule in rules),
        knobs=knobs,
        noise_std=0.0 if labels else treatment.noise_std,
    )


def _deciding(group: Group, units: Mapping[Knob, float], base: float) -> dict[Knob, Strictest]:
    """Leave out a noise that is smaller than the one in force."""
    least = max(group.noise_std, base)
    return {
        knob: found
        for knob, found in group.knobs.items()
        if knob not in units or found.value * units[knob] >= least
    }


def _strictest(rules: list[Rule], knob: Knob) -> Strictest | None:
    """As `strictest`; but a rule with `when` lets nothing out, so it never decides a release."""
    if knob == "action":
        rules = [rule for rule in rules if rule.when is None or rule.action]
    return strictest(rules, knob)


def _noise(policy: Policy, plan: Plan, evidence: Evidence) -> Noise:
    """Add up the noise over all released coordinates: sqrt(sum of n x std^2)."""
    base, clip = site_std(policy), math.inf
    trained = policy.privacy is not None and policy.privacy.unit is not Unit.SITE
    if policy.privacy is not None and not trained:
        clip = policy.privacy.clip_norm
    released = {
        name: evidence.coordinates[name]
        for name, treatment in plan.treatments.items()
        if treatment.action is Action.RELEASE
    }
    square = sum(
        count * max(base, plan.treatments[name].noise_std) ** 2 for name, count in released.items()
    )
    covering = [bound.max_norm for bound in plan.bounds if bound.names >= released.keys()]
    return Noise(math.sqrt(square), min([clip, *covering]), sum(released.values()), trained)
