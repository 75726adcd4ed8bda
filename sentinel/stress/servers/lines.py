"""The line that bins lie on, and where they cut it."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor


class Direction(enum.StrEnum):
    """Which line the bins lie on."""

    MEAN = "mean"  # ones / d: the mean of the record's values
    GAUSSIAN = "gaussian"  # one normal row of length one
    COSINE = "cosine"  # the first DCT-2 row that is not constant, length one


def line_of(direction: Direction, width: int, generator: torch.Generator) -> Tensor:
    """Return the scanned direction, [width]; only the normal one draws."""
    if direction is Direction.MEAN:
        return torch.full((width,), 1.0 / width)
    if direction is Direction.COSINE:
        steps = (torch.arange(width) + 0.5) * (math.pi / width)
        return torch.cos(steps) * math.sqrt(2.0 / width)
    drawn = torch.randn(width, generator=generator)
    return drawn / drawn.square().sum().sqrt()


def middles(count: int) -> Tensor:
    """Return the middles of `count` equal parts of 0 to 1, rising, [count]."""
    return (torch.arange(count) + 0.5) / count


def apart(count: int, records: int) -> Tensor:
    """Return `count` rising levels around the middle, one record of so many apart, [count].

    Bins that hold several records each read nobody. A layer too narrow for a cohort reads more of
    a part of it than of the whole.
    """
    if records <= count:
        return middles(count)
    return 0.5 + (torch.arange(count) - (count - 1) / 2) / records


def cuts_at(levels: Tensor, line: Tensor, inputs: Tensor | None) -> Tensor:
    """Return the quantiles of line . x at these levels.

    Args:
        levels: [count] rising, between 0 and 1.
        line: [width], the scanned direction.
        inputs: [n, width] what reaches the layer; where left out, it is taken for standard normal.
    """
    if inputs is None:
        standard: Tensor = torch.special.ndtri(levels)
        return standard * line.square().sum().sqrt()
    return torch.quantile(inputs.float().cpu() @ line, levels)
