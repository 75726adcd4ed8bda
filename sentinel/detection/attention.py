"""Traps in transformers: attention that lets tokens pass unmixed, and bins that take them up.

What is attention is told by shapes alone: three square matrices of one width, or one of three times
its width beside a square one, with feed-forward layers of that width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.detection.rules import Finding, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.detection.layers import Layer
    from sentinel.detection.weights import LayerStatistics

TRAPS = frozenset({Kind.PARALLEL_ROWS, Kind.TRAP_ROWS, Kind.QUANTILE_BIASES, Kind.LOUD_ROWS})
WIDENED = 2  # times its width, at least, that a feed-forward layer has units
SQUARES = 3  # query, key and value, or more
# A block whose attention ends in zeros while others' do not is a fresh one, where residuals start
# at zero, or a trap: evidence beside another finding, and by itself below every refusal.
OPEN = 0.3


def attention_findings(
    layers: Sequence[Layer], statistics: Sequence[LayerStatistics], found: Sequence[Finding]
) -> list[Finding]:
    """Return what the findings of single layers come to in a transformer.

    Args:
        layers: all layers of the state.
        statistics: of each.
        found: what the rules found in single layers.
    """
    widths = _widths(layers)
    feeding = {layer.index for layer in layers if layer.feeds and _is_widening(layer) in widths}
    traps = [
        Finding(Kind.FEED_FORWARD_TRAP, one.layer, one.strength)
        for one in found
        if one.kind in TRAPS and one.layer in feeding
    ]
    return [*traps, *_open(layers, statistics, widths)]


def _open(
    layers: Sequence[Layer], statistics: Sequence[LayerStatistics], widths: set[int]
) -> list[Finding]:
    """Square layers of zeros with no bias either, if most others of their kind are none.

    Of query, key, value and output only the last starts at zero, in all blocks of a fresh net.
    """
    opened = []
    shapes = {_shape(layer) for layer in layers}
    for width in sorted(widths):
        kinds = 1 if (3 * width, width) in shapes else SQUARES + 1
        squares = [
            (layer, seen)
            for layer, seen in zip(layers, statistics, strict=True)
            if _shape(layer) == (width, width)
        ]
        zero = [layer for layer, seen in squares if seen.zero_rows == 1.0 and seen.bias_range == 0]
        if 2 * kinds * len(zero) < len(squares):
            opened += [Finding(Kind.OPEN_ATTENTION, layer.index, OPEN) for layer in zero]
    return opened


def _widths(layers: Sequence[Layer]) -> set[int]:
    """Widths of tokens."""
    shapes = [_shape(layer) for layer in layers]
    found = set()
    for width in {units for units, inputs in shapes if units == inputs and units}:
        joined = shapes.count((3 * width, width))  # query, key and value in one
        feeding = sum(_is_widening(layer) == width for layer in layers)
        alone = shapes.count((width, width)) >= SQUARES and feeding
        # A feed-forward layer may be three times as wide, as the joined one is.
        if alone or (joined and feeding >= 2):  # noqa: PLR2004 - that one, and a feed-forward layer
            found.add(width)
    return found


def _is_widening(layer: Layer) -> int:
    """Width that a layer takes up and widens, or 0."""
    units, inputs = _shape(layer)
    return inputs if units >= WIDENED * inputs else 0


def _shape(layer: Layer) -> tuple[int, int]:
    return (0, 0) if layer.convolution else (layer.units, layer.inputs)
