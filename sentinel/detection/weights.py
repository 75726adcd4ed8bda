"""Statistics of one weight matrix: what binning, traps, quantile biases and magnification bend.

Each is chosen to survive what costs an attacker nothing: order, positive scale and sign of the
rows, a common factor on all layers, small jitter. Large matrices are read once, piece by piece, and
then through a sample of rows; layers of one shape are measured together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sentinel.crew import share_out
from sentinel.detection.layers import Layer, wide_type
from sentinel.detection.reading import (
    MOST_ROWS,
    SKETCH,
    TINY,
    Reading,
    alike_parts,
    projection,
    read,
    read_as_share,
)
from sentinel.detection.stack import GROUP, Stack, peaks
from sentinel.detection.trace import NOWHERE, Trace
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

PARALLEL = 0.95  # |cosine| from which two rows count as one direction: jitter up to about .2
MOST_VALUES = 1 << 19  # values read for the statistics that need more than one pass
BLOCK = 256  # rows that are compared with all others at a time
MIRRORED = 24  # rows that are sorted, about
LEAST_FILLED = 12  # entries below which two halves resemble each other by chance
COPIED = 0.15  # mirror below which one half of a row is a copy of the other
UNEVEN = 0.1  # deviation of the negative share from half; published rows have none
OUTWEIGHED = -3e-3  # sum over absolute sum from which the negative half outweighs; published: -.026
FEW_INPUTS = 4  # below this many inputs, rows are parallel by chance
DEAD = -4.0  # bias / row norm from which a unit no longer fires on standardised inputs
QUANTILE = -1.0  # bias / row norm from which a unit fires for few records of a batch
LOUD = 4.0  # row norm over the median one, from which a row is far longer
DRAWN = 1.4  # spread of log norm by the root of the inputs: of drawn rows .7 to .9
NORMAL_QUARTILES = 1.349  # how far apart those of a normal distribution are, in deviations
STATISTICS_VERSION = 3
SEED = 20_260  # of the sketches, so that one model always gets one suspicion


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Content-free statistics of one layer; 0 where one does not apply.

    Attributes:
        parallel: share of the non-zero rows in the largest set of parallel rows.
        offset_spread: interquartile range of bias / row norm among those that look one way.
        scan: log10 of that range over the scatter of the set's directions, per input: training
            scatters both alike, a scan moves the biases alone.
        copied_scan: log10 of that range over the median distance of those directions from one of
            them: copies of one row are as far apart as rounding.
        gathered: sum of squared shares of the principal directions in normalised rows: 1 for one
            direction, one in so many for many.
        sign_balance: median deviation of the count of negative entries from half, in standard
            deviations of a fair coin; a trained or fresh row has about .7.
        sum_balance: spread over rows of sum / absolute sum, where independent signs give about .7.
        sum_centre: median over rows of sum / absolute sum.
        mirror: how far the sorted positive entries are from a multiple of the negative ones,
            times the root of the number of inputs; the median over rows.
        mirrored: share of rows where that is next to nothing and the negative half outweighs.
        filled: median over rows of the share of entries that are not zero; pruning leaves few.
        bias_centre: median of bias / row norm.
        bias_width: spread of bias / row norm, by its quartiles, times the root of the inputs: 1
            where weights and biases are drawn alike.
        quantile_rows: share of rows with bias / row norm below `QUANTILE`.
        dead_rows: share of rows with bias / row norm below `DEAD`.
        lit_rows: share of rows with bias / row norm above -`DEAD`.
        zero_rows: share of rows that are zero beside the largest.
        row_gain: log10 of the largest row norm over the median of the non-zero ones.
        loud_rows: share of rows far longer than the median one, where all of them are as alike in
            length as drawn rows are.
        entry_gain: log10 of the largest entry over the median norm of the non-zero rows.
        top_row: share of the largest row in the squared norm.
        bias_range: log10 of 1 + the largest distance of a bias from zero.
        scale: log10 of the median norm of the non-zero rows.
    """

    parallel: float = 0.0
    offset_spread: float = 0.0
    scan: float = -1.0
    copied_scan: float = -1.0
    gathered: float = 0.0
    sign_balance: float = 0.7
    sum_balance: float = 0.7
    sum_centre: float = 0.0
    mirror: float = 1.0
    mirrored: float = 0.0
    filled: float = 1.0
    bias_centre: float = 0.0
    bias_width: float = 0.0
    quantile_rows: float = 0.0
    dead_rows: float = 0.0
    lit_rows: float = 0.0
    zero_rows: float = 0.0
    row_gain: float = 0.0
    loud_rows: float = 0.0
    entry_gain: float = 0.0
    top_row: float = 0.0
    bias_range: float = 0.0
    scale: float = 0.0

    def vector(self) -> list[float]:
        """Return the statistics in the order of `STATISTICS`, for the anomaly detector."""
        return list(map(float, _in_order(self)))


