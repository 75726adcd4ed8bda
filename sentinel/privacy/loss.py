"""Loss: the accountant for reports; the whole distribution of the privacy loss."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sentinel.terms import Adjacency

if TYPE_CHECKING:
    from sentinel.privacy.mechanisms import Composition, Sampled

LOSS = "privacy loss distribution (PLD)"

# Most steps, and the width of a cell of the privacy loss for so many, in nats. The error of an
# epsilon, always upwards, grows with steps x width^2: about 3e-5 at 100, 1000 and 10^4 steps.
_INTERVALS = ((100, 1e-3), (1000, 3e-4), (math.inf, 1e-4))
# Above these a distribution takes gigabytes, and an epsilon means nothing any more.
LARGEST_EPSILON = 50.0
_LARGEST_LOSS = 150.0  # of one step, in nats: 1.5 million cells
_TAIL = 9.8  # standard deviations beyond which dp-accounting cuts off, e^-50 of the mass
_KEPT = 4  # some tens of megabytes each


def loss_epsilon(composition: Composition, delta: float, bound: float) -> float:
    """Epsilon of a composition at `delta` by its privacy loss distribution.

    Args:
        composition: what was done.
        delta: asked for.
        bound: an epsilon known from another accountant, by which a table that would not fit
            in memory is seen before it is made.

    Returns:
        Epsilon; infinite where the distribution would take too much memory.

    Guarantees:
        An upper bound: dp-accounting rounds losses up (connect-the-dots, Doroshenko, Ghazi,
        Kamath, Kumar, Manurangsi 2022). Under replace its pair is the one that `sampled_curve`
        proves to dominate. It doubles the distance by itself under replace, so it is given the
        noise multiplier as it is; the Gaussian part is composed beforehand, exactly, and given as
        a ratio to the distance.
    """
    if bound > LARGEST_EPSILON or any(
        largest_loss(step) > _LARGEST_LOSS for step, _ in composition.sampled
    ):
        return math.inf
    whole = composed(composition)
    return float(whole.get_epsilon_for_delta(delta))


@lru_cache(maxsize=_KEPT)
def composed(composition: Composition) -> Any:  # noqa: ANN401 - dp-accounting has no types
    """The distribution of a composition; composed once for all deltas asked of it."""
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415 - a second

    cell = interval(composition)
    whole = pld.identity(value_discretization_interval=cell)
    if composition.ratio < math.inf:
        whole = pld.from_gaussian_mechanism(composition.ratio, value_discretization_interval=cell)
    for step, times in composition.sampled:
        whole = whole.compose(_step(step, cell).self_compose(times))
    return whole


def interval(composition: Composition) -> float:
    """The width of a cell of the privacy loss, in nats."""
    steps = sum(times for _, times in composition.sampled)
    return next(cell for most, cell in _INTERVALS if steps <= most)


@lru_cache(maxsize=_KEPT)
def _step(step: Sampled, cell: float) -> Any:  # noqa: ANN401 - dp-accounting has no types
    from dp_accounting import NeighboringRelation  # noqa: PLC0415 - a second of imports
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415 - as above

    relation = {
        Adjacency.REPLACE: NeighboringRelation.REPLACE_ONE,
        Adjacency.ADD_OR_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    }[step.adjacency]
    return pld.from_gaussian_mechanism(
        standard_deviation=step.noise_multiplier,
        sampling_prob=step.rate,
        neighboring_relation=relation,
        value_discretization_interval=cell,
    )


def largest_loss(step: Sampled) -> float:
    """Bound on the largest loss of one step that dp-accounting keeps a cell for, in nats."""
    z = step.noise_multiplier
    distance = 2 if step.adjacency is Adjacency.REPLACE else 1
    return distance * (_TAIL * z + distance) / z**2
