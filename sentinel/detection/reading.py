"""Reading: layers of one shape, every value of which is read once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sentinel.detection.stack import Stack, largest, peaks
from sentinel.detection.trace import ACROSS, ALONG, Trace, directions, signs, traces

SKETCH = 32  # columns of the random projection that rows are compared through
MOST_ROWS = 1024  # rows that are compared with each other
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Reading:
    """Layers of one shape with the same living rows, and what one look at every value told.

    Attributes:
        stack: their weights.
        bias: [layers, units], float64; or None.
        norms: of the rows, [layers, units], float64.
        peak: largest magnitude of each, [layers], float64.
        sketch: [layers, units, `SKETCH`], where there are few units and many inputs; else None.
        projected: [layers, `ACROSS`, `ALONG`], what the traces are made of.
        alive: units that are not next to zero, [living].
    """

    stack: Stack
    bias: Tensor | None
    norms: Tensor
    peak: Tensor
    sketch: Tensor | None
    projected: Tensor
    alive: Tensor

    def select(self, places: list[int], alive: Tensor) -> Reading:
        """Return some of the layers, with their living rows."""
        if len(places) == len(self.stack):
            return replace(self, alive=alive)
        bias = None if self.bias is None else self.bias[places]
        sketch = None if self.sketch is None else self.sketch[places]
        stack, norms, peak = self.stack.select(places), self.norms[places], self.peak[places]
        return Reading(stack, bias, norms, peak, sketch, self.projected[places], alive)

    def traces(self) -> list[Trace]:
        """Where each layer stands."""
        return traces(self.projected, self.norms.square().sum(1).sqrt())

    def rows(self, chosen: Tensor) -> Tensor:
        """Return the same rows of every layer as places of the stack, [layers, rows]."""
        return chosen.expand(len(self.stack), -1)


def read(stack: Stack, bias: Tensor | None, generator: torch.Generator) -> Reading:
    """Read every value of some layers once, piece by piece; the generator draws the sketch."""
    norms, peak = stack.room(stack.rows), stack.room()
    few = stack.rows <= MOST_ROWS and stack.columns > SKETCH
    drawn = projection(stack, generator) if few else None
    sketch = stack.room(stack.rows, SKETCH).to(stack.dtype) if few else None
    projected = stack.room(ACROSS, ALONG)
    step = -(-stack.rows // MOST_ROWS)  # of very many rows, evenly chosen ones tell a move as well
    across, along = (
        shared.to(norms.device, stack.dtype)
        for shared in (signs(stack.rows), directions(stack.columns))
    )
    for rows in stack.row_slabs():
        for columns in stack.column_slabs():
            part = stack.part(rows, columns)
            norms[:, rows] += torch.linalg.vector_norm(part, dim=2).double().square_()
            torch.maximum(peak, peaks(part).double(), out=peak)
            if drawn is not None and sketch is not None:
                sketch[:, rows] += part @ drawn[columns]
            else:
                chosen = slice(rows.start + -rows.start % step, rows.stop, step)
                some = part[:, -rows.start % step :: step] @ along[columns]
                projected += math.sqrt(step) * (across[:, chosen] @ some).double()
    if sketch is not None:
        projected = (across @ sketch[:, :, :ALONG]).double()
    everything = torch.arange(stack.rows, device=norms.device)
    return Reading(stack, bias, norms.sqrt_(), peak, sketch, projected, everything)


def read_as_share(
    stack: Stack, bias: Tensor | None, generator: torch.Generator
) -> tuple[Reading, float]:
    """Read a layer as a share of its largest value, and return that value."""
    unit = largest(stack.values)
    share = replace(stack, dtype=torch.float64, divisor=stack.values.new_tensor([unit]).double())
    return read(share, None if bias is None else bias / unit, generator), unit


def alike_parts(part: Reading) -> list[tuple[list[int], Reading]]:
    """Split off every layer with rows next to zero; layers that are not finite are left out."""
    largest_row = part.norms.amax(1)
    living = part.norms > 1e-6 * largest_row[:, None]
    whole = (living.all(1) & (largest_row > TINY)).tolist()
    finite = part.norms.sum(1).isfinite().tolist()
    usual = [place for place, good in enumerate(finite) if good and whole[place]]
    found = [(usual, part.select(usual, part.alive))] if usual else []
    for place, good in enumerate(finite):
        if good and not whole[place]:
            found.append(([place], part.select([place], living[place].nonzero()[:, 0])))
    return found


def projection(stack: Stack, generator: torch.Generator) -> Tensor:
    """Random directions for the rows, [inputs, `SKETCH`]."""
    drawn = torch.randn(stack.columns, SKETCH, generator=generator, device="cpu")
    return drawn.to(stack.values.device, stack.dtype)
