"""Events: what a release cost, as facts whose meaning never changes.

Each event is written once, with a version. An event of an unknown kind, version or field is
refused, never guessed. Nothing in an event depends on the data.

Two kinds carry a promise, and both say how far the noise that was drawn may be from ideal noise
(`log_ratio` and `mass`, the two numbers of `sentinel.terms.Slack`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from sentinel.terms import Adjacency, Slack, Unit

MOST_STEPS = 10**9  # of one event; far beyond any training, and far below overflow

NoiseMultiplier = Annotated[float, Field(gt=0)]
LogRatio = Annotated[float, Field(ge=0)]
Mass = Annotated[float, Field(ge=0, le=1)]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GaussianEvent(_Event):
    """One Gaussian mechanism over a whole update.

    `noise_multiplier` is standard deviation / clip norm: the sensitivity, clip norm or twice it, is
    derived from the adjacency under which a total is asked for.

    Version 1 does not know its slack, version 2 does. Made without slack, an event is of version 1.
    A total counts unknown slack as none and says for how many charges it did so.

    Guarantees:
        Frozen, and a function of policy and shapes alone.

    Edges:
        noise multiplier of 0, NaN or Inf:     ValueError
        log_ratio without mass, or mass alone: ValueError
        slack below 0 or NaN, mass above 1:    ValueError
        an unknown kind, version or field:     ValueError
    """

    kind: Literal["gaussian"] = "gaussian"
    version: Literal[1, 2] = 1
    unit: Unit
    adjacency: Adjacency  # of the policy that charged it; totals may be asked under either
    noise_multiplier: NoiseMultiplier
    log_ratio: LogRatio | None = None
    mass: Mass | None = None

    @model_validator(mode="before")
    @classmethod
    def _version_of_what_is_given(cls, data: Any) -> Any:  # noqa: ANN401 - not validated yet
        if isinstance(data, dict) and "version" not in data and data.get("log_ratio") is not None:
            return {**data, "version": 2}
        return data

    @model_validator(mode="after")
    def _slack_belongs_to_the_version(self) -> Self:
        known = (self.log_ratio is not None, self.mass is not None)
        if known != ((True, True) if self.version == 2 else (False, False)):  # noqa: PLR2004 - named in the message
            msg = "a gaussian event has log_ratio and mass from version 2 on, and both of them"
            raise ValueError(msg)
        return self

    @property
    def slack(self) -> Slack | None:
        """How far its noise may be from ideal noise; None where that is not known."""
        if self.log_ratio is None or self.mass is None:
            return None
        return Slack(self.log_ratio, self.mass)


class DpSgdEvent(_Event):
    """All steps of one private training, for one release.

    Attributes:
        unit: whose summed gradient was clipped in each step.
        adjacency: of the policy that charged it; totals may be asked under either.
        noise_multiplier: standard deviation of the noise / norm bound of one unit's sum.
        sampling: "poisson" where each unit was drawn into each batch by a coin of its own, else
            "none": a shuffled epoch gives no amplification.
        sampling_rate: probability of that coin; 1 where sampling is "none".
        steps: noisy steps, those with an empty batch included.
        log_ratio: slack of the drawn noise over all steps.
        mass: slack of the drawn noise over all steps.

    Guarantees:
        Frozen, and a function of policy, shapes and number of steps alone.

    Edges:
        noise multiplier of 0 or below, NaN or Inf: ValueError
        a rate of 0, above 1, or NaN:               ValueError
        a rate below 1 with sampling "none":        ValueError: only Poisson sampling amplifies
        no step, a part of one, or above 10^9:      ValueError
        unit "site":                                ValueError: that is a Gaussian event
        an unknown kind, version or field:          ValueError
    """

    kind: Literal["dp-sgd"] = "dp-sgd"
    version: Literal[1] = 1
    unit: Unit
    adjacency: Adjacency
    noise_multiplier: NoiseMultiplier
    sampling: Literal["poisson", "none"]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS, strict=True)]
    log_ratio: LogRatio
    mass: Mass

    @model_validator(mode="after")
    def _amplification_only_by_poisson_sampling(self) -> Self:
        if self.unit is Unit.SITE:
            msg = 'unit: a dp-sgd event is per "patient" or "record"; a site is a gaussian event'
            raise ValueError(msg)
        if self.sampling == "none" and self.sampling_rate != 1:
            msg = (
                'sampling_rate: must be 1 where sampling is "none": only Poisson sampling amplifies'
            )
            raise ValueError(msg)
        return self

    @property
    def slack(self) -> Slack:
        """How far the noise of all its steps may be from ideal noise."""
        return Slack(self.log_ratio, self.mass)


class UnboundedEvent(_Event):
    """A release without a promise: from here on no lifetime promise holds for the dataset."""

    kind: Literal["unbounded"] = "unbounded"
    version: Literal[1] = 1


PromisedEvent = GaussianEvent | DpSgdEvent
Event = Annotated[GaussianEvent | DpSgdEvent | UnboundedEvent, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[PromisedEvent | UnboundedEvent] = TypeAdapter(Event)


@lru_cache(maxsize=4096)  # a ledger holds few different events, many times
def event_from_json(text: str) -> PromisedEvent | UnboundedEvent:
    """Read an event; ValueError for a kind, version or field that is not known."""
    return _ADAPTER.validate_json(text)


def event_to_json(event: PromisedEvent | UnboundedEvent) -> str:
    """Write an event with the fields of its version alone, so that it reads back as it was."""
    return event.model_dump_json(exclude_none=True)
