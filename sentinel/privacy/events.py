"""Events: what a release cost, as facts whose meaning never changes.

Each event is written once, with a version. An event of an unknown kind or version is refused,
never guessed. Nothing in an event depends on the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sentinel.terms import Adjacency, Unit


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GaussianEvent(_Event):
    """One Gaussian mechanism over a whole update.

    `noise_multiplier` is standard deviation / clip norm: the sensitivity, clip norm or twice it, is
    derived from the adjacency under which a total is asked for.
    """

    kind: Literal["gaussian"] = "gaussian"
    version: Literal[1] = 1
    unit: Unit
    adjacency: Adjacency  # of the policy that charged it; totals may be asked under either
    noise_multiplier: Annotated[float, Field(gt=0)]


class UnboundedEvent(_Event):
    """A release without a promise: from here on no lifetime promise holds for the dataset."""

    kind: Literal["unbounded"] = "unbounded"
    version: Literal[1] = 1


Event = Annotated[GaussianEvent | UnboundedEvent, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[GaussianEvent | UnboundedEvent] = TypeAdapter(Event)


def event_from_json(text: str) -> GaussianEvent | UnboundedEvent:
    """Read an event; ValueError for a kind, version or field that is not known."""
    return _ADAPTER.validate_json(text)