STATISTICS: tuple[str, ...] = tuple(field.name for field in fields(LayerStatistics))
_in_order = attrgetter(*STATISTICS)


@dataclass(frozen=True, slots=True)
class Weighed:
    """What one layer is like.

    Attributes:
        statistics: of its values.
        size: root mean square of the norms of its rows.
        trace: where it stands, to tell its moves by.
    """

    statistics: LayerStatistics
    size: float
    trace: Trace


def layer_statistics(layer: Layer, generator: torch.Generator) -> LayerStatistics:
    """Measure one layer.

    Args:
        layer: a layer whose values are all finite.
        generator: draws the sketch and the sampled rows; a CPU generator of the caller.

    Returns:
        The statistics; an all-zero layer has those of an empty one.

    Raises:
        MisuseError: a value is not finite.
    """
    (found,) = _weighed([layer], generator)
    if found is None:
        msg = "the layer holds values that are not finite; statistics are of finite ones"
        raise MisuseError(msg)
    return found.statistics


def weighed(layers: Sequence[Layer], seed: int) -> list[Weighed | None]:
    """Measure layers, each with the same draws as if it were alone.

    Args:
        layers: the layers.
        seed: of what is drawn for each layer.

    Returns:
        One for each layer, in their order; None where a weight is not finite.
    """
    groups = sorted(_groups(layers), key=lambda group: -layers[group[0]].weight.numel())

    def measure(group: list[int]) -> list[Weighed | None]:
        generator = torch.Generator().manual_seed(seed)
        return _weighed([layers[place] for place in group], generator)

    placed: dict[int, Weighed | None] = {}
    for group, found in zip(groups, share_out(groups, lambda: measure), strict=True):
        placed.update(zip(group, found, strict=True))
    return [placed[place] for place in range(len(layers))]


def measured_places(layers: Sequence[Layer], seed: int) -> list[tuple[float, Trace, float]]:
    """Return of each layer what `weighed` says of its place, and measure nothing else.

    Returns:
        Size, trace, and median of bias / row norm; an infinite size where a value is not finite.
    """
    return [_place(layer, torch.Generator().manual_seed(seed)) for layer in layers]


