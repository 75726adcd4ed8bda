"""Named rules: from the statistics of a layer to findings, and from findings to a verdict.

Every rule states a published family of attacks in arithmetic; none of them is learned. A rule gives
a strength from 0 (ordinary) to 1 (no honest model looks like this), with a ramp between.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.detection.layers import weight_name
from sentinel.detection.weights import DEAD, FEW_INPUTS, OUTWEIGHED
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sentinel.detection.layers import Layer
    from sentinel.detection.weights import LayerStatistics


class Kind(enum.StrEnum):
    """What was found; among equals the more telling kind stands earlier."""

    STRUCTURE = "structure"
    SCANNED = "scanned"
    FEED_FORWARD_TRAP = "feed-forward-trap"
    OPEN_ATTENTION = "open-attention"
    PARALLEL_ROWS = "parallel-rows"
    TRAP_ROWS = "trap-rows"
    LOUD_ROWS = "loud-rows"
    QUANTILE_BIASES = "quantile-biases"
    DEAD_UNITS = "dead-units"
    LARGE_ENTRY = "large-entry"
    LARGE_BIAS = "large-bias"
    SINGLE_ROW = "single-row"
    LARGE_LAYER = "large-layer"
    EXCLUSIVE_UNITS = "exclusive-units"
    DOMINANT_RECORD = "dominant-record"
    STEEP_OUTPUT = "steep-output"
    SCALE_JUMP = "scale-jump"
    RETRAINED = "retrained"
    REPLACED = "replaced"
    UNUSUAL = "unusual"
    NOT_FINITE = "not-finite"
    EXPLODED = "exploded"


VERDICTS: dict[Kind, Verdict] = {
    Kind.STRUCTURE: Verdict.STRUCTURE_CHANGED,
    Kind.PARALLEL_ROWS: Verdict.BINNING,
    Kind.TRAP_ROWS: Verdict.SPARSE_ACTIVATION,
    Kind.LOUD_ROWS: Verdict.SPARSE_ACTIVATION,
    Kind.QUANTILE_BIASES: Verdict.SPARSE_ACTIVATION,
    Kind.EXCLUSIVE_UNITS: Verdict.SPARSE_ACTIVATION,
    Kind.LARGE_ENTRY: Verdict.MAGNIFICATION,
    Kind.LARGE_BIAS: Verdict.MAGNIFICATION,
    Kind.SINGLE_ROW: Verdict.MAGNIFICATION,
    Kind.LARGE_LAYER: Verdict.MAGNIFICATION,
    Kind.DEAD_UNITS: Verdict.INCONSISTENCY,
    Kind.SCALE_JUMP: Verdict.INCONSISTENCY,
    Kind.STEEP_OUTPUT: Verdict.MAGNIFICATION,
    Kind.DOMINANT_RECORD: Verdict.LEARNED,
    Kind.FEED_FORWARD_TRAP: Verdict.TRANSFORMER_TRAP,
    Kind.OPEN_ATTENTION: Verdict.TRANSFORMER_TRAP,
    Kind.SCANNED: Verdict.MULTI_ROUND,
    Kind.RETRAINED: Verdict.LEARNED,
    Kind.REPLACED: Verdict.INCONSISTENCY,
    Kind.UNUSUAL: Verdict.INCONSISTENCY,
    Kind.NOT_FINITE: Verdict.UNHEALTHY,
    Kind.EXPLODED: Verdict.UNHEALTHY,
}

SENTENCES: dict[Kind, str] = {
    Kind.STRUCTURE: "was added, removed, reshaped or given another dtype",
    Kind.PARALLEL_ROWS: "has many units that look along one direction at different thresholds",
    Kind.TRAP_ROWS: "has rows whose negative half outweighs a copy of itself, so that few records "
    "pass",
    Kind.LOUD_ROWS: "has a group of rows many times larger than the others",
    Kind.QUANTILE_BIASES: "has biases at which each unit fires for few records of a batch",
    Kind.EXCLUSIVE_UNITS: "has units that fire for few records of a synthetic batch each",
    Kind.DOMINANT_RECORD: "answers few records of a synthetic batch loudly and the others hardly",
    Kind.STEEP_OUTPUT: "is so large that every synthetic record is answered with certainty",
    Kind.LARGE_ENTRY: "has one weight that drowns all others",
    Kind.LARGE_BIAS: "has biases that decide the output whatever the record is",
    Kind.SINGLE_ROW: "passes on one unit and silences the others",
    Kind.LARGE_LAYER: "is scaled far beyond the other layers",
    Kind.DEAD_UNITS: "has biases that keep most units from ever firing",
    Kind.SCALE_JUMP: "changed its size by a factor that training does not make in one round",
    Kind.FEED_FORWARD_TRAP: "takes up single tokens, and has the rows of a trap",
    Kind.OPEN_ATTENTION: "lets tokens pass unmixed, where the attention of other blocks does not",
    Kind.SCANNED: "has parallel rows that stood still while their thresholds walked",
    Kind.RETRAINED: "moved in one round, as most others did, far beyond all moves before, from "
    "where it was",
    Kind.REPLACED: "is, as most others are, another one than in the last round and all before",
    Kind.UNUSUAL: "looks unlike the layers of honest models",
    Kind.NOT_FINITE: "holds values that are not finite",
    Kind.EXPLODED: "has diverged: its weights are far beyond any working range",
}

EXPLODED = 1.5  # log10 of a median row norm; PyTorch's own initialisation gives -.24
GAIN = 2.0  # log10 of the gap between one layer's scale and the others'
MANY_OUTPUTS = 4
PUSHED = -3.0  # shift of a normalised channel that pruning does not leave
NOTHING = -1.99  # log10 scale of a layer that is zero: one that starts so grows in a round
PLAUSIBLE = -0.5  # log10 scale up to which a layer may grow in one round; usual first values: -0.24
ENTRY = (0.5, 1.0)  # log10 of the entry itself: identity kernels hold ones among next to nothing
PRUNED = 0.75  # share of entries that are not zero, below which a layer counts as pruned
# Log10 of how much farther the biases of parallel rows are apart than the rows: honest .5 at most
# (3 where pruning left rows few entries, which lie in the same places by chance).
COPIED = (1.2, 1.7)
CROWD, CROWD_OF_PRUNED = (0.06, 0.2), (0.3, 0.5)  # share of parallel rows
# Of kernels. Those that slide show no record, and in nets that were trained for long, their
# normalisation folded into them, up to .39 are parallel at any offset.
CROWD_OF_KERNELS = (0.5, 0.7)
COPIES = (0.05, 0.15)  # share of rows of mirrored halves
# Where rows or inputs are few, halves mirror each other by chance: one trained kernel of eight.
MANY_ROWS, MANY_INPUTS = 24, 64
COPIES_OF_FEW = (0.25, 0.5)
# Halves that jitter or an honest model blurred, in rows that are half negative: honest rows differ
# by 1.23 at least where their signs are as even as .5.
EVEN, BLURRED = (0.4, 0.3), (1.1, 0.85)
SHARED = (0.4, 0.25)  # gathered rows that are no traps; layers grown from zero have .3 to 1
QUANTILE_LOW, QUANTILE_HIGH = -0.8, -1.05  # median bias / row norm: the ramp of QBI
# Share of the rows with a bias one to four row norms below zero: honest 0 as a rule, .09 with a
# learning rate ten times too high; of few kernels anything.
FEW_LOW, FEW_HIGH = 0.1, 0.22
FEW_ROWS = 16
QUANTILE_KERNELS = (0.6, 0.8)  # such a share of kernels; honest .54 where normalisation is folded
# Biases to both sides far beyond what drawn weights begin with, where the weights are as large as
# QBI draws them, log10 of a row: honest 1.4 where a net is dying; beside usual weights 2.
WIDE, DRAWN_AT_ONE = (1.7, 2.5), (0.7, 0.9)
LOUD_ROWS = (0.02, 0.06)  # share of rows in a group far longer than the others; honest 0
USUAL_ROWS = -0.6  # log10 of the median row norm: below it, most units died and a few are ordinary
# Log10 of a last layer's rows, and over the middle layer's: honest .45 and .69 at most, times 30
# adds 1.48.
LAST_SIZE = (0.6, 0.8)
LAST_GAP = (1.3, 1.45)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: what.
        layer: index of the entry among the sorted names of the state (of the pinned and the new
            names together, where the structure changed).
        strength: 0 to 1.
    """

    kind: Kind
    layer: int
    strength: float = 1.0


