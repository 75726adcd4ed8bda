"""Transform: carry out a plan on the tensors of an update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.chunks import sum_of_squares
from sentinel.mechanism.clip import clip_factor, limit_
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import add_noise_
from sentinel.mechanism.sparsify import keep_
from sentinel.terms import Action, NormBound, Treatment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from sentinel.mechanism.entropy import Entropy
    from sentinel.terms import Plan


@dataclass(frozen=True, slots=True)
class Transformed:
    """What was done.

    Attributes:
        released: names whose tensors leave.
        noised: those of them that carry noise.
        clipped: whether any tensor was scaled down to meet a bound.
    """

    released: frozenset[str]
    noised: frozenset[str]
    clipped: bool


def transform_(  # noqa: PLR0913 - the update, its plan, and what was done to it before
    deltas: dict[str, torch.Tensor],
    squares: Mapping[str, float],
    plan: Plan,
    *,
    aliases: Mapping[str, str],
    base_std: float,
    entropy: Entropy,
) -> Transformed:
    """Limit, clip, noise and mask the deltas in place, as the plan says, in this order.

    Args:
        deltas: name -> contiguous floating tensor.
        squares: sum of squares of each.
        plan: what to do with every name in `deltas` and `aliases`.
        aliases: name -> the name in `deltas` that it is tied to; the stricter of both counts.
        base_std: standard deviation of the noise that is in the deltas already.
        entropy: where noise and mask come from.

    Guarantees:
        Every bound of the plan holds for the deltas before noise, the rounding to the grid counted
        in. The noise in a released tensor has at least the standard deviation of its treatment.
        The mask does not look at the data.
    """
    treatments = {name: _strictest(plan, name, aliases) for name in deltas}
    coordinates = sum(delta.numel() for delta in deltas.values())
    bounds = [_resolve(bound, aliases) for bound in plan.bounds]
    stds = {name: _missing_std(treatment, base_std) for name, treatment in treatments.items()}
    least = min((std for std in stds.values() if std > 0.0), default=math.inf)
    step = grid_step(min([b.max_norm for b in bounds] or [base_std or 1.0]), coordinates, least)
    measured = dict(squares)
    for name, treatment in treatments.items():
        if math.isfinite(treatment.max_abs):
            reach = step / 2 if stds[name] > 0.0 else 0.0
            limit_(deltas[name], max(0.0, treatment.max_abs - reach))
            measured[name] = sum_of_squares(deltas[name])
    factors = _factors(measured, bounds, rounding_reach(step, coordinates))
    released = frozenset(n for n, t in treatments.items() if t.action is Action.RELEASE)
    noised = set()
    for name in released:
        if factors[name] < 1.0:
            deltas[name].mul_(factors[name])
        add_noise_(deltas[name], stds[name], step, entropy)
        keep_(deltas[name], treatments[name].keep, entropy)
        if max(stds[name], base_std) > 0.0:
            noised.add(name)
    clipped = any(factors[name] < 1.0 for name in released)
    return Transformed(released, frozenset(noised), clipped)


def _missing_std(treatment: Treatment, base_std: float) -> float:
    """What has to be added to noise that is there already."""
    return math.sqrt(max(0.0, treatment.noise_std**2 - base_std**2))


def _strictest(plan: Plan, name: str, aliases: Mapping[str, str]) -> Treatment:
    """The treatment of a tensor: the strictest that any of its names asks for."""
    twins = [plan.treatments[alias] for alias, original in aliases.items() if original == name]
    together = [plan.treatments[name], *twins]
    return Treatment(
        action=max(t.action for t in together),
        max_abs=min(t.max_abs for t in together),
        noise_std=max(t.noise_std for t in together),
        keep=min(t.keep for t in together),
    )


def _resolve(bound: NormBound, aliases: Mapping[str, str]) -> NormBound:
    return NormBound(frozenset(aliases.get(name, name) for name in bound.names), bound.max_norm)


def _factors(
    squares: Mapping[str, float], bounds: Iterable[NormBound], reach: float
) -> dict[str, float]:
    """For each tensor the smallest factor of all bounds that it is under."""
    factors = dict.fromkeys(squares, 1.0)
    for bound in bounds:
        members = [name for name in bound.names if name in squares]
        factor = clip_factor([squares[name] for name in members], bound.max_norm - reach)
        for name in members:
            factors[name] = min(factors[name], factor)
    return factors
