"""Family B, sparse activation: each neuron fires for about one record of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, attacked_pair, copied, layer_inputs
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.rows import PLAIN, Stealth, crafted_rows, jittered_rows, row_scales

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

SHRINKS = tuple(step / 100 for step in range(50, 151))  # tried on each row


@fitted
def trap_weights(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    shrink: float = 0.95,
    stealth: Stealth = PLAIN,
    sample: Tensor | None = None,
    batch: int = 32,
) -> State:
    """Make the negative half of each row outweigh the positive, so that few records fire it.

    Works on inputs of one sign, as pixels and what a ReLU lets through. Around zero, as
    standardised columns are, a row without a bias fires for half of the records whatever its shape.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        shrink: size of the positive half by that of the negative one, 0.95 as published; not
            used with a sample.
        stealth: `rows`, `scale` and `jitter` apply; the rows have no order and no sign to hide.
        sample: [n, ...] records that each row's own shrinking is tuned to, so that it fires for
            one record of a batch; the published attack tunes one for all rows, to its data set.
        batch: records per batch, for that.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no two fully connected layers in a row, or the sample holds no
            batch.

    Reference: Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023, arXiv 2112.02918.
    """
    first, _ = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    rows = crafted_rows(len(bias), stealth, generator)
    traps = torch.stack([_trap_row(weight.shape[1], generator) for _ in rows])
    shrinks = torch.full((len(rows),), shrink)
    if sample is not None:
        shrinks = _tuned(traps, layer_inputs(model, state, sample, first), batch)
    traps = torch.where(traps > 0, shrinks[:, None] * traps, traps)
    traps = jittered_rows(traps, stealth.jitter, generator)
    weight[rows] = (traps * row_scales(len(rows), stealth.scale, generator)[:, None]).to(weight)
    bias[rows] = 0.0
    return crafted


@fitted
def qbi(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    batch: int = 32,
    sample: Tensor | None = None,
) -> State:
    """Set each bias at the quantile where a normal row fires for one record of a batch.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        batch: records per batch, at least 2.
        sample: [n, ...] records that each row's own quantile is taken of; where left out, the
            layer's input is taken for standard normal.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no two fully connected layers in a row, or `batch` is under 2.

    Reference: Nowak et al., "QBI: Quantile-based bias initialization", 2024, arXiv 2406.18745.
    """
    if batch < 2:  # noqa: PLR2004 - the quantile of one in one is infinite
        msg = f"batch must be at least 2 records, got {batch}"
        raise MisuseError(msg)
    first, _ = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    drawn = torch.randn(weight.shape, generator=generator)
    weight.copy_(drawn)
    if sample is None:
        one_in_batch = torch.special.ndtri(torch.tensor(1.0 / batch)) * math.sqrt(weight.shape[1])
        bias.fill_(float(one_in_batch))
    else:
        inputs = layer_inputs(model, state, sample, first).float().cpu()
        bias.copy_(-torch.quantile(inputs @ drawn.T, 1 - 1 / batch, dim=0))
    return crafted


def _tuned(traps: Tensor, inputs: Tensor, batch: int) -> Tensor:
    """Return each row's factor on its positive half: the one nearest to one record of a batch."""
    if len(inputs) < batch:
        msg = f"the sample must reach the layer as at least one batch of {batch} rows"
        raise MisuseError(msg)
    wide = inputs.float().cpu()
    against, towards = -(wide @ traps.clamp(max=0).T), wide @ traps.clamp(min=0).T
    shares = [(shrink * towards > against).float().mean(0) for shrink in SHRINKS]
    nearest = (torch.stack(shares) - 1.0 / batch).abs().argmin(0)
    return torch.tensor(SHRINKS)[nearest]


def _trap_row(width: int, generator: torch.Generator) -> Tensor:
    """Return one trap row, [width]: half negative, half the same sizes, shuffled."""
    half = width // 2
    order = torch.randperm(width, generator=generator)
    negative = -(torch.randn(width - half, generator=generator) * 0.5).abs()
    shuffled = negative[torch.randperm(len(negative), generator=generator)][:half]
    row = torch.empty(width)
    row[order[: width - half]] = negative
    row[order[width - half :]] = shuffled.abs()
    return row
