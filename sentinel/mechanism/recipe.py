"""Recipe: what one pass does to every value of a tensor, and the buffers in which it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sentinel.chunks import CHUNK
from sentinel.mechanism.entropy import random_words
from sentinel.mechanism.rounded_normal import BIAS, Drawer, RoundedNormal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sentinel.mechanism.entropy import Entropy

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One pass over a tensor, in this order.

    Attributes:
        max_abs: bound on every value.
        factor: what values are multiplied by, 0 to 1, so that a norm bound holds.
        std: standard deviation of the noise, in the units of the tensor.
        step: the grid of value and noise, a power of two; not used where `std` is 0.
        keep: probability with which a value stays; what stays is multiplied by 1 / keep, and all
            others are 0.
    """

    max_abs: float = math.inf
    factor: float = 1.0
    std: float = 0.0
    step: float = 1.0
    keep: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a share that would divide by zero or raise values."""
        if not 0.0 < self.keep <= 1.0:
            raise ValueError("the share of coordinates kept must be over 0 and at most 1")


class Workspace:
    """Carries out recipes on one chunk after the other, in buffers that stay in the cache.

    Guarantees:
        With noise, value and noise are summed as whole multiples of the step in float64, which is
        exact below 2^51 multiples: the sum is `step * round((value + ideal noise) / step)` for
        noise as far from ideal as `slack` says, and is rounded to another dtype once, by the
        caller. Each value gets one draw. Which values stay does not depend on any value. The values
        of a CUDA tensor stay on the device; its noise is drawn on the CPU and copied there.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the buffers."""
        self._wide = torch.empty(CHUNK, dtype=torch.float64, device=device)
        self._drawer = Drawer(CHUNK)

    def begin(self, entropy: Entropy, values: int) -> None:
        """Draw from `entropy` for the next so many values, and nothing drawn from another."""
        self._entropy = entropy
        self._drawer.begin(entropy)
        self._expected = values
        self._drawn: tuple[RoundedNormal | None, Floats] = (None, np.empty(0))

    def treat(self, chunk: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        """What the recipe makes of `chunk` (values,): float64 (values,), valid until the next call.

        At most `CHUNK` values, of any floating dtype, on the device of the buffers.
        """
        wide = self._wide[: chunk.numel()].copy_(chunk)
        if math.isfinite(recipe.max_abs):
            wide.clamp_(-recipe.max_abs, recipe.max_abs)
        if recipe.std > 0.0:
            wide.mul_(recipe.factor / recipe.step).round_()
            wide.add_(self._noise(recipe, wide)).sub_(BIAS).mul_(recipe.step)
        elif recipe.factor < 1.0:
            wide.mul_(recipe.factor)
        if recipe.keep < 1.0:
            wide.mul_(self._kept(recipe.keep, wide)).mul_(1.0 / recipe.keep)
        self._expected -= chunk.numel()
        return wide

    def _noise(self, recipe: Recipe, like: torch.Tensor) -> torch.Tensor:
        """BIAS + noise in whole steps, float64 (values,); small tensors share what is drawn."""
        tables, count = RoundedNormal.of(recipe.std / recipe.step), like.numel()
        drawn_for, drawn = self._drawn
        if drawn_for is not tables or drawn.size < count:
            drawn = self._drawer.draw(tables, min(CHUNK, max(count, self._expected)))
        self._drawn = (tables, drawn[count:])
        return torch.from_numpy(drawn[:count]).to(like.device)

    def _kept(self, share: float, like: torch.Tensor) -> torch.Tensor:
        """A mask of random bits alone: bool (values,)."""
        words = random_words(like.numel(), self._entropy)
        return torch.from_numpy(words < np.uint64(round(share * 2.0**64))).to(like.device)
