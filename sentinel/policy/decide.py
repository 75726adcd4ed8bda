"""From a policy and the evidence to a plan: pure, order-free, and only ever stricter.

- Only a rule without `when` lets a parameter leave; a parameter that none matches does not leave.
- All rules that apply combine by the strictest value of each knob, so their order cannot matter.
- More evidence makes more rules apply, so it can only tighten.

The same functions tell `explain` which rule decided what, so that it cannot tell another story.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from sentinel.policy.fields import AUTO
from sentinel.policy.globs import EVERYTHING, matches
from sentinel.terms import Action, Evidence, NormBound, Plan, Treatment, Unit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from sentinel.policy.schema import Policy, Rule, When

Knob = Literal["action", "max_norm", "max_abs", "noise_ratio", "noise_multiplier", "keep"]

_LARGER_IS_STRICTER: dict[Knob, bool] = {
    "action": True,
    "max_norm": False,
    "max_abs": False,
    "noise_ratio": True,
    "noise_multiplier": True,
    "keep": False,
}
KNOBS = tuple(_LARGER_IS_STRICTER)
NOISES: tuple[Knob, Knob] = ("noise_ratio", "noise_multiplier")  # the larger noise is added


class Strictest(NamedTuple):
    """The strictest value of a knob, and the ids of the rules that ask for it, in file order."""

    value: float
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opening:
    """What the policy says when a round opens, before there is an update.

    Attributes:
        action: RELEASE (go on), WITHHOLD_UPDATE (whatever training yields will stay) or
            REFUSE_ROUND (do not train).
        decided_by: ids of the rules that ask for that action, in file order.
    """

    action: Action
    decided_by: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether the round is refused."""
        return self.action is Action.REFUSE_ROUND


def at_least(value: float, bound: float, knob: Knob) -> bool:
    """Say whether `value` is as strict as `bound`, or stricter."""
    return value >= bound if _LARGER_IS_STRICTER[knob] else value <= bound


def strictest(rules: Iterable[Rule], knob: Knob) -> Strictest | None:
    """Return the strictest value of one knob; None where no rule sets it.

    Of a policy with `max_norm = "auto"`, the rules are those of `Policy.resolved`.
    """
    asked = [(rule.id, value) for rule in rules if (value := getattr(rule, knob)) is not None]
    if not asked:
        return None
    values = [value for _, value in asked]
    best = max(values) if _LARGER_IS_STRICTER[knob] else min(values)
    return Strictest(best, tuple(name for name, value in asked if value == best))


def let_out(policy: Policy, names: Iterable[str]) -> frozenset[str]:
    """Return the names that the policy ever lets leave, whatever is measured.

    Those are matched by at least one rule without `when`, and by none that withholds them. An
    empty policy lets nothing out.

    Args:
        policy: the policy.
        names: dotted names of parameters.

    Guarantees:
        A name is in or out by itself: neither other names, nor the order of rules, nor a rule with
        `when` has a part in it.

    Edges:
        an empty policy, or no names:                        nothing
        a name that no rule matches:                         stays
        a name that only rules with `when` match:            stays
        a name that one rule lets out and another withholds: stays
    """
    always = policy.always
    return frozenset(name for name in names if _leaves(always, name))


