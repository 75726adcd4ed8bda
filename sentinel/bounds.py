"""Bounds: what `max_norm = "auto"` comes to in one round, and what a released round teaches it.

- The bound of a round rests on earlier rounds alone; the update has no part in it.
- Only a released round teaches. What is read of it is the released state, the global model, the
  policy and the public part of the evidence: neither the raw update, nor its score, nor whether it
  was clipped. A round that was withheld, refused or given again teaches nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from sentinel.adaptive import Seen, fill_of, shown, sketch
from sentinel.policy import decide, let_out
from sentinel.policy.decide import reach_of
from sentinel.terms import Action

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from sentinel.adaptive import Shown
    from sentinel.house import House
    from sentinel.policy import Policy
    from sentinel.releases import RoundKey
    from sentinel.terms import Evidence, Plan


def auto_norms(house: House, key: RoundKey) -> dict[str, float]:
    """The bound of every rule with `max_norm = "auto"` in this round: rule -> L2 norm.

    Raises:
        Withheld: STATE_UNSAFE where what is remembered cannot be read.

    Guarantees:
        Rests on policy, released rounds and global models alone; between floor and ceiling of each
        rule.

    Edges:
        no rule with `max_norm = "auto"`: none; no memory is touched
        the first round of a run:         the geometric middle of floor and ceiling
        a memory that cannot be read:     Withheld (STATE_UNSAFE)
    """
    limits = house.rules.autos
    return house.memory(key).norms(limits) if limits else {}


def learn(  # noqa: PLR0913 - what left, and all that is public about it
    house: House,
    key: RoundKey,
    evidence: Evidence,
    base: Mapping[str, torch.Tensor],
    released: Mapping[str, torch.Tensor],
    *,
    deltas: bool,
    aliases: Mapping[str, str],
) -> None:
    """Let the bounds of the next round follow from what left in this one.

    Args:
        house: policy and memory.
        key: the round, whose release is durable already.
        evidence: of this round; its score is not looked at.
        base: the global model.
        released: what left: weights, or differences where `deltas`.
        deltas: whether `released` holds differences.
        aliases: tied name -> the name of the tensor it shares.

    Raises:
        Withheld: the memory cannot be read.

    Guarantees:
        Reads what left, the global model, the policy and the public part of the evidence. The
        score, the raw update and the plan that was carried out have no part in it.

    Edges:
        no rule with `max_norm = "auto"`:  nothing is kept
        a round that was learnt before:    counts once
        no tensor that the bound is about: the rule keeps its bound
        tied tensors:                      count once, under their first name
        a memory that cannot be read:      Withheld (STATE_UNSAFE)
        a memory that cannot be written:   Withheld (STORAGE_FAILED); asked for again, the round
                                           gives what it stored
    """
    limits = house.rules.autos
    if not limits:
        return
    reach = _reach(house.rules, evidence, aliases)
    parts = shown(base, released, frozenset().union(*reach.values()), deltas=deltas)
    plans = possible_plans(house.rules, evidence)
    seen = {}
    for rule, names in reach.items():
        looked_at = {name: parts[name] for name in names}
        fill = fill_of(looked_at, plans, evidence.auto_norms[rule], aliases)
        seen[rule] = Seen(
            round=key.digest,
            number=key.number,
            reach=_digest(looked_at),
            fill=None if fill is None else fill.value,
            blur=0.0 if fill is None else fill.blur,
            model=sketch(base, names),
            coordinates=sum(part.values for part in looked_at.values()),
        )
    house.memory(key).learn(limits, seen, evidence.auto_norms)


def possible_plans(policy: Policy, evidence: Evidence) -> list[Plan]:
    """Every plan that releases and that some sensitivity score leads to, the calmest first.

    Guarantees:
        The score of `evidence` has no part in it.

    Edges:
        no rule on the score:                one plan
        a rule that withholds above a score: the plans below it alone
        nothing may leave at any score:      none
    """
    asked = {rule.when.sensitivity for rule in policy.rules if rule.when is not None}
    scores = sorted({0.0} | {score for score in asked if score is not None})
    plans = [decide(policy, replace(evidence, sensitivity=score)) for score in scores]
    return [plan for plan in plans if plan.action is Action.RELEASE]


def _reach(
    policy: Policy, evidence: Evidence, aliases: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """The tensors that each bound is about, tied ones by their first name; no empty reach."""
    names = let_out(policy, evidence.coordinates)
    found = {
        rule.id: frozenset(aliases.get(name, name) for name in reach_of(rule, names))
        for rule in policy.rules
        if rule.auto is not None
    }
    return {rule: reach for rule, reach in found.items() if reach}


def _digest(parts: Mapping[str, Shown]) -> str:
    """SHA-256 of names and sizes: bounds about other parameters are no guide to these."""
    sizes: Iterable[tuple[str, int]] = sorted((name, part.values) for name, part in parts.items())
    return hashlib.sha256(json.dumps(list(sizes)).encode()).hexdigest()
