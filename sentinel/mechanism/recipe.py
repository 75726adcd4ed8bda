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
    from sentinel.mechanism.entropy import Entropy


_HALF = 0.5  # what `frexp` leaves of a power of two
_LARGEST_STEP = 2.0**970  # `BIAS` steps are still finite


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

    Guarantees:
        The bound on values comes before the factor and both before the noise, so that what bounds
        the norm holds for the values that noise is added to. The mask rescales signal and noise
        alike.

    Edges:
        nothing given:                              values pass as they are
        std of 0:                                   no grid: nothing is rounded
        a std or max_abs below 0, or NaN:           ValueError
        a factor below 0, above 1, or NaN:          ValueError
        a step that is no power of two, with noise: ValueError
        keep of 0, below 0, above 1, or NaN:        ValueError
    """

    max_abs: float = math.inf
    factor: float = 1.0
    std: float = 0.0
    step: float = 1.0
    keep: float = 1.0

    def __post_init__(self) -> None:
        """Refuse figures under which less would be done than asked: NaN compares as false."""
        if not (self.std >= 0.0 and self.max_abs >= 0.0):
            raise ValueError("the noise and the bound on values must be numbers of 0 or more")
        if not 0.0 <= self.factor <= 1.0:
            raise ValueError("the factor must be from 0 to 1")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError("the share of coordinates kept must be over 0 and at most 1")
        if self.std > 0.0 and (math.frexp(self.step)[0] != _HALF or self.step > _LARGEST_STEP):
            raise ValueError("the grid of noise must be a power of two, at most 2^970")


class Workspace:
    """Carries out recipes on one chunk after the other, in buffers that stay in the cache.

    Guarantees:
        With noise, the result is `step * (round(value * factor / step) + k)`, exact below 2^51
        steps, with k as far from ideal noise as `slack` says: what rounding (value + ideal noise)
        to the grid gives. It is rounded to another dtype once, by the caller. Each value gets one
        draw. Which values stay does not depend on any value, and those that do not are 0 without
        a sign. The values of a CUDA tensor stay on the device; its noise is drawn on the CPU and
        copied there.

    Why: floats between 2^52 and 2^53 steps are whole steps, so that adding `BIAS * step` to
        `value * factor` rounds it to the grid, halves to even, and nothing else does. The noise
        comes as `(k - BIAS) * step`. The two are whole steps, and so is their sum, which is small
        enough for float64. (Adding the noise to a value that was not rounded first would save a
        pass, but halves would be rounded by whether k is even.)
    """

    def __init__(self, device: torch.device, values: int = CHUNK) -> None:
        """Make the buffers, for as many values as are treated in all: no more than `CHUNK`."""
        self._room = min(CHUNK, values)
        self._drawer = Drawer(self._room)
        self._wide = torch.from_numpy(self._drawer.scratch).to(device)
        self._bias = torch.empty((), dtype=torch.float64, device=device)

    def begin(self, entropy: Entropy, values: int) -> None:
        """Draw from `entropy` for the next so many values, and nothing drawn from another."""
        self._entropy = entropy
        self._drawer.begin(entropy, values)
        self._expected = values
        self._drawn_for: tuple[RoundedNormal, float] | None = None
        self._drawn = torch.empty(0, device="cpu")

    def treat(self, chunk: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        """What the recipe makes of `chunk` (values,): float64 (values,), valid until the next call.

        At most `CHUNK` values, of any floating dtype, on the device of the buffers.
        """
        noise = self._noise(recipe, chunk) if recipe.std > 0.0 else None  # needs the scratch memory
        wide = self._wide[: chunk.numel()].copy_(chunk)
        if math.isfinite(recipe.max_abs):
            wide.clamp_(-recipe.max_abs, recipe.max_abs)
        if noise is not None:
            torch.add(self._bias.fill_(BIAS * recipe.step), wide, alpha=recipe.factor, out=wide)
            wide.add_(noise)
        elif recipe.factor < 1.0:
            wide.mul_(recipe.factor)
        if recipe.keep < 1.0:
            wide.masked_fill_(self._dropped(recipe.keep, wide), 0.0).mul_(1.0 / recipe.keep)
        self._expected -= chunk.numel()
        return wide

    def _noise(self, recipe: Recipe, like: torch.Tensor) -> torch.Tensor:
        """(noise in whole steps - BIAS) * step, float64 (values,); small tensors share a draw."""
        tables, count = RoundedNormal.of(recipe.std / recipe.step), like.numel()
        if self._drawn_for != (tables, recipe.step) or self._drawn.numel() < count:
            at_once = min(self._room, max(count, self._expected))
            self._drawn = self._drawer.draw(tables, at_once, recipe.step)
            self._drawn_for = tables, recipe.step
        drawn, self._drawn = self._drawn[:count], self._drawn[count:]
        return drawn.to(like.device)

    def _dropped(self, share: float, like: torch.Tensor) -> torch.Tensor:
        """A mask of random bits alone, for all but `share` of the values: bool (values,)."""
        words = random_words(like.numel(), self._entropy)
        return torch.from_numpy(words >= np.uint64(round(share * 2.0**64))).to(like.device)