def _place(layer: Layer, generator: torch.Generator) -> tuple[float, Trace, float]:
    stack = Stack.of([layer.weight], layer.units, wide_type(layer.weight))
    bias = None if layer.bias is None else layer.bias.to(torch.float64)[None]
    part, unit = read(stack, bias, generator), 1.0
    if not bool(part.norms.isfinite().all()) and math.isfinite(float(part.peak)):
        part, unit = read_as_share(stack, bias, generator)
    size = float(part.norms.square().mean().sqrt()) * unit
    if not math.isfinite(size):
        return math.inf, NOWHERE, 0.0
    ((_, chosen),) = alike_parts(part)
    told = bias is not None and float(part.norms.max()) > TINY
    return size, part.traces()[0], float(_biases(chosen)["bias_centre"]) if told else 0.0


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Places of layers of one form, few enough to be stacked."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        kind = None if layer.bias is None else layer.bias.dtype
        form = (layer.weight.shape, layer.weight.dtype, layer.weight.device, kind)
        alike.setdefault(form, []).append(place)
    cut = []
    for places in alike.values():
        units, inputs = layers[places[0]].units, layers[places[0]].inputs
        step = max(1, GROUP // (units * max(inputs, SKETCH, min(units, MOST_ROWS))))
        cut += [places[start : start + step] for start in range(0, len(places), step)]
    return cut


def _weighed(layers: Sequence[Layer], generator: torch.Generator) -> list[Weighed | None]:
    """Measure layers of one form."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    stack = Stack.of(
        [layer.weight for layer in layers], layers[0].units, wide_type(layers[0].weight)
    )
    bias = torch.stack(biases).to(stack.values.device, torch.float64) if biases else None
    part = read(stack, bias, generator)
    state = generator.get_state()
    found: list[Weighed | None] = [None] * len(layers)
    for places, chosen in alike_parts(part):
        generator.set_state(state)
        sizes = chosen.norms.square().mean(1).sqrt().tolist()
        measured = zip(_statistics(chosen, generator), sizes, chosen.traces(), strict=True)
        for place, one in zip(places, measured, strict=True):
            found[place] = Weighed(*one)
    finite = part.peak.isfinite().tolist()
    for place, good in enumerate(finite):
        if good and found[place] is None:  # squares leave the dtype
            generator.set_state(state)
            own = None if bias is None else bias[place : place + 1]
            found[place] = _weighed_huge(stack.select([place]), own, generator)
    return found


def _weighed_huge(stack: Stack, bias: Tensor | None, generator: torch.Generator) -> Weighed:
    """Measure a layer whose squares leave the dtype, as a share of its largest value."""
    part, unit = read_as_share(stack, bias, generator)
    ((_, chosen),) = alike_parts(part)
    (seen,) = _statistics(chosen, generator)
    bias_range = 0.0 if bias is None else math.log10(1.0 + float(bias.abs().max()))
    size = float(part.norms.square().mean().sqrt()) * unit
    seen = replace(seen, scale=seen.scale + math.log10(unit), bias_range=bias_range)
    return Weighed(seen, size, part.traces()[0])


def _statistics(part: Reading, generator: torch.Generator) -> list[LayerStatistics]:
    top = part.norms.amax(1)
    nothing = torch.zeros_like(top)
    bias_range = nothing if part.bias is None else (1.0 + part.bias.abs().amax(1)).log10()
    if float(top[0]) <= TINY:  # such layers come alone
        return [LayerStatistics(bias_range=float(bias_range[0]), zero_rows=1.0, scale=-6.0)]
    middle = _middle(part.norms[:, part.alive])
    found = {
        **_direction(part, generator),
        **_traps(part, generator),
        **_biases(part),
        "zero_rows": nothing + (1.0 - len(part.alive) / part.stack.rows),
        "row_gain": (top / middle).log10(),
        "loud_rows": _loud(part, middle),
        "entry_gain": (part.peak / middle).clamp_min(TINY).log10(),
        "top_row": top.square() / part.norms.square().sum(1),
        "bias_range": bias_range,
        "scale": middle.log10(),
    }
    usual = LayerStatistics()
    columns = [found.get(name, nothing + getattr(usual, name)) for name in STATISTICS]
    return [LayerStatistics(*row) for row in torch.stack(columns, dim=1).tolist()]


def _loud(part: Reading, middle: Tensor) -> Tensor:
    """Share of rows in a group that is far longer than the others; rows that trained differ."""
    loud = part.norms > LOUD * middle[:, None]
    count = loud.sum(1)
    lengths = torch.where(loud, part.norms, 1.0).log()
    mean = lengths.sum(1) / count.clamp_min(1)
    away = torch.where(loud, lengths - mean[:, None], 0.0).square().sum(1) / count.clamp_min(1)
    alike = away.sqrt() < DRAWN / math.sqrt(part.stack.columns)
    return torch.where(alike & (count >= FEW_INPUTS), count / part.stack.rows, 0.0)


def sampled(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return at most `most` entries of an index vector, drawn without replacement, ascending."""
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]


