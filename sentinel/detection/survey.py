"""Survey: tensors of one form read once, piece by piece, and what their features are.

Everything is computed for all tensors of a batch at a time, since small ones take no longer to
compute than to call for. Nothing wide is made of a large tensor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sentinel.detection.stack import Stack

SKETCH = 32  # columns of the random projection in which rank is measured
MOST_ROWS = 512  # rows that are compared with each other
MOST_VALUES = 1 << 19  # values read for the moments of one tensor
TWIN = 1e-4  # 1 - |cosine| below which two rows hold the same record
COMPANY = {"match_02": 0.02, "match_10": 0.1, "match_30": 0.3}  # distance, as a share of the norm
_WIDE = 0.3  # distance beside that from the middle guess, below which guesses agree
_APART = 3e-3  # what float32 tells apart
FAINT = 1e-3  # beside the largest row or the root mean square: no more than rounding
MOST_SKETCHED = 1 << 12  # rows of a matrix whose sketch is kept whole
FLOOR = -6.0  # log10 of the energy share below which rounding speaks
_TINY = 1e-30
_RIDGE = 1e-12  # beside a trace of 1: far below the floor, and above what float64 rounds


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one form.

    Attributes:
        stack: their values; a vector is a single row.
        bias: [tensors, rows], or None.
        is_matrix: whether they are no vectors.
        directions: random ones for the rows, [tensors, columns, k]; None where columns are few.
    """

    stack: Stack
    bias: Tensor | None
    is_matrix: bool
    directions: Tensor | None = None

    def select(self, places: list[int], divisor: Tensor | None = None) -> Batch:
        """Return some of them, each to be divided."""
        if len(places) == len(self.stack) and divisor is None:
            return self
        bias = None if self.bias is None else self.bias[places]
        if bias is not None and divisor is not None:
            bias = bias / divisor[:, None]
        directions = None if self.directions is None else self.directions[places]
        return Batch(self.stack.select(places, divisor), bias, self.is_matrix, directions)


@dataclass(frozen=True, slots=True)
class Survey:
    """What one reading of a batch gives.

    Attributes:
        sizes: L2 norm of each tensor with its bias, [tensors]; not finite where its squares are.
        squares: squared norms of the rows, [tensors, rows].
        along: squared norm in the direction that the bias names, [tensors]; 0 without one.
        gram: [tensors, k, k], of the columns of the sketch or of its rows, whichever are fewer.
        sketch: [tensors, rows, k], the rows in few directions; none where there are too many.
    """

    sizes: Tensor
    squares: Tensor
    along: Tensor
    gram: Tensor
    sketch: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Survey:
        """Read every value once, piece by piece."""
        stack, bias = batch.stack, batch.bias
        size = stack.room() if bias is None else _norms(bias)
        named = None if bias is None else bias / size[:, None].clamp_min(_TINY)
        squares, along = stack.room(stack.rows), stack.room(0 if bias is None else stack.columns)
        width = min(stack.columns, SKETCH)
        gram = stack.room(width, width)
        kept = [stack.room(0, width).to(stack.dtype)]
        for rows in stack.row_slabs():
            sketch: Tensor | None = None
            for columns in stack.column_slabs():
                part = stack.part(rows, columns)
                squares[:, rows] += _norms(part).double().square_()
                if named is not None:
                    along[:, columns] += (named[:, None, rows] @ part)[:, 0]
                if batch.is_matrix:
                    shown = _sketched(batch, part, columns)
                    sketch = shown if sketch is None else sketch + shown
            if sketch is not None and stack.rows <= MOST_SKETCHED:
                kept.append(sketch)
            elif sketch is not None:
                gram += sketch.double().mT @ sketch.double()  # so many rows are more than k
        whole = torch.cat(kept, dim=1)
        return cls(
            sizes=torch.hypot(squares.sum(1).sqrt(), size.double()),
            squares=squares,
            along=along.square_().sum(1),
            gram=_gram(whole) if whole.shape[1] else gram,
            sketch=whole,
        )


def _sketched(batch: Batch, part: Tensor, columns: slice = slice(None)) -> Tensor:
    """Rows in few random directions, in which low rank stays low rank."""
    return part if batch.directions is None else part @ batch.directions[:, columns]


def _gram(sketch: Tensor) -> Tensor:
    exact = sketch.double()
    tall = sketch.shape[1] >= sketch.shape[2]
    return exact.mT @ exact if tall else exact @ exact.mT


