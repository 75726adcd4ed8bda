"""What is wrong with a policy that the schema allows: holes, dead rules, noise that drowns.

An error means that the file does not do what a reader would take from it. A warning is a choice
that somebody should have made on purpose. A note is worth knowing before signing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sentinel.policy.decide import (
    KNOBS,
    NOISES,
    Knob,
    at_least,
    known_at_opening,
    let_out,
    reach_of,
    reaching,
    site_std,
    unit_stds,
    unmatched,
)
from sentinel.terms import Action, Unit

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Mapping

    from sentinel.policy.schema import Policy, Privacy, Rule, When
    from sentinel.terms import AutoNorm

EXPIRES_SOON = 14  # days
WIDE_LIMITS = 1000.0  # ceiling / floor of "auto"; half of it is wrong by a factor of 32 at first
LARGE_EPSILON = 10.0  # above it the bound on an attacker's gain, exp(epsilon), means little
_FEW = 10  # passes over the cohort; fewer are told with a digit behind the point
_MAX_NAMES = 20  # parameters that a note names; `explain --json` names them all
_SCORES = ("sensitivity", "suspicion", "budget_spent", "unhealthy")


class Severity(enum.StrEnum):
    """How much a finding weighs."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check` found; `rule` is the id of the rule it is about, if any."""

    severity: Severity
    message: str
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Affordable:
    """What a budget pays for from which nothing was spent yet.

    Attributes:
        count: releases of a site; steps of private training per patient or record.
        or_more: whether it was counted no further.
        spent: epsilon that so many cost; where there are none, that the first one would.
        accountant: which computation gave the figures.
    """

    count: int
    or_more: bool
    spent: float
    accountant: str


