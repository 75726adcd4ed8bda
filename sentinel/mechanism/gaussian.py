"""The base mechanism of a site-level promise: clip, round to grid, add noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.mechanism.clip import clip_factor
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import treat_all
from sentinel.mechanism.recipe import Recipe
from sentinel.memory import room

if TYPE_CHECKING:
    from sentinel.mechanism.entropy import Entropy
    from sentinel.memory import Rooms
    from sentinel.source import Differences, Held


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

    Edges:
        `apply` to an update of zeros:              the noise alone
        `apply` to an update without values:        nothing comes out, and nothing is drawn
        a 0-d tensor:                               one coordinate
        a norm over C:                              brought to C less the reach of the grid
        a norm that is beyond float64:              ValueError; nothing is drawn
        C or the multiplier 0, below 0, NaN or Inf: ValueError; nothing is drawn
    """

    clip_norm: float
    noise_multiplier: float

    @property
    def std(self) -> float:
        """Standard deviation of the noise per coordinate."""
        return self.clip_norm * self.noise_multiplier

    def apply(
        self,
        deltas: Differences,
        entropy: Entropy,
        rooms: Rooms = room,
    ) -> tuple[Held, dict[str, float]]:
        """Clip and noise `deltas`: what comes out, and its sums of squares.

        Args:
            deltas: float32 or float64, any shapes; read only. They know their own norm, and give
                out no value but those that it was measured on.
            entropy: where the noise comes from.
            rooms: where the memory for the result comes from.

        Raises:
            ValueError: a norm that is not finite, or a grid that cannot be had.
            Withheld: LOCAL_MODEL_CHANGED, where they were changed since they were measured.
        """
        coordinates = sum(deltas.sizes.values())
        step = grid_step(self.clip_norm, coordinates, self.std)
        tightened = self.clip_norm - rounding_reach(step, coordinates)
        factor = clip_factor(deltas.squares.values(), tightened)
        recipe = Recipe(factor=factor, std=self.std, step=step)
        return treat_all(deltas, dict.fromkeys(deltas, recipe), entropy, rooms)