def _norms(values: Tensor) -> Tensor:
    """L2 norms along the last dimension."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms


def matrix_features(batch: Batch, seen: Survey) -> dict[str, Tensor]:
    """Return the features of matrices: rank, row structure, what the bias explains; and moments."""
    rows, columns = batch.stack.rows, batch.stack.columns
    norms = seen.squares.sqrt()
    loud = norms > FAINT * norms.amax(1, keepdim=True)
    most = min(MOST_ROWS, max(8, MOST_VALUES // columns), rows)
    largest_rows = norms.topk(min(MOST_ROWS, rows)).indices if most < rows else None
    sample = None if largest_rows is None else largest_rows[:, :most]
    energies = seen.squares if sample is None else seen.squares.gather(1, sample)
    shown, across = _moments(batch, sample, energies)
    reach = across.sqrt()
    compared = largest_rows if rows > MOST_ROWS else None
    chosen, bias = _sketched_rows(batch, seen.sketch, compared), batch.bias
    if bias is not None and compared is not None:
        bias = bias.gather(1, compared)
    return {
        **shown,
        **_spectrum(seen.gram, min(rows, columns)),
        "unexplained": _unexplained(batch.bias, seen),
        "twins": _twins(chosen, bias, loud if compared is None else loud.gather(1, compared)),
        **({} if bias is None else _company(chosen, bias)),
        "faint_rows": 1.0 - loud.double().mean(1),
        "row_spread": _participation(seen.squares),
        "column_spread": _participation(across),
        "faint_columns": (reach <= FAINT * reach.amax(1, keepdim=True)).double().mean(1),
    }


def vector_features(batch: Batch, seen: Survey) -> dict[str, Tensor]:
    """Return the features of vectors: moments alone."""
    return _moments(batch, None, seen.squares)[0]


def _moments(
    batch: Batch, sample: Tensor | None, energies: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Shape of the distribution of the entries, free of their size; squared norms of the columns.

    Args:
        batch: the tensors; vectors have no columns of interest.
        sample: the rows that are read, [tensors, rows]; all where left out.
        energies: squared norms of these rows, [tensors, rows].
    """
    stack = batch.stack
    count, energy = energies.shape[1] * stack.columns, energies.sum(1)
    scale = (count / energy.clamp_min(_TINY)).sqrt().to(stack.dtype)  # to a root mean square of 1
    total, peak, fourth, faint = (stack.room() for _ in range(4))
    across = stack.room(stack.columns if batch.is_matrix else 0)
    for rows in stack.row_slabs(energies.shape[1]):
        for columns in stack.column_slabs():
            part = stack.part(rows if sample is None else sample[:, rows], columns)
            scaled = part * scale[:, None, None]
            squares = scaled.square()
            if batch.is_matrix:
                across[:, columns] += squares.sum(1)
            fourth += _norms(squares.flatten(1)).double().square_()
            sizes = scaled.abs_().flatten(1)
            total += sizes.sum(1)
            torch.maximum(peak, sizes.amax(1).double(), out=peak)
            faint += sizes.lt_(FAINT).sum(1)  # in place: many times faster than to booleans
    found = {
        "flatness": (total / count).clamp_min(_TINY).log10(),
        "peak": peak.clamp_min(_TINY).log10(),
        "spread": -(fourth / count).clamp_min(_TINY).log10(),
        "faint": faint / count,
    }
    told = energy > _TINY
    return {name: torch.where(told, value, 0.0) for name, value in found.items()}, across


def _spectrum(gram: Tensor, full: int) -> dict[str, Tensor]:
    """How many directions hold the energy; `full` is the largest rank there can be.

    No eigenvalues: what random directions leave unexplained (the trailing rows of one Cholesky
    factor) is 0 just where the rank is no larger than their number, as the tail of the spectrum is
    (Halko, Martinsson and Tropp, 2011), and many times quicker to have.
    """
    turn = _rotation(gram.shape[1]).to(gram)
    turned = turn.mT @ gram @ turn
    total = turned.diagonal(dim1=1, dim2=2).sum(1)
    turned = turned / total.clamp_min(_TINY)[:, None, None]
    spread = turned.square().sum((1, 2)).clamp_min(_TINY)
    turned.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    energy = torch.linalg.cholesky_ex(turned)[0].square().sum(1)  # of each column of the factor
    tails = {f"tail_{top}": _log_share(energy[:, top:].sum(1)) for top in (1, 4, 16) if top < full}
    return {**tails, "rank": -spread.log10()}


