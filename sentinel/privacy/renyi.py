"""Renyi: the online accountant; one curve per mechanism, added up."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sentinel.terms import Adjacency

if TYPE_CHECKING:
    from sentinel.privacy.mechanisms import Composition, Sampled

RENYI = "Renyi differential privacy (RDP)"

_REACH = 12.0  # standard deviations; the mass beyond is below e^-74
_CELLS = 300_000  # of one integral
_ROUNDING = 1e-12  # bound on the relative error of an exponent and a sum in float64
_CURVES = 4096  # a curve takes 1.3 kB


def renyi_epsilon(composition: Composition, delta: float) -> float:
    """Epsilon of a composition at `delta` by Renyi differential privacy.

    Guarantees:
        An upper bound. Curves add up (Mironov 2017); a Gaussian mechanism with ratio r has
        alpha / (2 r^2); dp-accounting turns the sum into epsilon (Canonne, Kamath, Steinke 2020,
        proposition 12).
    """
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415 - a second of imports

    curve = orders() / (2 * composition.ratio**2)
    for step, times in composition.sampled:
        curve = curve + times * sampled_curve(step)
    return float(compute_epsilon(orders(), curve, delta)[0])


@lru_cache(maxsize=1)
def orders() -> np.ndarray:
    """The orders at which curves are known: dp-accounting's own."""
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415 - a second of imports

    found = RdpAccountant().orders
    found.flags.writeable = False
    return np.asarray(found)


@lru_cache(maxsize=_CURVES)
def sampled_curve(step: Sampled) -> np.ndarray:
    """The Renyi curve of one step of a Gaussian mechanism on a Poisson sample, at `orders()`.

    Write q for the sampling rate, s for the noise multiplier, and count in norm bounds of one unit.
    The curve is the divergence of P = (1 - q) N(0, s^2) + q N(1, s^2) from

    - Q = N(0, s^2) under add-or-remove;
    - Q = (1 - q) N(0, s^2) + q N(-1, s^2) under replace.

    Guarantees:
        No neighbours lie further apart than P and Q. For add-or-remove: Mironov, Talwar and Zhang
        2019, theorem 4 and section 3.1. For replace, which dp-accounting's RDP refuses: fix who
        else is in the sample (divergences are jointly convex, and that part of the sampling is the
        same for both), and move the origin to the sum of the others. The unit's coin is the same
        too, so what is told apart is (1 - q) N(0) + q N(c) and (1 - q) N(0) + q N(c'), |c|, |c'|
        <= 1, in any dimension. For g >= 1 and a set A the first less g times the second is

            q N(c)(A) - (g - 1) (1 - q) N(0)(A) - g q N(c')(A).

        Given N(c)(A) = t, Neyman and Pearson bound N(0)(A) from below by Phi(Phi^-1(t) - 1/s) and
        N(c')(A) by Phi(Phi^-1(t) - 2/s), since c lies at most 1 from 0 and 2 from c'. With c = 1,
        c' = -1 and A a half-line both bounds are reached at once, so no neighbours give more. For
        g < 1 swap the two. Renyi divergences are integrals of such differences.

        The integral of P^a Q^(1 - a) is taken by the trapezoid rule in steps h, x counted in
        standard deviations. Shifted by i y into the complex plane, with |y| <= 4, 4 s / sqrt(a) and
        3 s (P and Q vanish at pi s, not before), the integrand grows by at most e^12, so the rule's
        error is below e^(12 - 2 pi |y| / h) < e^-25 of the integral. Its logarithm rises at most by
        2 a / s - x, so what lies beyond 2 a / s + 12 is below e^-70 of it; what lies below
        -12 - 1 / s is at most Q there. A generous bound on rounding is added. (dp-accounting 0.6
        sums a series at fractional orders that errs upwards or does not converge: by a
        thousandth at the order that decides a typical training, by far more at large noise. At
        whole orders the two agree.)

    Edges:
        add-or-remove, whole orders: dp-accounting's value
        a rate close to 1:           close to the unsampled curve, a / (2 r^2)
        a rate close to 0:           close to 0
        replace:                     never below add-or-remove, never above 2 a / s^2
        more than 300,000 cells:     infinite at that order, which is still a bound
    """
    curve = np.array([_divergence(step, float(order)) for order in orders()])
    curve.flags.writeable = False
    return curve


def _divergence(step: Sampled, order: float) -> float:
    """The divergence at one order; x in standard deviations, so that a unit moves it by 1 / s."""
    s, q = step.noise_multiplier, step.rate
    width = min(0.25, s / (2 * math.sqrt(order)))
    low, high = -(_REACH + 1 / s), 2 * order / s + _REACH
    if high - low > width * _CELLS:
        return math.inf
    x = np.arange(low, high + width, width)
    absent = -(x**2) / 2
    p = np.logaddexp(math.log1p(-q) + absent, math.log(q) - (x - 1 / s) ** 2 / 2)
    if step.adjacency is Adjacency.REPLACE:
        other = np.logaddexp(math.log1p(-q) + absent, math.log(q) - (x + 1 / s) ** 2 / 2)
    else:
        other = absent
    exponent = order * p + (1 - order) * other
    peak = float(exponent.max())
    integral = float(np.exp(exponent - peak).sum()) * width / math.sqrt(2 * math.pi)
    return (peak + math.log(integral) + _ROUNDING * (1 + abs(peak))) / (order - 1)