def ramp(value: float, low: float, high: float) -> float:
    """Return 0 up to `low`, 1 from `high`, a straight line between; `high` may be the smaller."""
    share = (value - low) / (high - low)
    return 0.0 if share <= 0.0 else min(share, 1.0)


def layer_findings(layer: Layer, seen: LayerStatistics) -> Iterator[Finding]:
    """Yield what the rules find in one layer, strengths above 0 only."""
    strengths = (
        (Kind.PARALLEL_ROWS, _parallel(layer, seen)),
        (Kind.TRAP_ROWS, _traps(layer, seen)),
        (Kind.LOUD_ROWS, _loud(layer, seen)),
        (Kind.QUANTILE_BIASES, _quantiles(layer, seen)),
        (Kind.DEAD_UNITS, _dead(layer, seen)),
        (Kind.LARGE_ENTRY, _entry(seen)),
        (Kind.LARGE_BIAS, ramp(seen.bias_range, 1.5, 2.0)),
        (Kind.SINGLE_ROW, _single_row(layer, seen)),
    )
    for kind, strength in strengths:
        if strength > 0.0:
            yield Finding(kind, layer.index, strength)


def _parallel(layer: Layer, seen: LayerStatistics) -> float:
    """Binning: one direction, scanned by the bias. Rows that merely condensed share their bias."""
    if layer.depthwise or not (layer.feeds or _may_feed(layer)):
        return 0.0
    # Where pruning left a row one entry, rows are parallel by chance: 13 columns, a tenth kept, .2.
    crowd = ramp(seen.parallel, *_crowd(layer, seen))
    if layer.bias is not None:
        walked = ramp(seen.offset_spread, 0.003, 0.01) * ramp(seen.scan, 0.8, 1.2)
        copied = ramp(seen.copied_scan, *COPIED) if seen.filled > PRUNED else 0.0
        return crowd * max(walked, copied)
    if not layer.feeds:
        return 0.0
    return ramp(seen.parallel, 0.6, 0.9)


