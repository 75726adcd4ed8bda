"""Plan: what a policy fixes about private training; public figures only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sentinel.dpsgd.clipping import Bound, require_possible
from sentinel.dpsgd.quantile import Quantile
from sentinel.dpsgd.sampling import Rate
from sentinel.errors import MisuseError, PolicyError
from sentinel.terms import Adjacency, Unit

if TYPE_CHECKING:
    from sentinel.policy import Policy


@dataclass(frozen=True, slots=True)
class Plan:
    """The figures of every private step.

    Attributes:
        rate: expected batch and public cohort.
        records_per_patient: most records of a patient in a batch.
        clip_norm: L2 bound on a unit's gradient; where `quantile` is given, the first one.
        noise_multiplier: z, what is charged for a step.
        quantile: how the clip norm moves; None where it does not.
    """

    unit: Unit
    adjacency: Adjacency
    rate: Rate
    records_per_patient: int
    clip_norm: float
    noise_multiplier: float
    quantile: Quantile | None

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """The plan of a policy.

        Raises:
            MisuseError: the policy promises nothing that private training keeps.
            PolicyError: it does not say what a batch is.
        """
        privacy = policy.privacy
        if privacy is None or privacy.unit is Unit.SITE:
            promised = "nothing" if privacy is None else 'unit "site"'
            raise MisuseError(
                f"The policy {policy.name!r} promises {promised}; guard.private is for a policy "
                'with unit "patient" or "record".'
            )
        cohort = privacy.cohort
        if privacy.batch is None or cohort is None:
            raise PolicyError(
                f"The policy {policy.name!r} does not say how many {privacy.unit}s a batch of "
                "private training is expected to hold: set privacy.batch."
            )
        adaptive = privacy.adaptive_clip
        quantile = None
        if adaptive is not None:
            limits = (adaptive.floor, adaptive.ceiling)
            quantile = Quantile(adaptive.quantile, *limits, privacy.batch)
        return cls(
            unit=privacy.unit,
            adjacency=privacy.adjacency,
            rate=Rate(privacy.batch, cohort),
            records_per_patient=privacy.records_per_patient,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            quantile=quantile,
        )

    @property
    def records_per_unit(self) -> int:
        """Most records of one unit in a batch."""
        return self.records_per_patient if self.unit is Unit.PATIENT else 1

    @property
    def gradient_multiplier(self) -> float:
        """Standard deviation of the gradients' noise / clip norm."""
        if self.quantile is None:
            return self.noise_multiplier
        return self.quantile.gradient_multiplier(self.noise_multiplier)

    def bound(self, clip_norm: float, coordinates: int) -> Bound:
        """How far one unit may move a batch's sum under some clip norm."""
        return Bound(clip_norm, coordinates, self.gradient_multiplier, self.rate.batch)

    def draws(self, coordinates: int) -> int:
        """Values that get noise in one step."""
        return coordinates if self.quantile is None else coordinates + 1

    def require_possible(self, coordinates: int) -> None:
        """Refuse figures that leave nothing to clip to.

        Raises:
            PolicyError: batch, multiplier and quantile do not fit together.
        """
        try:
            require_possible(self.bound(self.clip_norm, coordinates))
        except ValueError as error:
            raise PolicyError(f"privacy: {error}.") from None
