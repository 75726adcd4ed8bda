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
        flags: [N] bool, who has the property that a server asks for; None where nobody said.
    """

    inputs: Tensor
    labels: Tensor
    flags: Tensor | None = None

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def take(self, chosen: Tensor) -> Records:
        """Those of a mask, [N] bool, or of indices."""
        flags = None if self.flags is None else self.flags[chosen]
        return Records(self.inputs[chosen], self.labels[chosen], flags)

    def plus(self, other: Records) -> Records:
        """These, then the others; with flags where both have them."""
        flags = None
        if self.flags is not None and other.flags is not None:
            flags = torch.cat([self.flags, other.flags])
        inputs = torch.cat([self.inputs, other.inputs])
        return Records(inputs, torch.cat([self.labels, other.labels]), flags)
