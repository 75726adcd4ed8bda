"""Quantile: a clip norm that follows the units' own norms, privately (Andrew et al. 2021).

In each step every unit of the batch tells one bit: whether its norm is at most the clip norm. The
noised count of these bits moves the clip norm towards the norm that a given share of the units
stays under.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.mechanism import add_noise_, grid_step

if TYPE_CHECKING:
    from sentinel.mechanism import Entropy

RATE = 0.2  # eta_C of the paper: the clip norm moves by at most a factor exp(RATE) in a step
_HALF = 0.5  # how far one unit moves the sum of its bit less a half
_NARROW = 20  # standard deviation of the count's noise: the expected units in a batch / this


@dataclass(frozen=True, slots=True)
class Quantile:
    """The rule by which the clip norm moves; every figure is public.

    Attributes:
        unclipped: share of units whose norm is to be at most the clip norm.
        floor: least clip norm.
        ceiling: largest clip norm.
        batch: expected units in a batch.
    """

    unclipped: float
    floor: float
    ceiling: float
    batch: int

    @property
    def count_std(self) -> float:
        """Standard deviation of the noise on the count, sigma_b."""
        return self.batch / _NARROW

    def gradient_multiplier(self, noise_multiplier: float) -> float:
        """The multiplier of the gradients' noise, so that both together cost `noise_multiplier`.

        Args:
            noise_multiplier: z, what is charged.

        Returns:
            (z^-2 - (2 sigma_b)^-2)^(-1/2), above z.

        Raises:
            ValueError: the count's noise alone costs more than is charged (z >= 2 sigma_b).

        Guarantees:
            Gradient and count are one vector: the gradient over clip norm x this multiplier, and
            the count, where a bit less a half moves it by 1/2, over sigma_b. One unit moves it by
            sqrt(this^-2 + (2 sigma_b)^-2) = 1 / z in all. (Andrew et al. 2021, theorem 1.)
        """
        left = noise_multiplier**-2 - (2.0 * self.count_std) ** -2
        if left <= 0.0:
            raise ValueError(
                f"a batch of {self.batch} units is too small for a clip norm that follows a "
                f"quantile under this noise_multiplier; more than {10 * noise_multiplier:.0f} are "
                "needed"
            )
        return 1.0 / math.sqrt(left)

    def following(self, clip_norm: float, unclipped: int, units: int, entropy: Entropy) -> float:
        """The next clip norm.

        Args:
            clip_norm: of this step.
            unclipped: units of the batch whose norm was at most `clip_norm`.
            units: in the batch.
            entropy: where the count's noise comes from.

        Guarantees:
            The counts are used only as `unclipped - units / 2` plus noise. The divisor is the
            public `batch`.

        Edges:
            an empty batch: moved by noise around a share of 1/2
            all unclipped:  down, by at most a factor exp(-RATE)
            none unclipped: up, by at most a factor exp(RATE)
            any batch:      never below `floor` or above `ceiling`
        """
        centred = torch.tensor([unclipped - _HALF * units], dtype=torch.float64)
        add_noise_(centred, self.count_std, grid_step(_HALF, 1, self.count_std), entropy)
        share = min(1.0, max(0.0, float(centred) / self.batch + _HALF))
        moved = clip_norm * math.exp(-RATE * (share - self.unclipped))
        return min(self.ceiling, max(self.floor, moved))
