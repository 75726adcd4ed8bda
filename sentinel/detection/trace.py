"""Trace: where a layer stands, in sixteen random numbers, so that its moves can be told later.

A trace is a random projection of the layer's values at length one. The cosine of two traces is,
up to chance, that of the two layers; nothing of a layer can be computed back from sixteen numbers.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Vectors = NDArray[np.float64]

ACROSS, ALONG = 4, 4  # signs over the rows, times directions over the columns
LENGTH = ACROSS * ALONG
SEED = 20_261  # public: the same layer has the same trace at every site

Trace = tuple[float, ...]  # `LENGTH` numbers; all 0 for a layer that is zero
NOWHERE: Trace = (0.0,) * LENGTH


@functools.lru_cache(maxsize=64)
def signs(count: int) -> Tensor:
    """Random signs of `count` rows, [`ACROSS`, count]; shared, so never to be written to."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(2, (count, ACROSS), generator=generator)
    return (2.0 * drawn.T - 1.0).contiguous()


@functools.lru_cache(maxsize=64)
def directions(count: int) -> Tensor:
    """Random directions over `count` columns, [count, `ALONG`]; shared, never to be written to."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(count, ALONG, generator=generator)


def traces(projected: Tensor, norms: Tensor) -> list[Trace]:
    """Return traces at the precision in which they are kept.

    Args:
        projected: [layers, `ACROSS`, `ALONG`], the projections.
        norms: [layers], Frobenius norm of each layer.
    """
    flat = projected.flatten(1).double() / norms.double().clamp_min(1e-30)[:, None]
    kept = flat.cpu().numpy().astype(np.float16).astype(float)
    return [tuple(row) for row in np.nan_to_num(kept, posinf=0.0, neginf=0.0).tolist()]


def cosine(one: Trace, other: Trace) -> float:
    """Cosine of two traces; 0 where one of them is that of a layer of zeros."""
    sizes = math.hypot(*one) * math.hypot(*other)
    product: float = sum(map(operator.mul, one, other))
    return product / sizes if sizes > 0.0 else 0.0


def distances(before: Vectors, after: Vectors, grown: Vectors) -> Vectors:
    """How far layers have moved, in units of the size that each had; about, by 16 numbers.

    Args:
        before: [layers, `LENGTH`], their traces.
        after: the same, now.
        grown: [layers], the size of each now over the size before.
    """
    away: Vectors = np.linalg.norm(after * grown[:, None] - before, axis=1)
    return away / math.sqrt(LENGTH)


def joined(parts: Sequence[Trace]) -> Trace:
    """Return the mark of a whole model: its layers' traces, each with signs of its own, summed."""
    if not parts:
        return NOWHERE
    own = signs(len(parts) * ALONG).T.reshape(len(parts), LENGTH).numpy()
    total = (np.array(parts) * own).sum(0) / math.sqrt(len(parts))
    return tuple(total.astype(np.float16).astype(float).tolist())
