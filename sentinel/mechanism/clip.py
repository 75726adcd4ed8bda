"""Clip: the factor that bounds the L2 norm of many tensors together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Scaling rounds each float32 value by up to 2^-24 of itself; aiming this far below the bound keeps
# the norm of the rounded values under it.
_ROUNDING = 1.0 - 2.0**-22
_SMALLEST = 2.0**-100


def clip_factor(squares: Iterable[float], max_norm: float) -> float:
    """The factor that brings tensors of these sums of squares under one L2 norm.

    Args:
        squares: sum of squares of each tensor, in float64.
        max_norm: bound on the joint L2 norm, greater than 0.

    Returns:
        A factor from 0 to 1; 1 where the joint norm is already under the bound.

    Raises:
        ValueError: a norm that is not finite, or a bound that is not greater than 0.

    Guarantees:
        float32 tensors times the factor, rounded to nearest, have a joint norm of at most max_norm,
        where max_norm is 2^-100 or more (below, the smallest steps of float32 would count).

    Edges:
        a norm of 0, or no tensors:                factor 1
        a norm of 2^100 bounds or more:            factor 0; the products would leave float32's
                                                   range
        a norm that is NaN, Inf or beyond float64: ValueError
        a bound of 0, below 0, or NaN:             ValueError
    """
    if not max_norm > 0:
        raise ValueError("max_norm must be greater than 0")
    try:
        norm = math.sqrt(math.fsum(squares))
    except OverflowError:
        norm = math.inf
    if not math.isfinite(norm):
        raise ValueError("the norm to clip is not finite; check the update first")
    target = max_norm * _ROUNDING
    if norm <= target:
        return 1.0
    factor = target / norm
    return factor if factor > _SMALLEST else 0.0
