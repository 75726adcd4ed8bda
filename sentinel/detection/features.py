"""Features: content-free statistics of the tensors of an update.

None of them is a value of the update or depends on its overall size, so neither the learning rate
nor a clip changes them. A weight and its bias are read together: for one record, a dense layer's
weight update is its bias update times the record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sentinel.chunks import CHUNK, chunks
from sentinel.crew import share_out
from sentinel.detection.layers import bias_name, wide
from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

FEATURE_VERSION = 1
SKETCH = 32  # columns of the random projection in which rank is measured
MOST_ROWS = 512  # rows that are compared with each other
MOST_VALUES = 1 << 19  # values read for the moments of one tensor
TWIN = 1e-4  # 1 - |cosine| below which two rows hold the same record
FAINT = 1e-3  # beside the largest row or the root mean square: no more than rounding
FLOOR = -6.0  # log10 of the energy share below which rounding speaks
_TINY = 1e-30
_SAFE = (1e-6, 1e15)  # norms at which float32 holds all squares, and no row is taken for zero


@dataclass(frozen=True, slots=True)
class TensorFeatures:
    """Features of one tensor (with its bias); those of matrices are 0 for a vector.

    Attributes:
        tail_1: log10 of the energy outside the largest singular direction.
        tail_4: the same outside the largest four.
        tail_16: the same outside the largest sixteen.
        rank: log10 of the effective rank (exponential of the spectrum's entropy).
        unexplained: log10 of the weight's energy that the bias update does not explain.
        twins: share of the non-faint rows that are parallel to another one, bias included.
        faint_rows: share of the rows that are next to zero.
        row_spread: log10 of the participation ratio of the rows, as a share of the rows.
        column_spread: the same for the columns.
        flatness: log10 of the L1 norm over the L2 norm, as a share of its largest.
        peak: log10 of the largest entry over the root mean square.
        spread: log10 of the participation ratio of the entries (the inverse of kurtosis).
        faint: share of the entries that are next to zero.
        faint_columns: share of the columns that are next to zero: inputs that no record had.
    """

    tail_1: float = 0.0
    tail_4: float = 0.0
    tail_16: float = 0.0
    rank: float = 0.0
    unexplained: float = 0.0
    twins: float = 0.0
    faint_rows: float = 0.0
    row_spread: float = 0.0
    column_spread: float = 0.0
    flatness: float = 0.0
    peak: float = 0.0
    spread: float = 0.0
    faint: float = 0.0
    faint_columns: float = 0.0

    def vector(self) -> list[float]:
        """Return the features in the order of `FEATURES`."""
        return [float(getattr(self, name)) for name in FEATURES]


FEATURES: tuple[str, ...] = tuple(field.name for field in fields(TensorFeatures))


# Where fewer records move each feature: fewer directions, more stillness, less evenly spread.
FEWER: dict[str, int] = dict.fromkeys(FEATURES, -1) | dict.fromkeys(
    ("twins", "faint_rows", "peak", "faint", "faint_columns"), 1
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The features of one tensor of an update.

    Attributes:
        names: the tensor's name, and that of its bias.
        vector: in the order of `FEATURES`.
        rank: the largest rank it can have; 1 for a vector.
        energy: its squared norm.
    """

    names: tuple[str, ...]
    vector: list[float]
    rank: int
    energy: float


def update_features(deltas: Mapping[str, Tensor], generator: torch.Generator) -> list[Measured]:
    """Measure an update.

    Args:
        deltas: name -> difference, any shape; never written.
        generator: draws sketches and sampled rows; a CPU generator of the caller.

    Raises:
        Withheld: NOT_FINITE, naming the entry.

    Returns:
        One entry per tensor (a bias with its weight), in the order of the sorted names. Tensors
        of no value, and zero ones, are left out: they tell nothing.
    """
    paired = {bias_name(name): name for name in deltas if _pairs(name, deltas)}
    names = [name for name in sorted(deltas) if name not in paired and deltas[name].numel()]
    sketches = [_projection(deltas[name], generator) for name in names]

    def measure(task: tuple[str, Tensor | None]) -> Measured | None:
        name, sketch = task
        other = bias_name(name)
        bias = deltas[other] if paired.get(other) == name else None
        return _measure(name, deltas[name], bias, other, sketch)

    with torch.no_grad():
        found = share_out(list(zip(names, sketches, strict=True)), lambda: measure)
    return [entry for entry in found if entry is not None]


def _projection(delta: Tensor, generator: torch.Generator) -> Tensor | None:
    """Random directions for the rows of a matrix, where it has more columns than those."""
    columns = delta[:1].numel() if delta.ndim > 1 else 0
    if columns <= SKETCH or _is_zero(delta.detach()):
        return None
    return torch.randn(columns, SKETCH, generator=generator) / math.sqrt(SKETCH)


def _pairs(name: str, deltas: Mapping[str, Tensor]) -> bool:
    other = bias_name(name)
    if other == name or other not in deltas:
        return False
    weight = deltas[name]
    return weight.ndim > 1 and deltas[other].shape == weight.shape[:1]


def _measure(
    name: str, delta: Tensor, bias: Tensor | None, other: str, projection: Tensor | None
) -> Measured | None:
    values = wide(delta.detach())
    names = (name,) if bias is None else (name, other)
    size = _size(names, values, bias)
    if not _SAFE[0] < size < _SAFE[1]:  # squares would leave float32: no feature depends on size
        largest = max(_largest(values), 0.0 if bias is None else _largest(bias))
        if not largest:
            return None
        values = values / largest
        bias = None if bias is None else wide(bias) / largest
    if bias is not None and _is_zero(values):
        values, bias = wide(bias), None
    energy = size**2
    if values.ndim < 2:  # noqa: PLR2004  # a vector
        return Measured(names, TensorFeatures(**_moments(values)).vector(), 1, energy)
    matrix = values.reshape(values.shape[0], -1)
    found = TensorFeatures(**_structure(matrix, bias, projection))
    return Measured(names, found.vector(), min(matrix.shape), energy)


def _size(names: tuple[str, ...], values: Tensor, bias: Tensor | None) -> float:
    """L2 norm of a weight with its bias, infinite where float32 cannot hold it."""
    parts = [values] if bias is None else [values, wide(bias)]
    norms = [float(torch.linalg.vector_norm(part)) for part in parts]
    for name, norm, part in zip(names, norms, parts, strict=True):
        if not math.isfinite(norm) and not math.isfinite(_largest(part)):
            raise Withheld(
                Reason.NOT_FINITE,
                f"Entry {name!r} holds values that are not finite; nothing was scored. Check the "
                "training step for divergence.",
            )
    return math.hypot(*norms)


def _is_zero(values: Tensor) -> bool:
    """Whether all values are 0; the quick look comes first."""
    return not float(torch.linalg.vector_norm(values)) and not _largest(values)


def _largest(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, math.inf))


