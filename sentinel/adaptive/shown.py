"""Shown: what a released update shows to whoever receives it, and how full its bound was.

Everything here is computed from the released state, the global model and the policy. The plan of a
round may rest on the raw update (by its score), so the plan that was carried out is not looked at:
of the plans that any score would have led to, the one is taken that the released values fit best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.chunks import CHUNK
from sentinel.terms import Action, Treatment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sentinel.terms import Plan


@dataclass(frozen=True, slots=True)
class Shown:
    """What one released tensor shows.

    Attributes:
        values: how many it holds.
        present: how many of them differ from the global model's.
        energy: sum of their squares.
        fourth: sum of their fourth powers.
    """

    values: int
    present: int
    energy: float
    fourth: float


@dataclass(frozen=True, slots=True)
class Fill:
    """Squared norm of the clipped update / squared bound, as a release shows it.

    Attributes:
        value: without the noise that is expected; may lie outside 0 to 1.
        blur: variance that noise and mask give it.
        misfit: how far the release is from what the plan would have made; 0 fits.
    """

    value: float
    blur: float
    misfit: float


def shown(
    base: Mapping[str, torch.Tensor],
    released: Mapping[str, torch.Tensor],
    names: Iterable[str],
    *,
    deltas: bool,
) -> dict[str, Shown]:
    """Measure what left, in float64, piece by piece.

    Args:
        base: the global model.
        released: what left: weights, or differences where `deltas`.
        names: floating tensors, each once; of tied ones the first.
        deltas: whether `released` holds differences.

    Guarantees:
        A function of the released state and, for weights, of the global model: of nothing that did
        not leave. Neither is written to.

    Edges:
        a 0-d tensor:                one value
        an empty tensor:             no values, and all figures 0
        float16 or bfloat16:         measured in float64, in which the values are exact
        NaN or Inf among the values: figures that are not finite; `fill_of` is None
        `deltas`:                    the global model is not looked at
    """
    return {
        name: _measure(None if deltas else base[name], released[name].detach()) for name in names
    }


def _measure(base: torch.Tensor | None, released: torch.Tensor) -> Shown:
    present, energy, fourth = 0, 0.0, 0.0
    for start in range(0, released.numel(), CHUNK):
        change = released.reshape(-1)[start : start + CHUNK].double()
        if base is not None:
            change = change - base.detach().reshape(-1)[start : start + CHUNK].to(change.device)
        present += int(change.count_nonzero())
        square = change.square()
        energy += float(square.sum())
        fourth += float(torch.dot(square, square))
    return Shown(released.numel(), present, energy, fourth)


def fill_of(
    parts: Mapping[str, Shown], plans: Sequence[Plan], used: float, aliases: Mapping[str, str]
) -> Fill | None:
    """How full the bound of some tensors was, by the plan that fits what they show.

    Args:
        parts: name -> what it shows, of the tensors that the bound is about.
        plans: those that any score would have led to, the calmest first.
        used: the bound that was in force, L2.
        aliases: tied name -> the name in `parts` that it is tied to.

    Returns:
        The fill; None where no plan fits that releases all of `parts`, or nothing is in them.

    Guarantees:
        A function of what was released and of public plans. The plan that was carried out has no
        part in it.

    Edges:
        noise and mask as some plan says:     unbiased: the fill of the clipped update
        a tensor of `parts` was withheld:     None: its part of the norm is not seen
        nothing released, no values, no plan: None
        figures that are not finite:          None
        two raw updates, the same release:    the same
        a tied tensor:                        the strictest treatment of its names
    """
    if not sum(part.values for part in parts.values()):
        return None
    best: Fill | None = None
    least = math.inf
    for plan in plans:
        treatments = {name: _treatment(plan, name, aliases) for name in parts}
        whole = all(one.action is Action.RELEASE for one in treatments.values())
        fit = _fill(parts, treatments, used)
        if fit.misfit < least:
            best, least = (fit if whole else None), fit.misfit
    return best


def _fill(parts: Mapping[str, Shown], treatments: Mapping[str, Treatment], used: float) -> Fill:
    """The fill, were the release made by these treatments.

    A value kept with probability k leaves as z / k, z being signal + noise: k * sum of squares has
    the mean |z|^2 and, of the mask, the variance (1 - k) / k * sum of z^4.
    """
    value = blur = misfit = largest = 0.0
    for name, part in parts.items():
        one = treatments[name]
        keep = one.keep if one.action is Action.RELEASE else 0.0
        noise = (one.noise_std / used) ** 2 if keep else 0.0  # variance per value, of norm 1
        value += keep * part.energy / used**2 - noise * part.values
        blur += 2 * noise**2 * part.values + (1 - keep) * keep**2 * part.fourth / used**4
        misfit += _absence(part, keep, noised=noise > 0)
        largest = max(largest, noise)
    blur += 4 * largest  # signal times noise, for a signal of the whole bound
    beyond = max(0.0, -value, value - 1.0)
    misfit += beyond**2 / max(blur, 1e-6)
    return Fill(value, blur, misfit)


def _absence(part: Shown, keep: float, *, noised: bool) -> float:
    """How far the number of changed values is from what a mask of `keep` leaves, squared.

    Without noise a value may be unchanged for other reasons, so that only more than the mask would
    leave speaks against it. The divisor is the same for every mask, so that the nearest one wins
    where some noise was lost in the rounding of the last digit.
    """
    off = part.present - keep * part.values
    if off < 0 and not noised:
        return 0.0
    return off**2 / (part.values / 4 + 1)


def _treatment(plan: Plan, name: str, aliases: Mapping[str, str]) -> Treatment:
    """What a tensor gets: the strictest that any of its names asks for."""
    names = [name, *(alias for alias, original in aliases.items() if original == name)]
    found = [plan.treatments[one] for one in names]
    return Treatment(
        action=max(one.action for one in found),
        noise_std=max(one.noise_std for one in found),
        keep=min(one.keep for one in found),
    )
