"""Bound: a clip norm that follows how large this site's released updates are.

What a release shows of the clipped update is its *fill*: squared norm / squared bound, from 0 to 1.
A fill of 1 says no more than "at least the bound". The bound moves until the fill is `TARGET` on
average: for updates of one size that is a bound 1.2 times the size; for sizes that spread, one that
about a third of the updates reach.

- Each release moves the bound by `gain * (fill - TARGET)`. The gain is that of a Kalman filter for
  the logarithm of the bound, so that a fill which noise has blurred counts for less.
- One round moves it by a factor of at most sqrt(2), up or down, and never past floor or ceiling.
- The global model's own steps can only raise it, and weigh as much as one poor look at this site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentinel.terms import AutoNorm

TARGET = 0.7  # fill at which the bound rests
LARGEST_MOVE = math.log(2) / 2  # in one round: a factor of sqrt(2)
SLOPE = 0.4  # change of the fill per change of ln(bound): 0.3 above / 0.7 below, over a factor of e
SPREAD = 0.05  # variance of the fill from round to round where no noise is added
DRIFT = 0.004  # variance that ln(size of an update) gains per round
STEP_TARGET = TARGET / 2  # steps share a part of the updates only, so that less is as much a sign
STEP_SPREAD = 1.0  # variance at which the coherent part of global steps counts: 20 times SPREAD
STEPS = 5  # global steps in the window; the median needs three to be large
REMEMBERED = 32  # rounds that are known to be counted
_LARGEST = 2.0**400  # number of a sketch; products of larger ones leave the range of float64
_COMMON = 2.0  # standard deviations that are taken off the coherent part of two steps


@dataclass(frozen=True, slots=True)
class Seen:
    """What one released round shows; public, every figure of it.

    Attributes:
        round: digest of the round's key.
        number: of the round.
        reach: digest of the parameters that the bound is about.
        fill: squared norm of the clipped update / squared bound, less the expected noise, so that
            it may lie outside 0 to 1; None where the release does not show it.
        blur: variance of the fill that comes of noise and mask.
        model: sketch of the global model that the round started from.
        coordinates: values behind it.
    """

    round: str
    number: int
    reach: str
    fill: float | None
    blur: float
    model: tuple[float, ...]
    coordinates: int


@dataclass(frozen=True, slots=True)
class Bound:
    """A norm bound and all that is remembered to move it.

    Attributes:
        norm: the bound, L2.
        variance: how uncertain ln(bound) is.
        reach: digest of the parameters that it is about; empty before the first release.
        number: of the last round that counted; -1 before the first.
        counted: digests of the last `REMEMBERED` rounds that counted.
        model: sketch of the last round's global model; empty before the first.
        step: sketch of the last step of the global model; empty where none is known.
        coherent: squared size of what consecutive global steps have in common, for the last `STEPS`
            of them, less what noise could make of it.

    Guarantees:
        A function of what `Seen` holds, and of nothing else.

    Edges:
        `after`, whatever is seen:                   floor <= norm <= ceiling
        `after` one round:                           moved by a factor of at most sqrt(2)
        a round that counted before:                 the same bound
        fill unknown, infinite or NaN:               moved by no look at this site
        other parameters, or another model:          a fresh start
        global steps however large:                  never lower; up like a full release
        one crafted global model in five rounds:     as without it
        a global model of NaN, Inf, or beyond 1e120: its steps count as none
        `fresh`:                                     the geometric middle of floor and ceiling
        `within` limits that have changed:           held between the new ones
    """

    norm: float
    variance: float
    reach: str = ""
    number: int = -1
    counted: tuple[str, ...] = ()
    model: tuple[float, ...] = ()
    step: tuple[float, ...] = ()
    coherent: tuple[float, ...] = ()

    @classmethod
    def fresh(cls, limits: AutoNorm) -> Bound:
        """The bound of a first round: the geometric middle, uncertain up to both ends."""
        return cls(limits.start, math.log(limits.ceiling / limits.floor) ** 2 / 12)

    def within(self, limits: AutoNorm) -> Bound:
        """The same bound, held between limits that may have changed."""
        return replace(self, norm=limits.clamp(self.norm))

    def after(self, seen: Seen, used: float, limits: AutoNorm) -> Bound:
        """The bound of the next round.

        Args:
            seen: what left.
            used: the bound that was in force; two rounds may overlap, so that it need not be this.
            limits: floor and ceiling.
        """
        if seen.round in self.counted:
            return self
        if self.reach and seen.reach != self.reach:
            return Bound.fresh(limits).after(seen, used, limits)
        variance = self.variance + DRIFT
        own, variance = _own_move(seen, variance)
        remembered = self._stepped(seen)
        move = own + _common_move(remembered.coherent, used, variance)
        move = max(-LARGEST_MOVE, min(LARGEST_MOVE, move))
        return replace(
            remembered,
            norm=limits.clamp(self.norm * math.exp(move)),
            variance=min(variance, Bound.fresh(limits).variance + DRIFT),
        )

    def _stepped(self, seen: Seen) -> Bound:
        """What is remembered of global models, with one more; only consecutive rounds make a step.

        The inner product of two steps holds what they have in common. Their noise is independent
        and drops out, so that noise which all sites add does not pass for a large update.
        """
        model = seen.model if all(abs(one) < _LARGEST for one in seen.model) else ()
        follows = bool(self.model and model) and seen.number == self.number + 1
        step = _difference(model, self.model) if follows else ()
        coherent = self.coherent
        if step and self.step:
            common = _product(step, self.step)
            sizes = math.sqrt(_product(step, step)) * math.sqrt(_product(self.step, self.step))
            chance = sizes * math.sqrt(1 / len(step) + 1 / max(seen.coordinates, 1))
            coherent = (*coherent, _sound(common - _COMMON * chance))[-STEPS:]
        return replace(
            self,
            reach=seen.reach,
            number=seen.number,
            counted=(*self.counted, seen.round)[-REMEMBERED:],
            model=model,
            step=step,
            coherent=coherent,
        )


def _common_move(coherent: tuple[float, ...], used: float, variance: float) -> float:
    """How far the global model's steps raise ln(bound); never below 0."""
    typical = median((*coherent, *[0.0] * (STEPS - len(coherent))))
    fill = min(1.0, typical / used**2)
    return max(0.0, _gain(variance, STEP_SPREAD) * (fill - STEP_TARGET))


def _own_move(seen: Seen, variance: float) -> tuple[float, float]:
    """How far this site's release moves ln(bound), and the variance that is left."""
    if seen.fill is None or not (math.isfinite(seen.fill) and math.isfinite(seen.blur)):
        return 0.0, variance
    gain = _gain(variance, SPREAD + seen.blur)
    return gain * (seen.fill - TARGET), (1 - gain * SLOPE) * variance


def _gain(variance: float, noise: float) -> float:
    """Kalman's gain for one look of that noise."""
    return SLOPE * variance / (SLOPE**2 * variance + noise)


def _difference(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one - other for one, other in zip(left, right, strict=True))


def _product(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    return math.fsum(one * other for one, other in zip(left, right, strict=True))


def _sound(value: float) -> float:
    """A finite square, 0 or more; what overflowed says nothing."""
    return max(0.0, value) if math.isfinite(value) else 0.0