def _moments(values: Tensor) -> dict[str, float]:
    """Shape of the distribution of the entries, free of their size."""
    flat = values.reshape(-1).contiguous()
    count = len(flat)
    size = float(torch.linalg.vector_norm(flat))
    if size**2 <= _TINY:
        return {}
    scale = math.sqrt(count) / size  # to a root mean square of 1
    room = min(count, CHUNK)
    buffer, flags = torch.empty_like(flat[:room]), torch.empty_like(flat[:room], dtype=torch.bool)
    total, fourth, faint, peak = torch.zeros(4, dtype=torch.float64, device=flat.device).unbind()
    for piece in chunks(flat):
        scaled = torch.mul(piece, scale, out=buffer[: len(piece)]).abs_()
        total += scaled.sum()
        torch.maximum(peak, scaled.max().double(), out=peak)
        faint += torch.lt(scaled, FAINT, out=flags[: len(piece)]).sum()
        fourth += scaled.square_().square_().sum()
    return {
        "flatness": math.log10(max(float(total) / count, _TINY)),
        "peak": math.log10(float(peak)),
        "spread": -math.log10(float(fourth) / count),
        "faint": float(faint) / count,
    }


def _structure(matrix: Tensor, bias: Tensor | None, projection: Tensor | None) -> dict[str, float]:
    """Rank, row structure, and what the bias explains."""
    norms = torch.linalg.vector_norm(matrix, dim=1)
    loud = norms > FAINT * float(norms.max())
    # Low rank stays low rank in few random directions.
    sketch = matrix if projection is None else matrix @ projection.to(matrix)
    most = min(MOST_ROWS, max(8, MOST_VALUES // matrix.shape[1]))
    sample = matrix[norms.topk(most).indices] if len(norms) > most else matrix
    columns = torch.linalg.vector_norm(sample, dim=0)
    return {
        **_spectrum(sketch, min(matrix.shape)),
        **_moments(sample),
        "unexplained": 0.0 if bias is None else _unexplained(matrix, wide(bias.detach())),
        "twins": _twins(sketch, bias, norms, loud),
        "faint_rows": 1.0 - float(loud.double().mean()),
        "row_spread": _participation(norms),
        "column_spread": _participation(columns),
        "faint_columns": float((columns <= FAINT * float(columns.max())).double().mean()),
    }


def _spectrum(sketch: Tensor, full: int) -> dict[str, float]:
    wide_sketch = sketch.double()
    tall = sketch.shape[0] >= sketch.shape[1]
    gram = wide_sketch.T @ wide_sketch if tall else wide_sketch @ wide_sketch.T
    values = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0.0).flip(0)
    shares = values / values.sum().clamp_min(_TINY)
    entropy = -float((shares * shares.clamp_min(_TINY).log()).sum())
    tails = {
        f"tail_{top}": _log_share(float(shares[top:].sum())) if top < full else 0.0
        for top in (1, 4, 16)
    }
    return {**tails, "rank": entropy / math.log(10.0)}


def _log_share(share: float) -> float:
    return max(math.log10(max(share, _TINY)), FLOOR)


def _unexplained(matrix: Tensor, bias: Tensor) -> float:
    """Energy of the weight outside the one direction that the bias names, as a share."""
    size = torch.linalg.vector_norm(bias)
    if float(size) ** 2 <= _TINY:
        return 0.0
    along = torch.linalg.vector_norm((bias / size) @ matrix).double().square()
    total = torch.linalg.vector_norm(matrix).double().square()
    return _log_share(float(1.0 - along / total))


def _twins(sketch: Tensor, bias: Tensor | None, norms: Tensor, loud: Tensor) -> float:
    """Share of loud rows with a parallel partner: two units that hold the same one record."""
    rows = loud.nonzero()[:, 0]
    if len(rows) > MOST_ROWS:
        rows = rows[norms[rows].topk(MOST_ROWS).indices]
    if len(rows) < 2:  # noqa: PLR2004  # a pair
        return 0.0
    chosen = sketch[rows].double()
    if bias is not None:
        scale = math.sqrt(chosen.shape[1]) * wide(bias.detach())[rows].double()
        chosen = torch.cat([chosen, scale[:, None]], dim=1)
    units = torch.nn.functional.normalize(chosen, dim=1)
    cosines = (units @ units.T).abs()
    cosines.fill_diagonal_(0.0)
    return float((cosines.amax(1) > 1.0 - TWIN).double().mean())


def _participation(norms: Tensor) -> float:
    """Log10 of the share of rows (or columns) that carry the energy."""
    energy = norms.double().square()
    shares = energy / energy.sum().clamp_min(_TINY)
    return -math.log10(float(shares.square().sum().clamp_min(_TINY)) * len(norms))
