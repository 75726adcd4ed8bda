"""Stack: matrices of one shape, measured together, and large ones read piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

SLAB = 1 << 18  # values read at a time: 1 MiB as float32, about the second-level cache
GROUP = 1 << 18  # values of matrices that are stacked, about
_ALL = slice(None)
_GLANCE = 32  # columns


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one shape, measured together; read in pieces, so that no wide copy is made.

    Attributes:
        values: [matrices, rows, columns], any floating dtype; of a single matrix borrowed.
        dtype: what they are read in.
        divisor: [matrices], what each is read as a share of; None where as it is.
    """

    values: Tensor
    dtype: torch.dtype
    divisor: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Stack:
        """Stack tensors of one shape and dtype, each as a matrix of so many rows."""
        values = torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
        return cls(values.reshape(len(tensors), rows, -1), dtype)

    def __len__(self) -> int:
        """How many matrices."""
        return len(self.values)

    @property
    def rows(self) -> int:
        """Rows of each."""
        return self.values.shape[1]

    @property
    def columns(self) -> int:
        """Columns of each."""
        return self.values.shape[2]

    def part(self, rows: slice | Tensor, columns: slice = _ALL) -> Tensor:
        """Values of some rows, a slice or [matrices, places] of each; [matrices, rows, columns]."""
        if isinstance(rows, slice):
            found = self.values[:, rows, columns]
        else:
            first = torch.arange(len(self), device=rows.device)[:, None] * self.rows
            flat = self.values.flatten(0, 1)[:, columns]
            found = flat.index_select(0, (rows + first).flatten()).view(*rows.shape, -1)
        found = found.to(self.dtype)
        return found if self.divisor is None else found / self.divisor[:, None, None]

    def row_slabs(self, rows: int | None = None) -> Iterator[slice]:
        """Cut so many rows (all of them where left out) into pieces of about `SLAB` values."""
        step = max(1, SLAB // (len(self) * min(self.columns, SLAB)))
        yield from _cut(self.rows if rows is None else rows, step)

    def column_slabs(self) -> Iterator[slice]:
        """Cut the columns of one row into pieces of `SLAB` values: mostly one piece."""
        yield from _cut(self.columns, SLAB)

    def select(self, places: Sequence[int], divisor: Tensor | None = None) -> Stack:
        """Return some of the matrices, each to be divided."""
        if len(places) < len(self):
            return Stack(self.values[list(places)], self.dtype, divisor)
        return Stack(self.values, self.dtype, divisor)

    def room(self, *shape: int) -> Tensor:
        """Zeros in float64, [matrices, *shape]."""
        return self.values.new_zeros((len(self), *shape), dtype=torch.float64)

    def still(self) -> list[int]:
        """Places of the matrices that hold nothing but zeros; the quick look comes first."""
        some = self.values[:, :2, :_GLANCE].flatten(1).ne(0).any(1).tolist()
        return [place for place, seen in enumerate(some) if not seen and not self._moved(place)]

    def _moved(self, place: int) -> bool:
        return largest(self.values[place]) != 0.0


def largest(values: Tensor) -> float:
    """Largest magnitude; NaN or infinite where a value is."""
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _cut(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def peaks(values: Tensor) -> Tensor:
    """Largest magnitude of each matrix; a single one is read once for both ends."""
    if len(values) == 1:
        low, high = values.aminmax()
        return torch.maximum(-low, high)[None]
    return torch.maximum(-values.amin((1, 2)), values.amax((1, 2)))