def _may_feed(layer: Layer) -> bool:
    """Whether something may take up this layer all the same, by a width that does not show it.

    The few rows of a last layer may point one way, each at its own offset.
    """
    return not layer.convolution and layer.units >= FEW_ROWS


def _crowd(layer: Layer, seen: LayerStatistics) -> tuple[float, float]:
    if layer.convolution:
        return CROWD_OF_KERNELS
    return CROWD if seen.filled > PRUNED else CROWD_OF_PRUNED


def _traps(layer: Layer, seen: LayerStatistics) -> float:
    """Boenisch's rows: half negative, the sum always on the negative side by the same share."""
    if not layer.feeds:
        return 0.0
    # Of about 24 rows; honest 0 in every full layer of many rows and inputs. What pruning leaves is
    # two tails, which mirror each other in every row.
    few = layer.units < MANY_ROWS or layer.inputs < MANY_INPUTS
    copies = COPIES_OF_FEW if few else COPIES
    exact = ramp(seen.mirrored, *copies) if seen.filled > PRUNED else 0.0
    # Medians of few rows are chance; kernels that slide come near in nets that trained for long.
    if seen.sum_centre > OUTWEIGHED or layer.units < MANY_ROWS or layer.convolution:
        return exact
    regular = min(ramp(seen.sign_balance, 0.4, 0.3), ramp(seen.sum_balance, 0.25, 0.12))
    blurred = 0.0
    if not few and seen.filled > PRUNED:
        blurred = ramp(seen.sign_balance, *EVEN) * ramp(seen.mirror, *BLURRED)
    # Traps are drawn row by row and share no direction (.05 to .2); what grew from zero shares one.
    return max(exact, max(regular, blurred) * ramp(seen.gathered, *SHARED))


