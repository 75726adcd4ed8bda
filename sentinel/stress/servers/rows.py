"""The rows of a crafted layer: which they are, how they hide, and what takes them up behind."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.layers import State


@dataclass(frozen=True, slots=True)
class Stealth:
    """How a crafted layer hides; none of it costs the attacker a record.

    Attributes:
        permute: bins stand in random order.
        scale: row i and its bias are multiplied by exp(u), u uniform in -scale to scale.
        flip: share of the rows whose sign is turned (they cut the same line from the other side).
        jitter: normal noise on each weight of a row, relative to the row's root mean square.
        rows: share of the layer's rows that are crafted; the others stay honest.
    """

    permute: bool = False
    scale: float = 0.0
    flip: float = 0.0
    jitter: float = 0.0
    rows: float = 1.0


PLAIN = Stealth()


def crafted_rows(count: int, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Return which rows are crafted, in the order of their bins."""
    order = torch.randperm(count, generator=generator)
    chosen = order[: max(2, round(stealth.rows * count))]
    return chosen if stealth.permute else chosen.sort().values


def jittered_rows(rows: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of `size` relative to each row's root mean square."""
    rms = rows.square().mean(1, keepdim=True).sqrt()
    return rows + size * rms * torch.randn(rows.shape, generator=generator)


def row_scales(count: int, spread: float, generator: torch.Generator) -> Tensor:
    """Return positive factors, log-uniform from exp(-spread) to exp(spread), [count]."""
    return torch.exp(spread * (2 * torch.rand(count, generator=generator) - 1))


def row_factors(count: int, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Return factors with random sign, [count]."""
    scales = row_scales(count, stealth.scale, generator)
    flipped = torch.rand(count, generator=generator) < stealth.flip
    return torch.where(flipped, -scales, scales)


def even_column(outputs: int, *, is_last: bool) -> Tensor:
    """Return one column that weighs all neurons of the layer before alike, [outputs]."""
    column = torch.ones(outputs)
    if is_last and outputs > 1:
        # Softmax gradients sum to zero over the classes: an equal column would read nothing.
        column[1::2] = -1.0
    return column


def set_even(crafted: State, layer: str, *, is_last: bool) -> None:
    """Give every input of `layer` the same column, so that all bins weigh records alike."""
    weight = crafted[f"{layer}.weight"]
    column = even_column(weight.shape[0], is_last=is_last)
    weight.copy_(column[:, None].expand_as(weight))
    crafted[f"{layer}.bias"].zero_()


def scale_from(crafted: State, names: list[str], first: str, scale: float) -> None:
    """Multiply `first` and every later one of the layers `names` by `scale`."""
    for name in itertools.dropwhile(lambda name: name != first, names):
        crafted[f"{name}.weight"] *= scale
        crafted[f"{name}.bias"] *= scale
