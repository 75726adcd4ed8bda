"""Walk a tensor in pieces that fit the cache, so that wide arithmetic needs no wide copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 1 << 17  # values: 1 MiB as float64; with fewer, the calls cost more than the cache saves


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield one-dimensional views of `tensor` (contiguous, any shape), in order.

    Writing to a view writes to the tensor. A zero-size tensor yields nothing.
    """
    size = tensor.numel()
    if size > CHUNK:
        yield from torch.split(tensor.view(-1), CHUNK)
    elif size:  # a model of many small tensors spends its time in calls
        yield tensor.view(-1)


def sum_of_squares(tensor: torch.Tensor, max_abs: float = math.inf) -> float:
    """Sum of squares of a contiguous floating tensor, accumulated in float64.

    Values count as no larger than `max_abs`. NaN anywhere, or Inf without such a bound, gives a
    result that is not finite. Float32 input cannot overflow.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for piece in chunks(tensor):
        wide = piece.double()
        if math.isfinite(max_abs):
            wide = wide.clamp(-max_abs, max_abs)  # float64 values are the tensor's own
        total += torch.dot(wide, wide)
    return float(total)