def _loud(layer: Layer, seen: LayerStatistics) -> float:
    """Crafted rows among honest ones, where nobody brought them to one size.

    Kernels into which a normalisation was folded have any length.
    """
    if not layer.feeds or layer.bias is None or layer.convolution or seen.scale < USUAL_ROWS:
        return 0.0
    return ramp(seen.loud_rows, *LOUD_ROWS)


def _quantiles(layer: Layer, seen: LayerStatistics) -> float:
    """QBI: biases about one or two row norms below zero, before a ReLU, in all rows or in some."""
    if not layer.feeds or seen.dead_rows > 0.5:  # noqa: PLR2004  # most are dead: another finding
        return 0.0
    centre = ramp(seen.bias_centre, QUANTILE_LOW, QUANTILE_HIGH)
    if layer.convolution:
        few = layer.depthwise or min(layer.units, layer.inputs) < FEW_ROWS
        return 0.0 if few else centre * ramp(seen.quantile_rows - seen.dead_rows, *QUANTILE_KERNELS)
    every = centre * ramp(seen.quantile_rows, 0.4, 0.7)
    if layer.units < FEW_ROWS:
        return every
    some = seen.quantile_rows - seen.dead_rows - seen.lit_rows
    wide = ramp(seen.bias_width, *WIDE) * ramp(seen.scale, *DRAWN_AT_ONE)
    return max(every, ramp(some, FEW_LOW, FEW_HIGH), wide)


def _dead(layer: Layer, seen: LayerStatistics) -> float:
    """Suppression: most biases far below zero. Pruned rows keep biases of either sign."""
    if not layer.feeds or layer.units < MANY_OUTPUTS:  # one that looks for objects finds few
        return 0.0
    return ramp(seen.dead_rows - seen.lit_rows, 0.4, 0.6)


def _entry(seen: LayerStatistics) -> float:
    """Feature fishing: one weight hundreds of times the norm of an ordinary row."""
    size = ramp(seen.entry_gain + seen.scale, *ENTRY)
    return size * ramp(seen.entry_gain, 1.8, 2.2)


def _single_row(layer: Layer, seen: LayerStatistics) -> float:
    """Class fishing: the last layer is zero but for one row, and the biases say so loudly."""
    if layer.feeds or layer.weight.shape[0] < MANY_OUTPUTS or layer.bias is None:
        return 0.0
    return ramp(seen.top_row, 0.9, 0.99) * ramp(seen.bias_range, 0.5, 1.0)


