"""What a policy file may say: strict, frozen models, and the checks across them.

A file promises something (`[privacy]`), limits something (`[limits]`) and has rules (`[[rule]]`).
Unknown keys, NaN, infinity and a boolean where a number belongs are refused. A whole number is
taken where a decimal one is meant.
"""

from __future__ import annotations

import datetime as dt  # noqa: TC003 - pydantic evaluates the annotations at run time
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from sentinel.policy import globs
from sentinel.policy.fields import (
    AUTO,
    DISTINCT,
    ActionWord,
    Bound,
    Glob,
    Identifier,
    Noise,
    NoiseMultiplier,
    Norm,
    OnlyTrue,
    SchemaVersion,
    Share,
    Strict,
)
from sentinel.terms import SMALLEST_NOISE_MULTIPLIER, Action, Adjacency, AutoNorm, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_RULES = 256
MAX_GLOBS = 64
NUM_EXAMPLES = "num-examples"

# What a rule for ** lets out and should not leave.
_KEEP_BACK = (
    "That rule lets every parameter out: hold back what must not leave by one more rule, "
    'match = [...] with action = "withhold"'
)


class AdaptiveClip(Strict):
    """A clip norm that follows the norms of the patients' gradients, privately."""

    quantile: float = Field(gt=0, lt=1, description="share of units that are to stay unclipped")
    floor: Norm = Field(description="least clip norm")
    ceiling: Norm = Field(description="largest clip norm")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.floor > self.ceiling:
            raise ValueError("floor is larger than ceiling; swap them")
        return self


class Privacy(Strict):
    """The promise. Left out of a file, nothing formal is promised."""

    unit: Annotated[Unit, Field(strict=False, description="whose presence is hidden")]
    adjacency: Annotated[Adjacency, Field(strict=False)] = Field(
        default_factory=lambda known: (
            Adjacency.REPLACE if known.get("unit") is Unit.SITE else Adjacency.ADD_OR_REMOVE
        ),
        description='"replace" by default for a site, "add-or-remove" otherwise',
    )
    patients: Annotated[int, Field(ge=1, le=10**10)] | None = Field(
        default=None,
        description="public size of the cohort; needed for patient and record, and wherever "
        "limits.min_patients is set",
    )
    epsilon: float = Field(gt=0, le=1000, description="for the life of the ledger")
    delta: float = Field(gt=0, le=0.01)
    clip_norm: Norm = Field(description="L2")
    noise_multiplier: NoiseMultiplier = Field(
        description="standard deviation of the noise / clip_norm",
        json_schema_extra={"minimum": SMALLEST_NOISE_MULTIPLIER},
    )
    batch: Annotated[int, Field(ge=1, le=8192)] | None = Field(
        default=None,
        description="patients (or records) that a batch of private training holds in expectation; "
        "needed for patient and record",
    )
    records: Annotated[int, Field(ge=1, le=10**10)] | None = Field(
        default=None,
        description='public number of records, for unit "record"; as many as patients where left '
        "out",
    )
    records_per_patient: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="most records of one patient in one batch of private training"
    )
    adaptive_clip: AdaptiveClip | None = Field(
        default=None,
        description="let the clip norm of private training follow a quantile, from clip_norm on",
    )

    @property
    def cohort(self) -> int | None:
        """The public number of units: of records under unit "record", else of patients."""
        if self.unit is Unit.RECORD and self.records is not None:
            return self.records
        return self.patients

    @model_validator(mode="after")
    def _training(self) -> Self:
        asked = {"batch", "records", "records_per_patient", "adaptive_clip"} & self.model_fields_set
        if self.unit is Unit.SITE and asked:
            raise ValueError(
                f'{", ".join(sorted(asked))}: for private training, under unit "patient" or '
                '"record"; leave it out under unit "site"'
            )
        if self.unit is not Unit.RECORD and self.records is not None:
            raise ValueError('records: only for unit "record"; leave it out')
        if self.unit is not Unit.PATIENT and "records_per_patient" in asked:
            raise ValueError('records_per_patient: only for unit "patient"; leave it out')
        if self.batch is not None and self.cohort is not None and self.batch > self.cohort:
            raise ValueError("batch: larger than the cohort; lower it")
        clip = self.adaptive_clip
        # The noise on the count of unclipped units has a standard deviation of batch / 20.
        if clip is not None and self.batch is not None and self.noise_multiplier * 10 >= self.batch:
            raise ValueError(
                "adaptive_clip: the batch is too small to tell a quantile under this "
                "noise_multiplier; expected a batch of more than 10 times it"
            )
        if clip is not None and not clip.floor <= self.clip_norm <= clip.ceiling:
            raise ValueError("clip_norm: expected between adaptive_clip's floor and ceiling")
        return self

    @model_validator(mode="after")
    def _cohort(self) -> Self:
        if self.unit is not Unit.SITE and self.patients is None:
            raise ValueError(
                f'patients is missing: unit "{self.unit}" needs the public size of the cohort'
            )
        if self.patients is not None and self.delta * self.patients >= 1:
            raise ValueError(
                "delta is too large: expected less than 1 / patients, since a larger one would "
                "allow handing out one patient's record whole"
            )
        return self