def check(
    policy: Policy,
    today: dt.date,
    candidates: Mapping[str, int] | None = None,
    *,
    pays_for: Affordable | None = None,
) -> tuple[Finding, ...]:
    """Look for what the schema cannot see.

    Args:
        policy: the policy.
        today: the date (UTC) against which `expires` is read.
        candidates: the parameters of a model that could leave, name -> number of values; with
            them, a glob that matches nothing is an error.
        pays_for: what the policy's privacy budget pays for; None where it was not worked out.

    Returns:
        All findings, errors first.
    """
    found = [
        *_lets_out_nothing(policy),
        *_expiry(policy, today),
        *_missing_protection(policy),
        *_promise(policy, pays_for),
        *(finding for rule in policy.rules for finding in _dead(policy, rule)),
    ]
    if candidates is not None:
        found += _against_model(policy, candidates)
    order = list(Severity)
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def failed(findings: tuple[Finding, ...]) -> bool:
    """Say whether at least one finding is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def _error(message: str, rule: str | None = None) -> Finding:
    return Finding(Severity.ERROR, message, rule)


def _warning(message: str, rule: str | None = None) -> Finding:
    return Finding(Severity.WARNING, message, rule)


def _note(message: str, rule: str | None = None) -> Finding:
    return Finding(Severity.NOTE, message, rule)


def _lets_out_nothing(policy: Policy) -> Iterator[Finding]:
    """Look for rules that always hold everything back, or for none that lets anything out."""
    blocking = [rule for rule in policy.always if rule.action is not Action.RELEASE]
    blocking = [rule for rule in blocking if rule.everywhere]
    for rule in blocking:
        yield _error(
            "releases nothing: this rule applies always and to every parameter, and holds it back",
            rule.id,
        )
    if not blocking and not any(rule.action is Action.RELEASE for rule in policy.always):
        yield _error(
            "releases nothing: only a rule without `when` lets parameters out, and there is none"
        )


def _expiry(policy: Policy, today: dt.date) -> Iterator[Finding]:
    if policy.expires is None:
        return
    left = (policy.expires - today).days
    if left < 0:
        yield _error(f"expired on {policy.expires}: every update is withheld; renew it")
    elif left <= EXPIRES_SOON:
        yield _warning(f"expires on {policy.expires}, in {left} days; then updates are withheld")


def _missing_protection(policy: Policy) -> Iterator[Finding]:
    if policy.privacy is None and policy.noise_norm is None:
        yield _warning(
            "no bound on the update's size: no rule without `when` gives a max_norm for every "
            "parameter (match **)"
        )
    if policy.privacy is None and not any(rule.noisy for rule in policy.always):
        yield _warning(
            "no noise on an ordinary update: no rule without `when` has a noise_ratio or a "
            "noise_multiplier"
        )
    if policy.limits.min_patients is None and not _private_in_training(policy):
        yield _warning("limits.min_patients is left out: one patient alone may be behind an update")
    stopping = [
        rule
        for rule in policy.rules
        if rule.action >= Action.WITHHOLD_UPDATE and known_at_opening(rule.when)
    ]
    if not any(rule.when is None or not rule.when.unhealthy for rule in stopping):
        yield _warning(
            "no rule stops a crafted global model; add one with when = { suspicion = 0.5 } and "
            'action = "refuse-round"'
        )
    if not any(rule.when is None or rule.when.suspicion is None for rule in stopping):
        yield _warning(
            "no rule stops a broken global model; add one with when = { unhealthy = true } and "
            'action = "refuse-round"'
        )


def _private_in_training(policy: Policy) -> bool:
    """Whether every update is private before a rule sees it, whoever is behind it."""
    return policy.privacy is not None and policy.privacy.unit is not Unit.SITE


def _promise(policy: Policy, pays_for: Affordable | None) -> Iterator[Finding]:
    privacy = policy.privacy
    if privacy is None:
        yield _note(
            "no formal guarantee: without a [privacy] table the protection is measured, not proved"
        )
        return
    if privacy.epsilon > LARGE_EPSILON:
        yield _warning(
            f"privacy.epsilon = {privacy.epsilon:g} promises next to nothing; 1 to 8 is usual"
        )
    if privacy.unit is not Unit.SITE:
        yield from _private(privacy, pays_for)
        return
    if pays_for is not None:
        yield _releases(privacy, pays_for)
    for rule in policy.rules:
        if rule.when is not None and rule.when.sensitivity is not None:
            yield _note(
                'under unit "site" the sensitivity score sees the noise of the promise, so that '
                "this rule is nearly blind",
                rule.id,
            )


def _private(privacy: Privacy, pays_for: Affordable | None) -> Iterator[Finding]:
    """Say what a promise per patient or record asks of the training code, and what it pays for."""
    if privacy.batch is None or privacy.cohort is None:
        yield _error(
            f"releases nothing: privacy.batch is missing, the {privacy.unit}s that a batch of "
            "private training is expected to hold"
        )
        return
    yield _note(
        f'under unit "{privacy.unit}" only private training is released (guard.private): each step '
        f"takes each {privacy.unit} with probability {privacy.batch / privacy.cohort:.3g}, and "
        "every other update is withheld (promise-not-kept)"
    )
    if pays_for is not None:
        yield _steps(privacy, pays_for, privacy.batch / privacy.cohort)


def _steps(privacy: Privacy, pays_for: Affordable, rate: float) -> Finding:
    """Say how many steps the budget pays for; a budget that pays for none is an error."""
    if pays_for.count == 0:
        return _error(
            f"releases nothing: the first step of private training alone spends epsilon "
            f"{pays_for.spent:.3g} by {pays_for.accountant}, more than {_budget(privacy)}; raise "
            "privacy.noise_multiplier, lower privacy.batch, or promise less with a larger epsilon"
        )
    passes = pays_for.count * rate
    told = f"{passes:.2g}" if passes < _FEW else f"{passes:,.0f}"
    return _note(
        f"the budget ({_budget(privacy)}; by {pays_for.accountant}; claimed by the training "
        f"process) pays for {_many(pays_for, 'step')} of private training in all rounds together, "
        f"which is {told} {'pass' if told == '1' else 'passes'} over the {privacy.cohort:,} "
        f"{privacy.unit}s; then nothing leaves"
    )


def _releases(privacy: Privacy, pays_for: Affordable) -> Finding:
    """Say how many releases the budget pays for; a budget that pays for none is an error."""
    if pays_for.count == 0:
        return _error(
            f"releases nothing: one release alone spends more than {_budget(privacy)}; raise "
            "privacy.noise_multiplier, or promise less with a larger epsilon"
        )
    return _note(
        f"the budget ({_budget(privacy)}; by {pays_for.accountant}) pays for "
        f"{_many(pays_for, 'release')}, then nothing leaves"
    )


def _budget(privacy: Privacy) -> str:
    return (
        f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, unit {privacy.unit}, adjacency "
        f"{privacy.adjacency}"
    )


def _many(pays_for: Affordable, what: str) -> str:
    plural = what if pays_for.count == 1 and not pays_for.or_more else f"{what}s"
    return f"{pays_for.count:,}{' or more' if pays_for.or_more else ''} {plural}"


def _dead(policy: Policy, rule: Rule) -> Iterator[Finding]:
    """Look for reasons why a rule can never apply, or changes nothing when it does."""
    when = rule.when
    if when is not None:
        yield from _unreachable(policy, rule, when)
    yield from _idle_noise(policy, rule)
    if rule.auto is not None:
        yield from _limits_of_auto(policy, rule, rule.auto)
    for other in policy.rules:
        if other is not rule and _outdone(rule, other):
            yield _warning(
                f'changes nothing: whenever it applies, rule "{other.id}" asks for as much or '
                "more; tighten it or remove it",
                rule.id,
            )
            return


def _idle_noise(policy: Policy, rule: Rule) -> Iterator[Finding]:
    """Look for noise that is none, or no more than a promise for the site adds by itself."""
    promised = site_std(policy) / (policy.noise_norm or 1.0)
    for knob in NOISES:
        asked = getattr(rule, knob)
        if asked == 0:
            yield _warning(f"{knob} = 0 asks for nothing: the strictest rule wins", rule.id)
        elif asked is not None and asked <= promised:
            # noise_ratio too: on a single value it is as much as noise_multiplier, on more less.
            yield _warning(
                f"{knob} = {asked:g} adds nothing: the promise puts noise of {promised:g} times "
                "clip_norm on every value already",
                rule.id,
            )


def _limits_of_auto(policy: Policy, rule: Rule, limits: AutoNorm) -> Iterator[Finding]:
    """Look at what a server that moves the bound, or no history at all, would make of it."""
    if limits.floor == limits.ceiling:
        yield _warning(
            'max_norm = "auto" cannot move: floor and ceiling are equal; give the number', rule.id
        )
    if limits.ceiling > WIDE_LIMITS * limits.floor:
        yield _warning(
            f"max_norm_ceiling is more than {WIDE_LIMITS:g} times max_norm_floor: the first round "
            f"starts at {limits.start:g}, far from both, and a server can move the bound all the "
            "way up; bring them closer",
            rule.id,
        )
    noisy = any(other.noisy for other in policy.always)
    if not noisy and not _private_in_training(policy):
        yield _warning(
            'max_norm = "auto" without noise: a server that makes updates large raises the bound '
            "to its ceiling and reads that much more; give a noise_ratio or a noise_multiplier, "
            "which grow along",
            rule.id,
        )


def _unreachable(policy: Policy, rule: Rule, when: When) -> Iterator[Finding]:
    if when.budget_spent and policy.privacy is None:
        yield _error(
            "can never apply: without a [privacy] table there is no budget, and budget_spent "
            "stays 0",
            rule.id,
        )
    for score in ("sensitivity", "suspicion", "budget_spent"):
        threshold = getattr(when, score)
        if threshold == 1.0:
            yield _warning(f"{score} = 1.0 is reached by a score of exactly 1 alone", rule.id)
    if all(getattr(when, score) in (None, 0.0) for score in _SCORES):
        yield _warning("always applies: its thresholds are 0; leave `when` out", rule.id)
    if rule.action is Action.REFUSE_ROUND and not known_at_opening(when):
        yield _warning(
            "asks for what is known only after training: the round is trained, and then its update "
            'is withheld; for a refusal use suspicion or unhealthy, else "withhold-update"',
            rule.id,
        )


def _outdone(rule: Rule, other: Rule) -> bool:
    """Say whether `other` applies whenever `rule` does, and is as strict in every knob."""
    if not _implied(other.when, rule.when):
        return False
    if other.action >= Action.WITHHOLD_UPDATE:
        return other.action >= rule.action
    if not (other.everywhere or set(rule.match) <= set(other.match)):
        return False
    if rule.when is None and rule.action is Action.RELEASE:
        return False  # it may let something out that `other` does not
    asked = [(knob, value) for knob in KNOBS if (value := _at_its(rule, knob, "floor")) is not None]
    return all(
        any(bound is not None and at_least(bound, value, knob) for bound in _bounds(other, knob))
        for knob, value in asked
    )


def _bounds(rule: Rule, knob: Knob) -> tuple[float | None, ...]:
    """Return what a rule asks for by a knob, and by one that is as strict at the same value."""
    own = _at_its(rule, knob, "ceiling")
    # On a single value noise_ratio is as much noise as noise_multiplier, on more values less.
    return (own, rule.noise_multiplier) if knob == "noise_ratio" else (own,)


def _at_its(rule: Rule, knob: Knob, end: Literal["floor", "ceiling"]) -> float | None:
    """Return a knob's value; of `max_norm = "auto"` one end of its limits."""
    if knob == "max_norm" and rule.auto is not None:
        return rule.auto.floor if end == "floor" else rule.auto.ceiling
    value: float | None = getattr(rule, knob)
    return value


