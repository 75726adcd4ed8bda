"""Batches through tapped models, and the same by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sentinel.crew import one_thread
from sentinel.dpsgd import clipping
from sentinel.dpsgd.clipping import Bound
from sentinel.dpsgd.step import add_batch_, slots_of
from sentinel.dpsgd.taps import OpenBatch, Taps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sentinel.dpsgd.clipping import ClippedSum


@dataclass
class Clipper:
    """Clips and sums batches of one model, as a private step does before its noise."""

    clip_norm: float = 1.0
    batch: int = 8

    def bound(self, coordinates: int) -> Bound:
        """What the sums are bounded by."""
        return Bound(self.clip_norm, coordinates, 1.0, self.batch)

    def sum(  # noqa: PLR0913 - a batch, and how it goes through the model
        self,
        model: nn.Module,
        inputs: Tensor,
        units: list[int],
        *,
        loss: Callable[[Tensor], Tensor] | None = None,
        calls: list[slice] | None = None,
        mean_loss: bool = True,
    ) -> ClippedSum:
        """The clipped sum over `units`, one for each row of `inputs`, -1 for nobody's rows."""
        taps = Taps(model, mean_loss=mean_loss)
        slots = slots_of([p for p in model.parameters() if p.requires_grad])
        taps.active = True
        taps.batch = OpenBatch(1, len(inputs))
        try:
            for rows in calls or [slice(None)]:
                (loss or mean_of_squares)(model(inputs[rows])).backward()
            total = clipping.empty_sum(self.bound(slots[-1].end))
            captures = list(taps.batch.captures.values())
            add_batch_(total, slots, captures, torch.tensor(units))
        finally:
            taps.active = False
            taps.remove()
        return total

    def by_hand(self, model: nn.Module, inputs: Tensor, units: list[int]) -> Tensor:
        """The same, unit by unit, with ordinary gradients."""
        target = self.bound(count(model)).target * self.clip_norm
        total = torch.zeros(count(model), dtype=torch.float64)
        for unit in range(max(units, default=-1) + 1):
            own = [row for row, owner in enumerate(units) if owner == unit]
            gradient = torch.zeros(count(model), dtype=torch.float64)
            for row in own:
                gradient += gradient_of(model, inputs[row : row + 1])
            norm = float(gradient.norm()) * (1 + clipping._NORM_MARGIN) ** 0.5
            total += gradient * min(1.0, target / norm) if norm > 0 else gradient
        return total / self.clip_norm


def mean_of_squares(output: Tensor) -> Tensor:
    """A loss that is a mean over the batch."""
    return (output.flatten(1) - 0.3).square().sum(1).mean()


def gradient_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The ordinary gradient of the loss, one vector."""
    model.zero_grad()
    mean_of_squares(model(inputs)).backward()
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in model.parameters()
        if p.requires_grad
    ]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in found]).double()


def count(model: nn.Module) -> int:
    """Trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def clipper() -> Clipper:
    """With clip norm 1."""
    return Clipper()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small work is faster so."""
    with one_thread():
        yield
