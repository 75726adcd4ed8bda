"""Statistics of one weight matrix: what binning, traps, quantile biases and magnification bend.

Each is chosen to survive what costs an attacker nothing: order, positive scale and sign of the
rows, a common factor on all layers, small jitter. Large matrices are read through a sample of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sentinel.detection.layers import Layer, wide

if TYPE_CHECKING:
    from collections.abc import Sequence

SKETCH = 32  # columns of the random projection that rows are compared through
PARALLEL = 0.95  # |cosine| from which two rows count as one direction: jitter up to about .2
MOST_ROWS = 1024  # rows that are compared with each other
MOST_VALUES = 1 << 19  # values read for the statistics that need more than one pass
MIRRORED = 24  # rows that are sorted, about
LEAST_FILLED = 12  # entries below which two halves resemble each other by chance
COPIED = 0.15  # mirror below which one half of a row is a copy of the other
OUTWEIGHED = -3e-3  # sum over absolute sum from which the negative half outweighs; published: -.026
FEW_INPUTS = 4  # below this many inputs, rows are parallel by chance
DEAD = -4.0  # bias / row norm from which a unit no longer fires on standardised inputs
QUANTILE = -1.0  # bias / row norm from which a unit fires for few records of a batch
_TINY = 1e-12
STATISTICS_VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Content-free statistics of one layer; 0 where one does not apply.

    Attributes:
        parallel: share of the non-zero rows in the largest set of parallel rows.
        offset_spread: interquartile range of bias / row norm among those that look one way.
        scan: log10 of that range over the scatter of the set's directions, per input: training
            scatters both alike, a scan moves the biases alone.
        top_share: share of the first principal direction in the normalised rows.
        sign_balance: median deviation of the count of negative entries from half, in standard
            deviations of a fair coin; a trained or fresh row has about .7.
        sum_balance: spread over rows of sum / absolute sum, where independent signs give about .7.
        sum_centre: median over rows of sum / absolute sum.
        mirror: how far the sorted positive entries are from a multiple of the negative ones,
            times the root of the number of inputs; the median over rows.
        mirrored: share of rows where that is next to nothing and the negative half outweighs.
        bias_centre: median of bias / row norm.
        quantile_rows: share of rows with bias / row norm below `QUANTILE`.
        dead_rows: share of rows with bias / row norm below `DEAD`.
        lit_rows: share of rows with bias / row norm above -`DEAD`.
        zero_rows: share of rows that are zero beside the largest.
        row_gain: log10 of the largest row norm over the median of the non-zero ones.
        entry_gain: log10 of the largest entry over the median norm of the non-zero rows.
        top_row: share of the largest row in the squared norm.
        bias_range: log10 of 1 + the largest distance of a bias from zero.
        scale: log10 of the median norm of the non-zero rows.
    """

    parallel: float = 0.0
    offset_spread: float = 0.0
    scan: float = -1.0
    top_share: float = 0.0
    sign_balance: float = 0.7
    sum_balance: float = 0.7
    sum_centre: float = 0.0
    mirror: float = 1.0
    mirrored: float = 0.0
    bias_centre: float = 0.0
    quantile_rows: float = 0.0
    dead_rows: float = 0.0
    lit_rows: float = 0.0
    zero_rows: float = 0.0
    row_gain: float = 0.0
    entry_gain: float = 0.0
    top_row: float = 0.0
    bias_range: float = 0.0
    scale: float = 0.0

    def vector(self) -> list[float]:
        """Return the statistics in the order of `STATISTICS`, for the anomaly detector."""
        return [float(getattr(self, name)) for name in STATISTICS]


STATISTICS: tuple[str, ...] = tuple(field.name for field in fields(LayerStatistics))


def layer_statistics(layer: Layer, generator: torch.Generator) -> LayerStatistics:
    """Measure one layer.

    Args:
        layer: a layer whose values are all finite.
        generator: draws the sketch and the sampled rows; a CPU generator of the caller.

    Returns:
        The statistics; an all-zero layer has those of an empty one.
    """
    norms = torch.linalg.vector_norm(wide(layer.weight), dim=1).double()
    largest = float(norms.max())
    bias = None if layer.bias is None else wide(layer.bias).double()
    bias_range = 0.0 if bias is None else math.log10(1.0 + float(bias.abs().max()))
    if largest <= _TINY:
        return LayerStatistics(bias_range=bias_range, zero_rows=1.0, scale=-6.0)
    alive = norms > 1e-6 * largest
    middle = float(norms[alive].median())
    return LayerStatistics(
        **_direction(layer, norms, bias, alive, generator),
        **_traps(layer, alive, generator),
        **_biases(bias, norms, alive),
        zero_rows=1.0 - float(alive.double().mean()),
        row_gain=math.log10(largest / middle),
        entry_gain=math.log10(max(float(layer.weight.abs().max()) / middle, _TINY)),
        top_row=float(norms.max().square() / norms.square().sum()),
        bias_range=bias_range,
        scale=math.log10(middle),
    )


