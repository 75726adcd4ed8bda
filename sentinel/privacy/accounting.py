"""Accounting: what a list of events adds up to, through dp-accounting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.privacy.events import GaussianEvent
from sentinel.terms import SMALLEST_NOISE_MULTIPLIER, Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentinel.privacy.events import UnboundedEvent


ACCOUNTANT = "exact Gaussian composition"

_COVERS = {
    Unit.RECORD: {Unit.RECORD, Unit.PATIENT, Unit.SITE},
    Unit.PATIENT: {Unit.PATIENT, Unit.SITE},
    Unit.SITE: {Unit.SITE},
}


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised for the life of a ledger: (epsilon, delta) for one unit and adjacency."""

    unit: Unit
    adjacency: Adjacency
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Spent:
    """A total, with everything that an epsilon needs beside it.

    Attributes:
        epsilon: total loss at `delta`; 0 where nothing was charged.
        accountant: which composition gave the figure.
        void: whether an event on the dataset lies outside the promise, so that no lifetime
            promise holds.
    """

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    accountant: str
    void: bool


def total(events: Mapping[GaussianEvent | UnboundedEvent, int], promise: Promise) -> Spent:
    """Compose events.

    Args:
        events: each event, and how often it was charged.
        promise: the unit, adjacency and delta under which the total is asked for.

    Returns:
        The total. Events of a coarser unit count for a finer one (a site's noise hides its
        patients), never the other way: those make the total void.

    Guarantees:
        Gaussian mechanisms compose to one Gaussian mechanism exactly (Dong, Roth, Su 2022), whose
        epsilon at a delta is known exactly (Balle and Wang 2018): no bound is given away. The
        distance between neighbours behind a noise multiplier z is the clip norm under
        add-or-remove and twice it under replace, so replace halves z.
    """
    ratios: list[tuple[float, int]] = []
    void = False
    for event, times in events.items():
        if isinstance(event, GaussianEvent) and event.unit in _COVERS[promise.unit]:
            ratios.append((_ratio(event.noise_multiplier, promise.adjacency), times))
        else:
            void = True
    epsilon = _compose(ratios, promise.delta)
    return Spent(epsilon, promise.delta, promise.unit, promise.adjacency, ACCOUNTANT, void)


def _ratio(noise_multiplier: float, adjacency: Adjacency) -> float:
    """Standard deviation / distance between neighbouring updates, in clip norms."""
    return noise_multiplier / 2 if adjacency is Adjacency.REPLACE else noise_multiplier


def _compose(ratios: list[tuple[float, int]], delta: float) -> float:
    if not ratios:
        return 0.0
    if min(ratios)[0] < SMALLEST_NOISE_MULTIPLIER / 2:
        return math.inf
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415 - a second of imports

    ratio = 1.0 / math.sqrt(math.fsum(times / ratio**2 for ratio, times in ratios))
    return float(get_epsilon_gaussian(ratio, delta))
