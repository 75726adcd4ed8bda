"""Say a policy in plain sentences, for a reader who has never seen a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.terms import Action, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.policy.schema import Policy, Privacy, Rule, When

ACTIONS = {
    Action.RELEASE: "released",
    Action.WITHHOLD: "withheld",
    Action.WITHHOLD_UPDATE: "the whole update is withheld",
    Action.REFUSE_ROUND: "the round is refused",
}

_OUTCOMES = {
    Action.RELEASE: "The update is released, treated as listed.",
    Action.WITHHOLD: "Nothing is released: no parameter is let out.",
    Action.WITHHOLD_UPDATE: "The whole update is withheld.",
    Action.REFUSE_ROUND: "The round is refused: the site does not train on this global model.",
}


def outcome(action: Action) -> str:
    """Say what an action of the update as a whole means."""
    return _OUTCOMES[action]


def promise(policy: Policy) -> str:
    """Say what the policy promises."""
    privacy = policy.privacy
    if privacy is None:
        return (
            "It promises nothing formal: the protection is measured, not proved, and every report "
            "says so."
        )
    whose = {Unit.SITE: "the whole site", Unit.PATIENT: "each patient", Unit.RECORD: "each record"}
    told = (
        f"It promises differential privacy for {whose[privacy.unit]} ({privacy.adjacency}): "
        f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, for the life of the ledger. "
    )
    if privacy.unit is Unit.SITE:
        return told + (
            "For that, the whole update is clipped to a size (L2 norm) of "
            f"{privacy.clip_norm:g}, with noise of standard deviation "
            f"{privacy.clip_norm * privacy.noise_multiplier:g} on every value."
        )
    return told + " ".join(_training(privacy))


def _training(privacy: Privacy) -> Iterator[str]:
    """Say what each step of private training does."""
    unit, batch, cohort = privacy.unit, privacy.batch, privacy.cohort
    if batch is not None and cohort is not None:
        yield (
            f"For that, every step of the training takes each of the {cohort:,} {unit}s by chance, "
            f"with probability {batch:,}/{cohort:,} = {batch / cohort:.3g}."
        )
    else:
        yield (
            f"For that, every step of the training takes some {unit}s by chance; how many is not "
            "said (batch is missing), so that nothing is released yet."
        )
    if unit is Unit.PATIENT:
        yield (
            f"At most {privacy.records_per_patient} records of a patient count in a step, and all "
            "that they contribute is added up."
        )
    yield (
        f"What one {unit} contributes to a step is clipped to a size (L2 norm) of "
        f"{_clip(privacy)}, and the sum over all that were taken gets noise of standard deviation "
        f"{_noise(privacy)} on every value. The noised sum is then divided by "
        f"{'the batch' if batch is None else f'{batch:,}'}, however many were taken."
    )
    yield "The training process does all this itself: at level L0 the promise is its claim."


def _clip(privacy: Privacy) -> str:
    clip = privacy.adaptive_clip
    if clip is None:
        return f"{privacy.clip_norm:g}"
    return (
        f"{privacy.clip_norm:g} at first, which then moves from step to step, between "
        f"{clip.floor:g} and {clip.ceiling:g}, to the size that {100 * clip.quantile:g} % of the "
        f"{privacy.unit}s stay under (asked with noise, and covered by the same epsilon)"
    )


def _noise(privacy: Privacy) -> str:
    if privacy.adaptive_clip is None:
        return f"{privacy.clip_norm * privacy.noise_multiplier:g}"
    return f"at least {privacy.noise_multiplier:g} times that size"


def limits(policy: Policy) -> str:
    """Say what the limits are."""
    rules = policy.limits
    parts = ["No least number of patients is asked for."]
    if rules.min_patients:
        fewer = f"An update with fewer than {rules.min_patients} patients behind it is withheld"
        promised = policy.privacy is not None
        parts = [fewer + (" (the public size of the cohort counts)." if promised else ".")]
    if rules.rounds_per_day:
        parts.append(f"At most {rules.rounds_per_day} updates leave per day.")
    if rules.keep_releases:
        parts.append(f"The newest {rules.keep_releases} released updates stay on disk for retries.")
    allowed = ", ".join(rules.metrics) or "none"
    parts.append(f"Metrics that may leave: {allowed}.")
    if rules.statistics == "as-parameters":
        parts.append("Running statistics of normalisation layers are treated like parameters.")
    return " ".join(parts)


def sentence(rule: Rule) -> str:
    """Say one rule."""
    start = "Always" if rule.when is None else f"When {_condition(rule.when)}"
    where = "every parameter" if rule.everywhere else f"what matches {' or '.join(rule.match)}"
    if rule.action >= Action.WITHHOLD_UPDATE:
        return f"{start}: {ACTIONS[rule.action]}."
    if rule.action is Action.WITHHOLD:
        return f"{start}: {where} is withheld."
    asked = "; ".join(_asked(rule))
    if rule.when is None:
        return f"{start}: {where} may leave" + (
            f"; {asked}." if asked else "; nothing more is asked."
        )
    return f"{start}: for {where}, {asked}."


def _condition(when: When) -> str:
    scores = {
        "the sensitivity score of the update": when.sensitivity,
        "the suspicion about the global model": when.suspicion,
        "the spent share of the privacy budget": when.budget_spent,
    }
    parts = [f"{what} is {at:g} or more" for what, at in scores.items() if at is not None]
    if when.unhealthy:
        parts.append("the global model is broken")
    return " and ".join(parts)


def _asked(rule: Rule) -> Iterator[str]:
    if rule.max_abs is not None:
        yield f"no value may change by more than {rule.max_abs:g}"
    if rule.auto is not None:
        yield (
            "the change is scaled down to a size (L2 norm) that follows what left this site "
            f"before, from {rule.auto.floor:g} to {rule.auto.ceiling:g}, {rule.auto.start:g} at "
            "first"
        )
    elif rule.max_norm is not None:
        yield f"the change is scaled down to a size (L2 norm) of at most {rule.max_norm:g}"
    yield from _noise_asked(rule)
    if rule.keep is not None:
        yield f"{100 * rule.keep:g} % of the values are kept, chosen at random"


def _noise_asked(rule: Rule) -> Iterator[str]:
    asked = []
    if rule.noise_ratio is not None:
        asked.append(f"noise {rule.noise_ratio:g} times as large as the bound on the size is added")
    if rule.noise_multiplier is not None:
        asked.append(
            f"noise with a standard deviation of {rule.noise_multiplier:g} times the bound on the "
            "size is added to every value"
        )
    if asked:
        yield ", or ".join(asked) + (", whichever is more" if len(asked) > 1 else "")