def sampled(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return at most `most` entries of an index vector, drawn without replacement, ascending."""
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]


def _direction(
    layer: Layer,
    norms: Tensor,
    bias: Tensor | None,
    alive: Tensor,
    generator: torch.Generator,
) -> dict[str, float]:
    """Do many rows point one way, and do their biases scan that direction?"""
    inputs = layer.weight.shape[1]
    rows = sampled(alive.nonzero()[:, 0].cpu(), MOST_ROWS, generator).to(norms.device)
    if inputs < FEW_INPUTS or len(rows) < FEW_INPUTS:
        return {}
    units = _normalised(wide(layer.weight[rows]))
    if inputs > SKETCH:
        projection = torch.randn(inputs, SKETCH, generator=generator).to(units)
        units = _normalised(units @ projection)
    cosines = units @ units.T
    counts = (cosines.abs() > PARALLEL).sum(1)
    leader = int(counts.argmax())
    members = cosines[leader].abs() > PARALLEL
    spread, scatter = 0.0, 0.0
    if bias is not None and int(members.sum()) > 1:
        # Rows on either side are apart: training may condense both, each at its own offset.
        spread = max(
            _interquartile((bias[rows] / norms[rows])[members & (cosines[leader] * side > 0)])
            for side in (1.0, -1.0)
        )
        angles = (1.0 - cosines[leader][members].double().square()).clamp_min(0.0).sqrt()
        scatter = float(angles.mean()) / math.sqrt(inputs)
    gram = units.T @ units / len(rows)
    return {
        "parallel": float(counts[leader]) / len(rows) if counts[leader] > 1 else 0.0,
        "offset_spread": min(spread, 1e3),
        "scan": min(max(math.log10((spread + 1e-6) / (scatter + 1e-3)), -1.0), 3.0),
        "top_share": float(torch.linalg.eigvalsh(gram.double().cpu())[-1]),
    }


def _interquartile(values: Tensor) -> float:
    if len(values) < FEW_INPUTS:
        return 0.0
    quarters = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    return float(quarters[1] - quarters[0])


def _normalised(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _traps(layer: Layer, alive: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Is every row half negative, with the positive half a shrunk copy of the negative one?"""
    inputs = layer.weight.shape[1]
    most = max(8, min(256, MOST_VALUES // inputs))
    rows = sampled(alive.nonzero()[:, 0].cpu(), most, generator).to(layer.weight.device)
    if inputs < 2 * FEW_INPUTS or len(rows) < 2 * FEW_INPUTS:
        return {}
    values = wide(layer.weight[rows])
    negative = (values < 0).sum(1).double()
    filled = (values != 0).sum(1).double()  # pruning leaves few
    if float(filled.median()) < 2 * FEW_INPUTS:
        return {}
    root = math.sqrt(float(filled.median()))
    balance = (values.sum(1) / values.abs().sum(1)).double()
    spread = torch.arange(0, len(rows), max(1, len(rows) // MIRRORED), device=rows.device)
    mirror = _mirror(values[spread]) * filled[spread].sqrt()
    copied = (mirror < COPIED) & (balance[spread] < OUTWEIGHED) & (filled[spread] >= LEAST_FILLED)
    centre = balance.median()
    return {
        "sign_balance": float((negative - filled / 2).abs().median()) / (root / 2),
        "sum_balance": float((balance - centre).abs().median()) * root / 1.25,
        "sum_centre": float(centre),
        "mirror": float(mirror.median()),
        "mirrored": float(copied.double().mean()),
    }


def _mirror(values: Tensor) -> Tensor:
    """Distance between both sorted halves of each row, relative to their size."""
    half = values.shape[1] // 2
    positive = values.clamp_min(0).sort(dim=1, descending=True).values[:, :half].double()
    negative = (-values).clamp_min(0).sort(dim=1, descending=True).values[:, :half].double()
    factor = positive.sum(1, keepdim=True) / negative.sum(1, keepdim=True).clamp_min(_TINY)
    away = (positive - factor * negative).norm(dim=1)
    relative: Tensor = away / positive.norm(dim=1).clamp_min(_TINY)
    return relative


def _biases(bias: Tensor | None, norms: Tensor, alive: Tensor) -> dict[str, float]:
    """How far below their weights do the biases lie? A zero row counts by its bias's sign."""
    if bias is None:
        return {}
    ratio = bias / norms.clamp_min(1e-6 * float(norms.max()))
    return {
        "bias_centre": float(ratio[alive].median().clamp(-1e3, 1e3)),
        "quantile_rows": float((ratio < QUANTILE).double().mean()),
        "dead_rows": float((ratio < DEAD).double().mean()),
        "lit_rows": float((ratio > -DEAD).double().mean()),
    }


def strongest(values: Sequence[float]) -> float:
    """Largest of some strengths, 0 for none."""
    return max(values, default=0.0)
