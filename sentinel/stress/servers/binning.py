"""Family A, binning: many neurons scan one direction, and neighbours isolate a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.layers import State, attacked_pair, copied, layer_inputs, linear_layers
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.lines import Direction, apart, cuts_at, line_of, middles
from sentinel.stress.servers.rows import (
    PLAIN,
    Stealth,
    crafted_rows,
    even_column,
    jittered_rows,
    row_factors,
    scale_from,
    set_even,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@fitted
def binning(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    direction: Direction = Direction.GAUSSIAN,
    scale: float = 1.0,
    sample: Tensor | None = None,
    records: int = 0,
    stealth: Stealth = PLAIN,
) -> State:
    """Let all neurons scan one direction at rising thresholds, so that neighbours isolate a record.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        direction: the line that is scanned.
        scale: factor on this layer and every later fully connected one. Small values keep several
            local steps close to one, so that more is read from epochs of local training.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        records: how many stand behind the update, where the server knows; with more of them than
            neurons, only as much of the middle of the line is scanned as has a bin for each.
        stealth: how the rows hide.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no two fully connected layers in a row.

    Reference: Fowl et al., "Robbing the Fed", ICLR 2022, arXiv 2110.13057; in place, as in Shi et
    al., NDSS 2025.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    rows = crafted_rows(len(bias), stealth, generator)
    line = line_of(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, state, sample, first)
    cuts = cuts_at(apart(len(rows), records), line, inputs)
    spread = line.expand(len(rows), -1)
    weight[rows] = jittered_rows(spread, stealth.jitter, generator).to(weight)
    bias[rows] = (-cuts).to(bias)
    set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
    factors = row_factors(len(rows), stealth, generator).to(weight)
    weight[rows] *= factors[:, None]
    bias[rows] *= factors
    crafted[f"{following}.weight"][:, rows] /= factors.abs()
    scale_from(crafted, linear_layers(model, state), first, scale)
    return crafted


@fitted
def sparse_binning(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    direction: Direction = Direction.MEAN,
    sample: Tensor | None = None,
) -> State:
    """Divide each bin's row by the bin's width, and let neighbours count with opposite signs.

    The published variant has a Hardtanh behind its bins. Here relu(z) - relu(z - 1) of two
    neighbours is that function, so the layer's output stays between 0 and 1 whatever comes in.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        direction: the line that is scanned.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no two fully connected layers in a row.

    Reference: Fowl et al., "Robbing the Fed", ICLR 2022, arXiv 2110.13057, the sparse variant.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    line = line_of(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, state, sample, first)
    cuts = cuts_at(middles(len(bias)), line, inputs)
    widths = _widths(cuts)
    weight.copy_(line / widths[:, None])
    bias.copy_(-cuts / widths)
    is_last = linear_layers(model, state)[-1] == following
    column = even_column(len(crafted[f"{following}.bias"]), is_last=is_last)
    signs = torch.ones(len(bias))
    signs[1::2] = -1.0
    # The loss is far from certain while the outputs are small, and a certain loss has no gradient.
    crafted[f"{following}.weight"].copy_(column[:, None] * signs / len(bias))
    crafted[f"{following}.bias"].zero_()
    return crafted


def _widths(cuts: Tensor) -> Tensor:
    """Return the width of the pair of bins that each cut belongs to, never zero, [count]."""
    gaps = cuts.diff()
    floor = 1e-3 * gaps.mean() + torch.finfo(torch.float32).tiny
    pairs = gaps[::2].clamp_min(floor)
    return (
        pairs.repeat_interleave(2)[: len(cuts)]
        if len(cuts) % 2 == 0
        else torch.cat([pairs.repeat_interleave(2), pairs[-1:]])
    )


@fitted
def isolation(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    sample: Tensor,
    batch: int | None = None,
) -> State:
    """Put every neuron at one cut that only the outermost record passes, and stake all on it.

    Binning with a single bin. The whole layer's update is then one record's, so this is what a
    server does that wants one patient through the noise rather than many without it.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        sample: [n, ...] with n >= 2, records like those behind the update; the cut lies between
            the two outermost.
        batch: with it, the cut lies where one in so many records of the sample is past it.

    Returns:
        A crafted state with the same names, shapes and dtypes.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    line = line_of(Direction.GAUSSIAN, weight.shape[1], generator)
    along = layer_inputs(model, state, sample, first).float().cpu() @ line
    outermost = 2 if batch is None else max(2, round(len(along) / batch) + 1)
    cut = along.topk(outermost).values[-2:].mean()
    weight.copy_(line.expand_as(weight))
    bias.copy_(-cut.expand_as(bias))
    set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
    return crafted