class Limits(Strict):
    """What holds whatever the rules say."""

    rounds_per_day: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        default=None, description="releases per day; no limit where left out"
    )
    min_patients: Annotated[int, Field(ge=1, le=10**10)] | None = Field(
        default=None, description="an update with fewer patients behind it is withheld"
    )
    keep_releases: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        default=None,
        description="how many released updates stay on disk for retries; all where left out",
    )
    metrics: Annotated[tuple[Identifier, ...], Field(strict=False, max_length=64), DISTINCT] = (
        Field(default=(), description="metrics that may leave; all others are dropped")
    )
    statistics: Literal["withhold", "as-parameters"] = Field(
        default="withhold",
        description="running statistics of normalisation layers: send the global model's back, or "
        "treat them like parameters",
    )


class When(Strict):
    """Thresholds; a rule applies when all of them are reached (at or above)."""

    sensitivity: Share | None = Field(default=None, description="sensitivity score of the update")
    suspicion: Share | None = Field(default=None, description="suspicion about the global model")
    budget_spent: Share | None = Field(default=None, description="share of epsilon that is spent")
    unhealthy: OnlyTrue | None = Field(
        default=None, description="the global model is broken rather than crafted; only true"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self == When.model_construct():
            raise ValueError(
                "expected at least one of sensitivity, suspicion, budget_spent, unhealthy; leave "
                "`when` out for a rule that always applies"
            )
        return self


FIGURES = (  # what a rule may ask for, as a file writes it
    "max_norm",
    "max_norm_floor",
    "max_norm_ceiling",
    "max_abs",
    "noise_ratio",
    "noise_multiplier",
    "keep",
)


class Rule(Strict):
    """One rule: which parameters, when, and what is asked of them."""

    id: Identifier
    match: Annotated[
        tuple[Glob, ...],
        Field(strict=False, min_length=1, max_length=MAX_GLOBS),
        DISTINCT,
    ] = Field(default=(globs.EVERYTHING,), description="globs on dotted parameter names")
    when: When | None = Field(default=None, description="left out: the rule always applies")
    action: ActionWord = Field(
        default=Action.RELEASE,
        description="what happens; the one further along this list wins",
        json_schema_extra={"default": Action.RELEASE.word},
    )
    max_norm: Bound | None = Field(
        default=None,
        description="L2 norm of what the rule matches, before noise; smallest wins; "
        '"auto" follows what left this site before, between max_norm_floor and max_norm_ceiling',
    )
    max_norm_floor: Norm | None = Field(
        default=None, description='least bound that max_norm = "auto" may come to'
    )
    max_norm_ceiling: Norm | None = Field(
        default=None, description='largest bound that max_norm = "auto" may come to'
    )
    max_abs: Norm | None = Field(
        default=None, description="largest absolute value of a coordinate; smallest wins"
    )
    noise_ratio: Noise | None = Field(
        default=None, description="expected L2 norm of the noise / max_norm; largest wins"
    )
    noise_multiplier: Noise | None = Field(
        default=None,
        description="standard deviation of the noise on each value / max_norm, however many values "
        "there are; largest wins, and of noise_ratio and this the larger noise",
    )
    keep: Annotated[float, Field(ge=1e-6, le=1)] | None = Field(
        default=None, description="share of coordinates kept, chosen at random; smallest wins"
    )

    @property
    def everywhere(self) -> bool:
        """Whether the rule matches every parameter there is."""
        return globs.EVERYTHING in self.match

    @property
    def noisy(self) -> bool:
        """Whether the rule asks for noise, in whichever unit."""
        return bool(self.noise_ratio or self.noise_multiplier)

    @property
    def auto(self) -> AutoNorm | None:
        """The limits of `max_norm = "auto"`; None where it is a number or left out."""
        floor, ceiling = self.max_norm_floor, self.max_norm_ceiling
        if self.max_norm != AUTO or floor is None or ceiling is None:
            return None
        return AutoNorm(floor, ceiling)

    @model_validator(mode="after")
    def _auto_has_limits(self) -> Self:
        floor, ceiling = self.max_norm_floor, self.max_norm_ceiling
        if self.max_norm != AUTO:
            if floor is not None or ceiling is not None:
                raise ValueError(
                    "max_norm_floor and max_norm_ceiling are the limits of "
                    f'max_norm = "{AUTO}": leave them out, or set max_norm to "{AUTO}"'
                )
        elif floor is None or ceiling is None:
            raise ValueError(
                f'max_norm = "{AUTO}" needs max_norm_floor and max_norm_ceiling, since a server '
                "can try to move what it follows; the ceiling is the bound that the site can stand"
            )
        elif floor > ceiling:
            raise ValueError("max_norm_floor is larger than max_norm_ceiling; swap them")
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.action >= Action.WITHHOLD_UPDATE and not self.everywhere:
            raise ValueError(
                f'action "{self.action.word}" is about the update as a whole: leave match out'
            )
        if self.when is None:
            return self
        if "action" in self.model_fields_set and self.action is Action.RELEASE:
            raise ValueError(
                'a rule with `when` may not have action = "release": only rules without `when` '
                "let parameters out; leave action out, or make it a rule without `when`"
            )
        knobs = (self.max_norm, self.max_abs, self.noise_ratio, self.noise_multiplier, self.keep)
        if self.action is Action.RELEASE and all(knob is None for knob in knobs):
            raise ValueError(
                "the rule asks for nothing: give it an action, max_norm, max_abs, noise_ratio, "
                "noise_multiplier or keep"
            )
        return self


class Policy(Strict):
    """A whole policy file.

    Guarantees: every number is finite; rule ids are unique; where a rule asks for noise, the norm
    that the noise is measured by is known, and no further rule can thin it out.
    """

    schema_version: SchemaVersion = Field(alias="schema", description="this format: 1")
    name: Identifier
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        default="default", description="the patients behind it; one privacy budget per dataset"
    )
    expires: dt.date | None = Field(default=None, description="last day on which it is valid (UTC)")
    privacy: Privacy | None = None
    limits: Limits = Limits()
    rules: Annotated[tuple[Rule, ...], Field(strict=False, max_length=MAX_RULES)] = Field(
        default=(), alias="rule"
    )

    @property
    def always(self) -> tuple[Rule, ...]:
        """The rules without `when`: they alone can let a parameter out."""
        return tuple(rule for rule in self.rules if rule.when is None)

    @property
    def noise_norm(self) -> float | None:
        """C, the L2 norm that the noise of rules is measured by; None where there is none.

        Of a policy with `max_norm = "auto"` it is the largest that C can come to; that of one
        round is the property of what `resolved` returns.
        """
        if self.privacy is not None:
            return self.privacy.clip_norm
        norms = [
            rule.max_norm_ceiling if rule.auto else rule.max_norm
            for rule in self.always
            if rule.everywhere
        ]
        return max((norm for norm in norms if isinstance(norm, float)), default=None)

    @property
    def autos(self) -> dict[str, AutoNorm]:
        """Id of every rule with `max_norm = "auto"` -> its limits."""
        return {rule.id: rule.auto for rule in self.rules if rule.auto is not None}

    def resolved(self, auto_norms: Mapping[str, float]) -> Policy:
        """Put this round's bounds in the place of `max_norm = "auto"`.

        Args:
            auto_norms: id of a rule -> its bound. One outside floor and ceiling becomes the
                nearer of them; where a rule is left out, its start.

        Returns:
            A policy in which every max_norm is a number; itself where none was "auto".
        """
        limits = self.autos
        if not limits:
            return self
        bounds = {
            name: limit.clamp(auto_norms.get(name, limit.start)) for name, limit in limits.items()
        }
        rules = tuple(
            rule.model_copy(
                update={
                    "max_norm": bounds[rule.id],
                    "max_norm_floor": None,
                    "max_norm_ceiling": None,
                }
            )
            if rule.id in bounds
            else rule
            for rule in self.rules
        )
        return self.model_copy(update={"rules": rules})

    def expired(self, today: dt.date) -> bool:
        """Say whether `today` (UTC) is past the last day on which the policy is valid."""
        return self.expires is not None and today > self.expires

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._rule_problems(), *self._promise_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _rule_problems(self) -> Iterator[str]:
        first: dict[str, int] = {}
        for at, rule in enumerate(self.rules):
            if first.setdefault(rule.id, at) != at:
                yield f'rule[{at}].id: "{rule.id}" is the id of rule[{first[rule.id]}]; rename one'
            if rule.noisy:
                yield from self._noise_problems(at, rule)

    def _noise_problems(self, at: int, rule: Rule) -> Iterator[str]:
        knob = "noise_ratio" if rule.noise_ratio else "noise_multiplier"
        if self.noise_norm is None:
            yield (
                f'rule[{at}].{knob} (rule "{rule.id}"): noise is measured against a norm, '
                "and none is given; add a rule without `when` and with "
                f"match ** (or no match) that has max_norm. {_KEEP_BACK}"
            )
        elif rule.noise_ratio and not any(known.everywhere for known in self.always):
            # Otherwise a further rule that lets out more parameters would spread the same
            # noise over more coordinates, and so weaken those already let out. The noise of
            # noise_multiplier is spread over nothing.
            yield (
                f'rule[{at}].noise_ratio (rule "{rule.id}"): needs a rule without `when` and '
                f"with match ** (or no match). {_KEEP_BACK}"
            )

    def _promise_problems(self) -> Iterator[str]:
        if self.privacy is None:
            return
        if self.privacy.unit is Unit.SITE:
            for at, rule in enumerate(self.rules):
                if rule.max_norm is not None:
                    yield (
                        f'rule[{at}].max_norm (rule "{rule.id}"): under unit "site" the clip is '
                        "the promise's; leave it out here and set privacy.clip_norm"
                    )
        elif self.limits.statistics != "withhold":
            yield (
                'limits.statistics: expected "withhold" under unit "patient" or "record": private '
                "training does not cover running statistics"
            )
        yield from self._count_problems(self.privacy)

    def _count_problems(self, privacy: Privacy) -> Iterator[str]:
        least, cohort = self.limits.min_patients, privacy.patients
        if least is not None and cohort is not None and least > cohort:
            yield (
                "limits.min_patients: larger than privacy.patients, so nothing would ever be "
                "released; lower it"
            )
        if least is not None and cohort is None:
            yield (
                "privacy.patients: is missing; add the public size of the cohort, with which "
                "limits.min_patients is compared under a promise, since the real count is data"
            )
        if set(self.limits.metrics) - {NUM_EXAMPLES}:
            yield f'limits.metrics: under a promise only "{NUM_EXAMPLES}" may leave'
