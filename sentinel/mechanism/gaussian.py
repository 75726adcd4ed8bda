"""The base mechanism of a site-level promise: clip, round to grid, add noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.mechanism.clip import clip_factor
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import treat_all_
from sentinel.mechanism.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from sentinel.mechanism.entropy import Entropy


@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Gaussian mechanism over a whole update; both figures fixed before the data was seen.

    Attributes:
        clip_norm: L2 bound C of the update.
        noise_multiplier: standard deviation of the noise / clip_norm.

    Guarantees:
        - Before noise, the update lies on a grid that depends on C, the noise multiplier and the
          number of coordinates only, and its L2 norm is at most C: it is clipped to C less the
          reach of the rounding.
        - Replacing the site's data moves it by at most 2 C, adding or removing it by at most C;
          the ledger derives the loss from the adjacency and the noise multiplier alone.
        - What is released is post-processing of the Gaussian mechanism with noise as far from ideal
          as `slack(coordinates)` says, which the ledger adds (docs/decisions/0003).
    """

    clip_norm: float
    noise_multiplier: float

    @property
    def std(self) -> float:
        """Standard deviation of the noise per coordinate."""
        return self.clip_norm * self.noise_multiplier

    def apply_(
        self,
        deltas: Mapping[str, torch.Tensor],
        squares: Mapping[str, float],
        entropy: Entropy,
    ) -> dict[str, float]:
        """Clip and noise `deltas` in place; their new sums of squares.

        Args:
            deltas: name -> contiguous, float32 or float64, any shape.
            squares: sum of squares of each, before.
            entropy: where the noise comes from.

        Raises:
            ValueError: a sum of squares that is not finite, or a grid that cannot be had.
        """
        coordinates = sum(delta.numel() for delta in deltas.values())
        step = grid_step(self.clip_norm, coordinates, self.std)
        tightened = self.clip_norm - rounding_reach(step, coordinates)
        factor = clip_factor(squares.values(), tightened)
        recipe = Recipe(factor=factor, std=self.std, step=step)
        return treat_all_(deltas, dict.fromkeys(deltas, recipe), entropy)
