"""The base mechanism of a site-level promise: clip, round to grid, add noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.mechanism.clip import clip_to
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import add_noise_

if TYPE_CHECKING:
    import torch

    from sentinel.mechanism.entropy import Entropy


@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Gaussian mechanism over a whole update; both figures fixed before the data was seen.

    Attributes:
        clip_norm: L2 bound C of the update.
        noise_multiplier: standard deviation of the noise / clip_norm.

    Guarantees:
        - Before noise, the update lies on a grid that depends on C and the number of coordinates
          only, and its L2 norm is at most C: it is clipped to C less the reach of the rounding.
        - Replacing the site's data moves it by at most 2 C, adding or removing it by at most C;
          the ledger derives the loss from the adjacency and the noise multiplier alone.
        - Not covered: the draws are 53-bit Box-Muller, not ideal Gaussians. The slack that this
          adds to epsilon and delta is not yet bounded (docs/decisions/0003-noise-on-a-grid.md).
    """

    clip_norm: float
    noise_multiplier: float

    def apply_(
        self, deltas: dict[str, torch.Tensor], squares: dict[str, float], entropy: Entropy
    ) -> None:
        """Clip and noise `deltas` in place; `squares` are their sums of squares."""
        coordinates = sum(delta.numel() for delta in deltas.values())
        std = self.clip_norm * self.noise_multiplier
        step = grid_step(self.clip_norm, coordinates, std)
        tightened = self.clip_norm - rounding_reach(step, coordinates)
        clip_to(tightened, deltas.values(), squares.values())
        for delta in deltas.values():
            add_noise_(delta, std, step, entropy)