def _implied(weaker: When | None, stronger: When | None) -> bool:
    """Say whether reaching every threshold of `stronger` means reaching those of `weaker`."""
    if weaker is None:
        return True
    if stronger is None:
        return False
    pairs = ((getattr(weaker, score), getattr(stronger, score)) for score in _SCORES)
    return all(low is None or (high is not None and low <= high) for low, high in pairs)


def _against_model(policy: Policy, candidates: Mapping[str, int]) -> Iterator[Finding]:
    for rule, glob in unmatched(policy, candidates):
        yield _error(f"{glob} matches no parameter of this model; mistyped?", rule)
    leaving = let_out(policy, candidates)
    if not leaving:
        yield _error("releases nothing of this model: no parameter is ever let out")
        return
    kept = sorted(set(candidates) - leaving)
    if kept:
        more = f" and {len(kept) - _MAX_NAMES} more" if len(kept) > _MAX_NAMES else ""
        yield _note(
            f"{len(kept)} of {len(candidates)} parameters never leave: "
            f"{', '.join(kept[:_MAX_NAMES])}{more}"
        )
    yield from _outgrown(policy, {name: candidates[name] for name in leaving})


def _outgrown(policy: Policy, values: Mapping[str, int]) -> Iterator[Finding]:
    """Look for noise that should tighten, and is no more than what every round has here."""
    total, plain = sum(values.values()), policy.resolved({})
    units = unit_stds(plain, total)
    for rule in plain.rules:
        asked = _std(rule, units)
        names = reach_of(rule, values)
        if rule.when is None or not asked or not names:
            continue
        had = min(_std_always(plain, name, units) for name in names)
        if asked <= had:
            yield _warning(
                f"its noise adds nothing on this model: over {total:,} values it is "
                f"{asked / units['noise_multiplier']:.3g} times the bound on each of them, and "
                f"every round has {had / units['noise_multiplier']:.3g}; ask for more",
                rule.id,
            )


def _std_always(policy: Policy, name: str, units: Mapping[Knob, float]) -> float:
    """Return what every round adds to a parameter: by its rules, or by a promise for the site."""
    asked = (_std(rule, units) for rule in reaching(policy.always, name))
    return max([site_std(policy), *asked])


def _std(rule: Rule, units: Mapping[Knob, float]) -> float:
    return max((getattr(rule, knob) or 0.0) * unit for knob, unit in units.items())