def unmatched(policy: Policy, names: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Return every glob that matches none of `names`, with the id of its rule: (id, glob).

    Such a glob is most likely mistyped, and its rule protects nothing. `**` is never among them.
    """
    return tuple(
        (rule.id, glob)
        for rule in policy.rules
        for glob in rule.match
        if glob != EVERYTHING and not any(matches((glob,), name) for name in names)
    )


def refuses(policy: Policy, suspicion: float, *, unhealthy: bool) -> Opening:
    """Decide at the opening of a round, by the rules that ask for the global model alone.

    Args:
        policy: the policy.
        suspicion: suspicion about the global model, 0 to 1.
        unhealthy: whether the global model is broken rather than crafted.

    Returns:
        The opening; `.refused` says whether to train at all.

    Raises:
        ValueError: `suspicion` is not a number from 0 to 1.
    """
    evidence = Evidence({}, 0.0, suspicion, 0.0, unhealthy)
    rules = [
        rule
        for rule in policy.rules
        if rule.action >= Action.WITHHOLD_UPDATE
        and known_at_opening(rule.when)
        and reached(rule.when, evidence)
    ]
    found = strictest(rules, "action")
    if found is None:
        return Opening(Action.RELEASE, ())
    return Opening(Action(int(found.value)), found.rules)


def decide(policy: Policy, evidence: Evidence) -> Plan:
    """Decide what is done to an update.

    Args:
        policy: the policy.
        evidence: all that the decision may look at. Names that the policy never lets out may be
            among its coordinates; they are withheld and enter no bound. Its `auto_norms` stand in
            for `max_norm = "auto"`, held between floor and ceiling.

    Returns:
        A plan with one treatment per parameter of the evidence. `noise_std` is the whole standard
        deviation wanted per coordinate: where noise is there already, the caller adds what is
        missing.

    Guarantees:
        Each of these is property-tested. The order of rules never matters; a rule with `when` only
        tightens; a further rule weakens no parameter that was let out without it; more sensitivity,
        suspicion, spent budget or ill health weakens no knob and lowers no standard deviation. With
        `max_norm = "auto"` they hold for given `auto_norms`, and whatever these are, no bound lies
        outside floor and ceiling, and noise is measured by the bound in force. The noise is the
        larger of the two that are asked for, and that of `noise_multiplier` is as large on each
        value of a wide model as of a narrow one.

    Edges:
        an empty policy:                            WITHHOLD, for all and each
        a parameter that no rule matches:           withheld; the others leave
        no parameter:                               WITHHOLD
        a parameter without values:                 leaves like any other; its deviation is finite
        a score right at a threshold:               it is reached
        several thresholds in one rule:             all have to be reached
        a name that never leaves, among the others: changes nothing else
        a parameter withheld for now:               counts in every bound on it
        both noises asked for:                      the larger standard deviation, not their sum
        `auto_norms` left out:                      the middle of floor and ceiling
        `auto_norms` that are NaN, Inf or negative: between floor and ceiling
    """
    policy = policy.resolved(evidence.auto_norms)
    open_names = let_out(policy, evidence.coordinates)
    asked = _asked(policy, evidence)
    reach = {name: reaching(asked, name) for name in evidence.coordinates}
    actions = {
        name: _action(rules) if name in open_names else Action.WITHHOLD
        for name, rules in reach.items()
    }
    released = [name for name, action in actions.items() if action is Action.RELEASE]
    units = unit_stds(policy, sum(evidence.coordinates[name] for name in released))
    return Plan(
        action=_whole(asked, released),
        treatments=_treatments(reach, actions, units),
        bounds=_bounds(asked, open_names),
        decided_by=tuple(rule.id for rule in asked),
    )


def unit_stds(policy: Policy, coordinates: int) -> dict[Knob, float]:
    """Return the standard deviation per coordinate that each noise stands for at 1.

    Args:
        policy: the policy, its max_norm numbers.
        coordinates: how many values are released.
    """
    norm = policy.noise_norm or 0.0
    # Fewer coordinates share the norm of noise_ratio, so that withholding never lowers it.
    return {"noise_ratio": norm / math.sqrt(max(coordinates, 1)), "noise_multiplier": norm}


def site_std(policy: Policy) -> float:
    """Return the standard deviation that a promise for the site adds to every value; 0 without."""
    promise = policy.privacy
    if promise is None or promise.unit is not Unit.SITE:
        return 0.0
    return promise.noise_multiplier * promise.clip_norm


def released_values(plan: Plan, coordinates: Mapping[str, int]) -> int:
    """Return how many of the values behind these names the plan releases."""
    return sum(
        count
        for name, count in coordinates.items()
        if plan.treatments[name].action is Action.RELEASE
    )


def applied(policy: Policy, evidence: Evidence) -> tuple[Rule, ...]:
    """Return the rules that apply, in file order: reached, and matching something if need be.

    In them `max_norm = "auto"` is this round's bound.
    """
    return tuple(_asked(policy.resolved(evidence.auto_norms), evidence))


def reaching(rules: Iterable[Rule], name: str) -> list[Rule]:
    """Return those of `rules` that match the parameter."""
    return [rule for rule in rules if matches(rule.match, name)]


def reach_of(rule: Rule, names: Iterable[str]) -> frozenset[str]:
    """Return those of `names` that the rule matches."""
    return frozenset(name for name in names if matches(rule.match, name))


def reached(when: When | None, evidence: Evidence) -> bool:
    """Say whether every threshold is reached; a rule without any always applies."""
    if when is None:
        return True
    scores = ("sensitivity", "suspicion", "budget_spent")
    thresholds = ((getattr(when, score), getattr(evidence, score)) for score in scores)
    high_enough = all(at is None or score >= at for at, score in thresholds)
    return high_enough and (not when.unhealthy or evidence.unhealthy)


def known_at_opening(when: When | None) -> bool:
    """Say whether the thresholds ask for the global model alone, which is known before training."""
    return when is None or (when.sensitivity is None and when.budget_spent is None)


def _leaves(always: Iterable[Rule], name: str) -> bool:
    rules = reaching(always, name)
    return bool(rules) and all(rule.action is Action.RELEASE for rule in rules)


def _asked(policy: Policy, evidence: Evidence) -> list[Rule]:
    """Return the rules that apply; one about the update as a whole needs no parameter to match."""
    return [
        rule
        for rule in policy.rules
        if reached(rule.when, evidence)
        and (
            rule.action >= Action.WITHHOLD_UPDATE
            or any(matches(rule.match, name) for name in evidence.coordinates)
        )
    ]


def _action(rules: list[Rule]) -> Action:
    """Return what happens to one parameter: the update's own actions are the plan's to carry."""
    withheld = any(rule.action >= Action.WITHHOLD for rule in rules)
    return Action.WITHHOLD if withheld else Action.RELEASE


def _whole(asked: list[Rule], released: Collection[str]) -> Action:
    found = strictest(asked, "action")
    if found is not None and found.value >= Action.WITHHOLD_UPDATE:
        return Action(int(found.value))
    return Action.RELEASE if released else Action.WITHHOLD


def _treatments(
    reach: Mapping[str, list[Rule]],
    actions: Mapping[str, Action],
    units: Mapping[Knob, float],
) -> dict[str, Treatment]:
    """Return one treatment per parameter: the same one wherever the same rules say so."""
    made: dict[tuple[Action, tuple[str, ...]], Treatment] = {}
    found = {}
    for name, rules in reach.items():
        key = (actions[name], tuple([rule.id for rule in rules]))
        if key not in made:
            made[key] = _treatment(rules, actions[name], units)
        found[name] = made[key]
    return found


def _treatment(rules: list[Rule], action: Action, units: Mapping[Knob, float]) -> Treatment:
    max_abs, keep = strictest(rules, "max_abs"), strictest(rules, "keep")
    asked = [(strictest(rules, knob), unit) for knob, unit in units.items()]
    return Treatment(
        action=action,
        max_abs=max_abs.value if max_abs else math.inf,
        noise_std=max((noise.value * unit for noise, unit in asked if noise), default=0.0),
        keep=keep.value if keep else 1.0,
    )


def _bounds(asked: list[Rule], names: Collection[str]) -> tuple[NormBound, ...]:
    """Return the norm bounds, the smallest where several are about the same parameters.

    A bound counts every parameter that could leave, also one that another rule withholds now:
    otherwise more risk would make the norm smaller and the scaling milder.
    """
    smallest: dict[frozenset[str], float] = {}
    for rule in asked:
        if rule.max_norm is None:
            continue
        if rule.max_norm == AUTO:
            raise ValueError('expected the policy that `resolved` gives, without "auto"')
        reach = reach_of(rule, names)
        if reach:
            smallest[reach] = min(rule.max_norm, smallest.get(reach, math.inf))
    ordered: Mapping[frozenset[str], float] = dict(
        sorted(smallest.items(), key=lambda item: (item[1], sorted(item[0])))
    )
    return tuple(NormBound(reach, norm) for reach, norm in ordered.items())