@functools.lru_cache(maxsize=SKETCH)
def _rotation(size: int) -> Tensor:
    """Fixed random orthonormal directions, [size, size]: no coordinate stands out in them."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(drawn)[0]
    return rotation


def _log_share(share: Tensor) -> Tensor:
    return share.clamp_min(_TINY).log10().clamp_min(FLOOR)


def _unexplained(bias: Tensor | None, seen: Survey) -> Tensor:
    """Energy of the weight outside the one direction that the bias names, as a share."""
    if bias is None:
        return torch.zeros_like(seen.sizes)
    outside = 1.0 - seen.along / seen.squares.sum(1).clamp_min(_TINY)
    return torch.where(_norms(bias).double().square() > _TINY, _log_share(outside), 0.0)


def _twins(chosen: Tensor, bias: Tensor | None, loud: Tensor) -> Tensor:
    """Share of loud rows with a parallel partner: two units that hold the same one record."""
    if bias is not None:
        scale = math.sqrt(chosen.shape[2])
        chosen = torch.cat([chosen, scale * bias[:, :, None]], dim=2)
    # Float32 rounds cosines some hundred times finer than `TWIN`.
    units = torch.nn.functional.normalize(chosen, dim=2).float()
    units.masked_fill_(~loud[:, :, None], 0.0)
    cosines = (units @ units.mT).abs_()
    cosines.diagonal(dim1=1, dim2=2).zero_()
    count = loud.sum(1)
    share = (cosines.amax(1) > 1.0 - TWIN).sum(1) / count.clamp_min(1).double()
    return torch.where(count > 1, share, 0.0)


def _company(chosen: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """How near a server's guesses at records, rows over their bias, are to one another.

    Two units that one record moves most guess alike, and guesses at averages do not. So the share
    of guesses in company tells how many records can be read, whatever the model and the data.

    Args:
        chosen: [tensors, rows, k], rows of the sketch.
        bias: [tensors, rows], their bias.

    Returns:
        Name -> [tensors]: shares of the guesses that have another within some share of their own
        norm; mean log10 of that distance; and the same beside the distance from the middle guess.
    """
    told = bias.abs() > FAINT * bias.abs().amax(1, keepdim=True)
    guesses = (chosen / torch.where(told, bias, 1.0)[:, :, None]).float()
    guesses.masked_fill_(~told[:, :, None], torch.nan)
    off_centre = (guesses - guesses.nanmedian(1, keepdim=True).values).nan_to_num_()
    guesses.nan_to_num_()
    squares = guesses.square().sum(2)
    others = torch.where(told, squares, torch.inf)
    apart = torch.baddbmm(others[:, None], guesses, guesses.mT, alpha=-2.0)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = apart.amin(2) + squares
    count = told.sum(1)
    near = nearest / squares.clamp_min(_TINY)
    found = {
        name: ((near < share * share) & told).sum(1) / count.clamp_min(1).double()
        for name, share in COMPANY.items()
    }
    found["close"] = _mean_log(near, told)
    aside = nearest / off_centre.square().sum(2).clamp_min(_TINY)
    found["aside_30"] = ((aside < _WIDE * _WIDE) & told).sum(1) / count.clamp_min(1).double()
    found["aside"] = _mean_log(aside, told)
    return {name: torch.where(count > 1, value, 0.0) for name, value in found.items()}


def _mean_log(squares: Tensor, told: Tensor) -> Tensor:
    """Mean log10 of the root, within what float32 tells apart and what says nothing any more."""
    logs = 0.5 * squares.clamp(_APART * _APART, 100.0).log10().double()
    return torch.where(told, logs, 0.0).sum(1) / told.sum(1).clamp_min(1)


def _sketched_rows(batch: Batch, sketch: Tensor, sample: Tensor | None) -> Tensor:
    """The sketch of some rows, [tensors, rows, k]: where it was not kept, they are read again."""
    if sample is None:
        return sketch
    if sketch.shape[1]:
        return sketch.gather(1, sample[:, :, None].expand(-1, -1, sketch.shape[2]))
    again = (batch.stack.part(sample[:, rows]) for rows in batch.stack.row_slabs(MOST_ROWS))
    return torch.cat([_sketched(batch, part) for part in again], dim=1)


def _participation(energy: Tensor) -> Tensor:
    """Log10 of the share of rows (or columns) that carry the energy, [tensors]."""
    shares = energy / energy.sum(1, keepdim=True).clamp_min(_TINY)
    return -(shares.square().sum(1).clamp_min(_TINY) * energy.shape[1]).log10()
