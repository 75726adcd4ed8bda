"""Planted: records whose traces are easy to find; an attack that misses them is weak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.records import Records

if TYPE_CHECKING:
    from torch import Tensor


def outlying(data: Records, count: int, generator: torch.Generator) -> Records:
    """Records unlike any patient, each with a label by chance.

    Every value is the least or the largest that the data have in its place, by a coin.

    Args:
        data: what a model takes.
        count: how many.
        generator: draws coins and labels.
    """
    least, most = data.inputs.amin(0), data.inputs.amax(0)
    coins = torch.rand((count, *least.shape), generator=generator) < 1 / 2
    return Records(torch.where(coins, most, least), _some(data.labels, count, generator))


def mislabelled(data: Records, count: int, generator: torch.Generator) -> Records:
    """Real records of two classes, 0 and 1, under the other label."""
    chosen = torch.randperm(len(data), generator=generator)[:count]
    taken = data.take(chosen)
    return Records(taken.inputs, 1 - taken.labels)


def _some(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (count,), generator=generator)]