def model_findings(
    layers: Sequence[Layer], statistics: Sequence[LayerStatistics]
) -> Iterator[Finding]:
    """Yield what shows only in comparison of layers: divergence, or one layer scaled up."""
    scales = sorted(seen.scale for seen in statistics)
    if not scales:
        return
    middle = scales[(len(scales) - 1) // 2]
    for layer, seen in zip(layers, statistics, strict=True):
        if middle > EXPLODED and seen.scale > EXPLODED:
            yield Finding(Kind.EXPLODED, layer.index)
        elif len(scales) > 1 and (strength := _large(layer, seen, seen.scale - middle)) > 0.0:
            yield Finding(Kind.LARGE_LAYER, layer.index, strength)


def _large(layer: Layer, seen: LayerStatistics, gap: float) -> float:
    """How far one layer is scaled up; of a last layer less is told, as none grows so far.

    Columns of constants, such as frequencies or places, have any size.
    """
    if layer.inputs < FEW_INPUTS:
        return 0.0
    found = ramp(gap, 0.75 * GAIN, GAIN) if seen.scale > EXPLODED else 0.0
    if layer.feeds or layer.bias is None or layer.convolution:  # embeddings are large, and no last
        return found
    return max(found, min(ramp(seen.scale, *LAST_SIZE), ramp(gap, *LAST_GAP)))


def norm_findings(state: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Yield normalisation layers whose shift keeps most of their channels from ever firing.

    Channels that pruning switched off have a small shift; these are pushed: below -3, and below
    four times the channel's own scale.
    """
    for index, name in enumerate(sorted(state)):
        shift, scale = state[name], state.get(weight_name(name) or "")
        if shift.ndim != 1 or scale is None or scale.ndim != 1 or scale.shape != shift.shape:
            continue
        if not shift.is_floating_point() or len(shift) < MANY_OUTPUTS:
            continue
        pushed = (shift < PUSHED) & (shift < DEAD * scale.abs())
        strength = ramp(float(pushed.double().mean()), 0.4, 0.6)
        if strength > 0.0:
            yield Finding(Kind.DEAD_UNITS, index, strength)


def jump_findings(
    indices: Sequence[int], before: Sequence[float], now: Sequence[float]
) -> Iterator[Finding]:
    """Yield layers whose size changed against the last round as training does not change it.

    A layer that was next to nothing says nothing, and growth up to a plausible scale is none: heads
    that start at zero and small first values are ordinary, and grow by any factor.

    Args:
        indices: index of each layer.
        before: log10 scale of each layer in the last round.
        now: the same in this round.
    """
    changes = {
        place: _change(before[place], now[place])
        for place in range(len(indices))
        if before[place] > NOTHING
    }
    if not changes:
        return
    common = sorted(map(abs, changes.values()))[(len(changes) - 1) // 2]
    for place, change in changes.items():
        alone = 0.0 if now[place] <= NOTHING else ramp(abs(change), 1.2, 1.6)
        together = ramp(common, 0.9, 1.4) if abs(change) >= common else 0.0
        strength = max(alone, together)
        if strength > 0.0:
            yield Finding(Kind.SCALE_JUMP, indices[place], strength)


def _change(before: float, now: float) -> float:
    """Log10 of the factor; growth counts from a plausible scale only, as tiny layers must grow."""
    return now - before if now < before else max(now - max(before, PLAUSIBLE), 0.0)


def suspicion_of(findings: Sequence[Finding], unusual: float) -> float:
    """Join the rules' strengths and the learned part, as if each were independent evidence.

    Args:
        findings: of all rules.
        unusual: what the learned detector adds, 0 to its ceiling; by itself below any refusal.

    Returns:
        0 to 1; unhealthy findings do not count, they have a verdict of their own.
    """
    best: dict[Verdict, float] = {}
    for finding in findings:
        verdict = VERDICTS[finding.kind]
        if verdict is not Verdict.UNHEALTHY:
            best[verdict] = max(best.get(verdict, 0.0), finding.strength)
    calm = 1.0 - unusual
    for strength in best.values():
        calm *= 1.0 - 0.97 * strength
    return 1.0 - calm


def verdict_of(findings: Sequence[Finding], suspicion: float, threshold: float = 0.5) -> Verdict:
    """Return the verdict of the strongest finding, or what stands in for none.

    An attack comes before unhealthy: a crafted model is often broken as well.
    """
    kinds = {finding.kind for finding in findings}
    if Kind.NOT_FINITE in kinds:
        return Verdict.UNHEALTHY
    suspect = [found for found in findings if VERDICTS[found.kind] is not Verdict.UNHEALTHY]
    if suspicion >= threshold and suspect:
        return VERDICTS[max(suspect, key=_weight).kind]
    return Verdict.UNHEALTHY if Kind.EXPLODED in kinds else Verdict.HONEST


def _weight(finding: Finding) -> tuple[float, int]:
    """Strength first; among equals the more telling kind, which stands earlier in the list."""
    return (round(finding.strength, 2), -list(Kind).index(finding.kind))