def _direction(part: Reading, generator: torch.Generator) -> dict[str, Tensor]:
    """Do many rows point one way, and do their biases scan that direction?"""
    rows = sampled(part.alive, MOST_ROWS, generator)
    inputs = part.stack.columns
    if inputs < FEW_INPUTS or len(rows) < FEW_INPUTS:
        return {}
    units = _units(part, rows, generator)
    gram = units.mT @ units / len(rows)  # of trace 1
    crowds = [
        _crowd(part, place, rows, units[place]) if crowded else (0.0, 0.0, -1.0, -1.0)
        for place, crowded in enumerate(_crowded(units))
    ]
    parallel, spread, scan, copied = part.norms.new_tensor(crowds).unbind(1)
    return {
        "parallel": parallel,
        "offset_spread": spread,
        "scan": scan,
        "copied_scan": copied,
        "gathered": gram.double().square().sum((1, 2)),
    }


def _units(part: Reading, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows at length 1, in few random directions where inputs are many: [layers, rows, k]."""
    places, stack = part.rows(rows), part.stack
    if stack.columns <= SKETCH:
        return _normalised(stack.part(places))
    if part.sketch is not None:
        sketch = part.sketch[:, rows] if len(rows) < stack.rows else part.sketch
    else:
        drawn = projection(stack, generator)
        slabs = stack.row_slabs(len(rows))
        sketch = torch.cat([stack.part(places[:, slab]) @ drawn for slab in slabs], dim=1)
    norms = part.norms.gather(1, places)[:, :, None].to(stack.dtype)
    return _normalised(sketch / norms.clamp_min(TINY))


def _crowded(units: Tensor) -> list[bool]:
    """Whether any two rows are parallel, [layers, rows, k]; one look at most pairs is enough."""
    most = units.new_zeros(len(units))
    for start in range(0, units.shape[1], BLOCK):
        cosines = units[:, start : start + BLOCK] @ units[:, start:].mT
        cosines.diagonal(dim1=1, dim2=2).zero_()
        torch.maximum(most, peaks(cosines), out=most)
    return (most > PARALLEL).tolist()


def _crowd(
    part: Reading, place: int, rows: Tensor, units: Tensor
) -> tuple[float, float, float, float]:
    """The largest set of parallel rows of one layer: its share, offset spread and both scans."""
    cosines = units @ units.T
    counts = (cosines.abs() > PARALLEL).sum(1)
    leader = int(counts.argmax())
    members = cosines[leader].abs() > PARALLEL
    if int(counts[leader]) <= 1:  # rounding
        return 0.0, 0.0, -1.0, -1.0
    along = cosines[leader][members]
    spread = 0.0
    if part.bias is not None:
        offsets = part.bias[place, rows][members] / part.norms[place, rows][members]
        # Rows on either side are apart: training may condense both, each at its own offset.
        spread = max(_interquartile(offsets[along * side > 0]) for side in (1.0, -1.0))
    angles = (1.0 - along.double().square()).clamp_min(0.0).sqrt()
    scatter = float(angles.mean()) / math.sqrt(part.stack.columns)
    # A cosine of float32 tells no angle below 3e-4; the difference itself does.
    apart = (units[members] - along.sign()[:, None] * units[leader]).norm(dim=1)
    return (
        float(counts[leader]) / len(rows),
        min(spread, 1e3),
        _log_ratio(spread, scatter + 1e-3),
        _log_ratio(spread, float(apart.median()) + 2e-6),
    )


def _log_ratio(spread: float, scatter: float) -> float:
    return min(max(math.log10((spread + 1e-6) / scatter), -1.0), 3.0)


def _interquartile(values: Tensor) -> float:
    if len(values) < FEW_INPUTS:
        return 0.0
    low, high = torch.quantile(values, values.new_tensor([0.25, 0.75])).tolist()
    return float(high - low)


def _middle(values: Tensor) -> Tensor:
    """Lower median of each row; numpy finds it many times faster than torch."""
    place = (values.shape[1] - 1) // 2
    parted = np.partition(values.cpu().numpy(), place, axis=1)[:, place]
    return torch.from_numpy(parted).to(values.device)


def _normalised(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def _traps(part: Reading, generator: torch.Generator) -> dict[str, Tensor]:
    """Is every row half negative, with the positive half a shrunk copy of the negative one?"""
    stack, inputs = part.stack, part.stack.columns
    most = max(8, min(256, MOST_VALUES // inputs))
    rows = sampled(part.alive, most, generator)
    if inputs < 2 * FEW_INPUTS or len(rows) < 2 * FEW_INPUTS:
        return {}
    negative, filled, balance = _signs(stack, part.rows(rows))
    usual = _middle(filled)  # pruning leaves few
    root = usual.sqrt()
    spread = torch.arange(0, len(rows), max(1, len(rows) // MIRRORED), device=rows.device)
    mirror = _mirrors(stack, part.rows(rows[spread])) * filled[:, spread].sqrt()
    copied = (mirror < COPIED) & (balance[:, spread] < OUTWEIGHED)
    halves = (negative - filled / 2).abs() < UNEVEN * filled  # a row of one sign mirrors nothing
    copied &= halves[:, spread] & (filled[:, spread] >= LEAST_FILLED)
    centre = _middle(balance)
    away = _middle((balance - centre[:, None]).abs())
    uneven = _middle((negative - filled / 2).abs())
    found = {
        "sign_balance": uneven / (root / 2).clamp_min(TINY),
        "sum_balance": away * root / 1.25,
        "sum_centre": centre,
        "mirror": _middle(mirror),
        "mirrored": copied.double().mean(1),
    }
    none = LayerStatistics()
    told = usual >= 2 * FEW_INPUTS
    shown = {name: torch.where(told, value, getattr(none, name)) for name, value in found.items()}
    return shown | {"filled": usual / inputs}


def _signs(stack: Stack, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: how many entries are negative, how many not zero, sum over absolute sum."""
    found = []
    for slab in stack.row_slabs(places.shape[1]):
        values = stack.part(places[:, slab])
        balance = values.sum(2) / values.abs().sum(2)
        signs = values.sign_()
        total = signs.sum(2).double()
        filled = signs.abs_().sum(2).double()
        found.append(torch.stack([(filled - total) / 2, filled, balance.double()]))
    negative, filled, balance = torch.cat(found, dim=2).unbind()
    return negative, filled, balance


def _mirrors(stack: Stack, places: Tensor) -> Tensor:
    """Distance between both sorted halves of some rows, relative to their size."""
    slabs = stack.row_slabs(places.shape[1])
    return torch.cat([_mirror(stack.part(places[:, slab])) for slab in slabs], dim=1)


def _mirror(values: Tensor) -> Tensor:
    # numpy sorts many times faster than torch, which also says where each value was
    rising = torch.from_numpy(np.sort(values.cpu().numpy(), axis=2)).to(values.device)
    half = values.shape[2] // 2
    positive = rising.flip(2)[:, :, :half].clamp_min(0).double()
    negative = (-rising[:, :, :half]).clamp_min(0).double()
    factor = positive.sum(2, keepdim=True) / negative.sum(2, keepdim=True).clamp_min(TINY)
    away = (positive - factor * negative).norm(dim=2)
    relative: Tensor = away / positive.norm(dim=2).clamp_min(TINY)
    return relative


def _biases(part: Reading) -> dict[str, Tensor]:
    """How far below their weights do the biases lie? A zero row counts by its bias's sign."""
    if part.bias is None:
        return {}
    ratio = part.bias / part.norms.clamp_min(1e-6 * part.norms.amax(1, keepdim=True))
    living = ratio[:, part.alive]
    low, high = torch.quantile(living, living.new_tensor([0.25, 0.75]), dim=1)
    width = (high - low) * (math.sqrt(part.stack.columns) / NORMAL_QUARTILES)
    return {
        "bias_centre": _middle(living).clamp(-1e3, 1e3),
        "bias_width": width.clamp_max(1e3),
        "quantile_rows": (ratio < QUANTILE).double().mean(1),
        "dead_rows": (ratio < DEAD).double().mean(1),
        "lit_rows": (ratio > -DEAD).double().mean(1),
    }
