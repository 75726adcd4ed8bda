"""Named rules: from the statistics of a layer to findings, and from findings to a verdict.

Every rule states a published family of attacks in arithmetic; none of them is learned. A rule gives
a strength from 0 (ordinary) to 1 (no honest model looks like this), with a ramp between.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.detection.layers import weight_name
from sentinel.detection.weights import DEAD, OUTWEIGHED
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sentinel.detection.layers import Layer
    from sentinel.detection.weights import LayerStatistics


class Kind(enum.StrEnum):
    """What was found."""

    STRUCTURE = "structure"
    PARALLEL_ROWS = "parallel-rows"
    TRAP_ROWS = "trap-rows"
    QUANTILE_BIASES = "quantile-biases"
    EXCLUSIVE_UNITS = "exclusive-units"
    DEAD_UNITS = "dead-units"
    LARGE_ENTRY = "large-entry"
    LARGE_BIAS = "large-bias"
    SINGLE_ROW = "single-row"
    LARGE_LAYER = "large-layer"
    SCALE_JUMP = "scale-jump"
    UNUSUAL = "unusual"
    NOT_FINITE = "not-finite"
    EXPLODED = "exploded"


VERDICTS: dict[Kind, Verdict] = {
    Kind.STRUCTURE: Verdict.STRUCTURE_CHANGED,
    Kind.PARALLEL_ROWS: Verdict.BINNING,
    Kind.TRAP_ROWS: Verdict.SPARSE_ACTIVATION,
    Kind.QUANTILE_BIASES: Verdict.SPARSE_ACTIVATION,
    Kind.EXCLUSIVE_UNITS: Verdict.SPARSE_ACTIVATION,
    Kind.LARGE_ENTRY: Verdict.MAGNIFICATION,
    Kind.LARGE_BIAS: Verdict.MAGNIFICATION,
    Kind.SINGLE_ROW: Verdict.MAGNIFICATION,
    Kind.LARGE_LAYER: Verdict.MAGNIFICATION,
    Kind.DEAD_UNITS: Verdict.INCONSISTENCY,
    Kind.SCALE_JUMP: Verdict.INCONSISTENCY,
    Kind.UNUSUAL: Verdict.INCONSISTENCY,
    Kind.NOT_FINITE: Verdict.UNHEALTHY,
    Kind.EXPLODED: Verdict.UNHEALTHY,
}

SENTENCES: dict[Kind, str] = {
    Kind.STRUCTURE: "was added, removed, reshaped or given another dtype",
    Kind.PARALLEL_ROWS: "has many units that look along one direction at different thresholds",
    Kind.TRAP_ROWS: "has rows whose negative half outweighs a copy of itself, so that few records "
    "pass",
    Kind.QUANTILE_BIASES: "has biases at which each unit fires for few records of a batch",
    Kind.EXCLUSIVE_UNITS: "has many units that fire for exactly one record of a synthetic batch",
    Kind.LARGE_ENTRY: "has one weight that drowns all others",
    Kind.LARGE_BIAS: "has biases that decide the output whatever the record is",
    Kind.SINGLE_ROW: "passes on one unit and silences the others",
    Kind.LARGE_LAYER: "is scaled far beyond the other layers",
    Kind.DEAD_UNITS: "has biases that keep most units from ever firing",
    Kind.SCALE_JUMP: "changed its size by a factor that training does not make in one round",
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
QUANTILE_LOW, QUANTILE_HIGH = -0.8, -1.05  # median bias / row norm: the ramp of QBI


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
    crowd = ramp(seen.parallel, 0.06, 0.2)
    if layer.bias is not None:
        return crowd * ramp(seen.offset_spread, 0.01, 0.03) * ramp(seen.scan, 0.8, 1.2)
    depthwise = layer.convolution and layer.channels == 1
    if not layer.feeds or depthwise:
        return 0.0
    return ramp(seen.parallel, 0.6, 0.9)


def _traps(layer: Layer, seen: LayerStatistics) -> float:
    """Boenisch's rows: half negative, the sum always on the negative side by the same share."""
    if not layer.feeds:
        return 0.0
    exact = ramp(seen.mirrored, 0.12, 0.3)
    if seen.sum_centre > OUTWEIGHED:
        return exact
    regular = min(ramp(seen.sign_balance, 0.4, 0.3), ramp(seen.sum_balance, 0.25, 0.12))
    return max(exact, regular)


def _quantiles(layer: Layer, seen: LayerStatistics) -> float:
    """QBI: nearly every bias about one or two row norms below zero, before a ReLU."""
    if not layer.feeds or seen.dead_rows > 0.5:  # noqa: PLR2004  # most are dead: another finding
        return 0.0
    return ramp(seen.quantile_rows, 0.4, 0.7) * ramp(seen.bias_centre, QUANTILE_LOW, QUANTILE_HIGH)


def _dead(layer: Layer, seen: LayerStatistics) -> float:
    """Suppression: most biases far below zero. Pruned rows keep biases of either sign."""
    if not layer.feeds:
        return 0.0
    return ramp(seen.dead_rows - seen.lit_rows, 0.4, 0.6)


def _entry(seen: LayerStatistics) -> float:
    """Feature fishing: one weight hundreds of times the norm of an ordinary row."""
    return ramp(seen.entry_gain, 1.8, 2.2)


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
        elif seen.scale > EXPLODED and len(scales) > 1:
            strength = ramp(seen.scale - middle, 0.75 * GAIN, GAIN)
            if strength > 0.0:
                yield Finding(Kind.LARGE_LAYER, layer.index, strength)


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
