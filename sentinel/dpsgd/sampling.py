"""Sampling: each unit by a coin of its own, at a rate that only public figures fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sentinel.mechanism.entropy import uniform

if TYPE_CHECKING:
    from sentinel.dpsgd.units import Drawn, Units
    from sentinel.mechanism import Entropy

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Rate:
    """The public figures behind a batch.

    Attributes:
        batch: expected number of units in a batch, up to `cohort`.
        cohort: public number of units in the data set.
    """

    batch: int
    cohort: int

    @property
    def probability(self) -> float:
        """With which each unit comes into a batch, q."""
        return self.batch / self.cohort

    @property
    def steps(self) -> int:
        """Batches after which each unit was seen once, in expectation."""
        return max(1, round(self.cohort / self.batch))

    @property
    def sampling(self) -> str:
        """What the ledger calls it."""
        return "none" if self.batch == self.cohort else "poisson"


def draw(units: Units, rate: Rate, entropy: Entropy) -> Drawn:
    """Draw one batch.

    Args:
        units: the data set, grouped.
        rate: the public figures.
        entropy: where the coins come from.

    Guarantees:
        Each unit comes in independently of all others, with a probability of at most q and less
        than 2^-52 below it. How many units there are has no part in it. (Abadi et al. 2016,
        section 3.1; the amplification that the ledger counts is for this sampling and no other.)

    Edges:
        no unit: an empty batch
        q = 1:   every unit; charged without amplification
    """
    coins = uniform(len(units), entropy, CPU)
    chosen = torch.nonzero(coins <= rate.probability)[:, 0].numpy().astype(np.int64, copy=False)
    return units.take(chosen, entropy)
