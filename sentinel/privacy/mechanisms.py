"""Mechanisms: what events are in the eyes of an accountant, for one unit and adjacency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.privacy.events import DpSgdEvent
from sentinel.terms import SMALLEST_NOISE_MULTIPLIER, Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentinel.privacy.events import PromisedEvent

_COVERS = {
    Unit.RECORD: {Unit.RECORD, Unit.PATIENT, Unit.SITE},
    Unit.PATIENT: {Unit.PATIENT, Unit.SITE},
    Unit.SITE: {Unit.SITE},
}


@dataclass(frozen=True, slots=True, order=True)
class Sampled:
    """A Gaussian mechanism on a Poisson sample.

    Attributes:
        noise_multiplier: standard deviation / norm bound of one unit.
        rate: probability with which a unit is in the sample, below 1.
        adjacency: which neighbours are told apart.
    """

    noise_multiplier: float
    rate: float
    adjacency: Adjacency


@dataclass(frozen=True, slots=True)
class Composition:
    """Everything that was done, with nothing given away.

    Attributes:
        ratio: standard deviation / distance between neighbours of the one Gaussian mechanism that
            all mechanisms without sampling compose to; infinite where there are none, 0 where one
            of them has too little noise to be computed.
        sampled: each sampled mechanism, and how many steps of it.
    """

    ratio: float
    sampled: tuple[tuple[Sampled, int], ...]

    @property
    def too_little_noise(self) -> bool:
        """Whether a mechanism's noise is too small for any accountant."""
        return self.ratio == 0 or any(
            step.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for step, _ in self.sampled
        )

    @property
    def unsampled_ratio(self) -> float:
        """`ratio`, were every unit in every sample.

        Guarantees:
            An upper bound on the loss with sampling: each pair of neighbouring outputs is the same
            mixture, over who else was drawn, of pairs that are equal or those without sampling, and
            no divergence of a mixture is above the largest of its parts (joint convexity).
        """
        squares = [
            steps / distance_ratio(step.noise_multiplier, step.adjacency) ** 2
            for step, steps in self.sampled
        ]
        total = math.fsum([*squares, 0.0 if self.ratio == math.inf else self.ratio**-2])
        return math.inf if total == 0 else total**-0.5


def covers(event: PromisedEvent, unit: Unit) -> bool:
    """Whether an event counts for a unit: a coarser unit's noise hides a finer unit as well."""
    return event.unit in _COVERS[unit]


def neighbours(event: PromisedEvent, unit: Unit, adjacency: Adjacency) -> Adjacency:
    """How neighbours by `unit` and `adjacency` look to the unit of the event.

    A finer unit that comes or goes does not take the coarser one away: the site stays and sends
    another update, which can lie anywhere within the clip norm. So to the coarser unit that is a
    replacement. (Replaced means in its place: a replaced record stays with its patient.)
    """
    return adjacency if event.unit is unit else Adjacency.REPLACE


def compose(events: Mapping[PromisedEvent, int], unit: Unit, adjacency: Adjacency) -> Composition:
    """Bring events that cover `unit` into the form that accountants take.

    Guarantees:
        Gaussian mechanisms compose to one Gaussian mechanism exactly, adaptively chosen or not:
        with ratio (sum of 1 / ratio_i^2)^(-1/2) (Dong, Roth, Su 2022, corollary 3.3). Neighbours
        lie one norm bound apart under add-or-remove and two under replace, so replace halves the
        ratio. Steps on a Poisson sample are kept as they are: amplification depends on the
        adjacency in its own way (see `renyi` and `loss`).
    """
    squares: list[float] = []
    sampled: dict[Sampled, int] = {}
    for event, times in events.items():
        z, seen_as = event.noise_multiplier, neighbours(event, unit, adjacency)
        steps = times * event.steps if isinstance(event, DpSgdEvent) else times
        if isinstance(event, DpSgdEvent) and event.sampling_rate < 1:
            step = Sampled(z, event.sampling_rate, seen_as)
            sampled[step] = sampled.get(step, 0) + steps
        elif z < SMALLEST_NOISE_MULTIPLIER:
            squares.append(math.inf)
        else:
            squares.append(steps / distance_ratio(z, seen_as) ** 2)
    total = math.fsum(squares)
    ratio = math.inf if total == 0 else total**-0.5
    return Composition(ratio, tuple(sorted(sampled.items())))


def distance_ratio(noise_multiplier: float, adjacency: Adjacency) -> float:
    """Standard deviation / distance between neighbours, both in norm bounds of one unit."""
    return noise_multiplier / 2 if adjacency is Adjacency.REPLACE else noise_multiplier
