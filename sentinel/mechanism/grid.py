"""Grid: the step to which values are rounded before noise, chosen from public figures only."""

from __future__ import annotations

import math

# Of the standard deviation: between them lie the tables of the noise.
_COARSEST, _FINEST = 2.0**-10, 2.0**-45


def grid_step(max_norm: float, coordinates: int, std: float = math.inf) -> float:
    """The rounding step for a clipped vector.

    Args:
        max_norm: L2 bound C of the vector, greater than 0.
        coordinates: number D of values in it.
        std: standard deviation of the noise that will be added, greater than 0.

    Returns:
        The largest power of two g with g * sqrt(D) / 2 <= 2^-12 * C and g <= 2^-10 * std, but not
        below 2^-46 * std (where the noise is a million bounds, a coarser grid is fine enough).
        Rounding every coordinate to a multiple of g moves the vector by at most g * sqrt(D) / 2,
        which `rounding_reach` gives and whoever clips takes off the bound.

    Guarantees:
        A power of two that follows from public figures alone. `std / step` lies between 2^10 and
        2^46, where the tables of the noise lie. Rounding moves a vector by at most 2^-12 *
        max_norm, unless the finest grid of the noise is coarser than that; `rounding_reach` tells
        for any step.

    Edges:
        no coordinates:                        as for one
        std infinite, or left out:             the bound alone decides
        max_norm infinite, std finite:         the noise alone decides
        max_norm or std of 0, below 0, or NaN: ValueError
        both infinite:                         ValueError

    Why: on multiples of g, the sum of a value and of noise that was itself rounded to g is what
    rounding (value + ideal noise) gives, so the release is post-processing of the Gaussian
    mechanism, and where the result lies says nothing about the value (Mironov 2012).
    """
    if not (max_norm > 0 and std > 0 and min(max_norm, std) < math.inf):
        raise ValueError("a grid needs a norm bound and a noise above 0, one of them finite")
    largest = min(max_norm * 2.0**-11 / math.sqrt(max(coordinates, 1)), std * _COARSEST)
    if math.isfinite(std):
        largest = max(largest, std * _FINEST)
    return 2.0 ** math.floor(math.log2(largest))


def rounding_reach(step: float, coordinates: int) -> float:
    """How far rounding to `step` can move a vector of `coordinates` values, in L2.

    Guarantees:
        No vector of so many values is moved further, in exact arithmetic, when each value goes to
        its nearest multiple of `step`; some vector is moved exactly so far.

    Edges:
        no coordinates:        0
        a step of 0 (no grid): 0
    """
    return step * math.sqrt(coordinates) / 2
