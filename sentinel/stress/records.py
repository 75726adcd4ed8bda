"""Records: what a site trains on, and what an attacker guesses at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Records and their labels.

    Attributes:
        inputs: [N, ...] as the model takes them.
        labels: [N], as the loss takes them: whole numbers are classes, decimal ones 0 or 1 for a
            single output.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def take(self, chosen: Tensor) -> Records:
        """Those of a mask, [N] bool, or of indices."""
        return Records(self.inputs[chosen], self.labels[chosen])

    def plus(self, other: Records) -> Records:
        """These, then the others."""
        inputs = torch.cat([self.inputs, other.inputs])
        return Records(inputs, torch.cat([self.labels, other.labels]))
