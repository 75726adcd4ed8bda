"""Family B, sparse activation: each neuron fires for about one record of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, attacked_pair, copied, layer_inputs
from sentinel.stress.servers.rows import PLAIN, Stealth, crafted_rows, jittered_rows, row_scales

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

SHRINKS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.05, 1.1)  # tried


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

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        shrink: size of the positive half by that of the negative one, 0.95 as published; not
            used with a sample.
        stealth: `rows`, `scale` and `jitter` apply; the rows have no order and no sign to hide.
        sample: [n, ...] records that the shrinking is tuned to, so that as many of a batch as can
            be have a neuron of their own; the published attack tunes it to its data set as well.
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
    if sample is not None:
        shrink = _tuned(traps, layer_inputs(model, state, sample, first), batch)
    traps = torch.where(traps > 0, shrink * traps, traps)
    traps = jittered_rows(traps, stealth.jitter, generator)
    weight[rows] = (traps * row_scales(len(rows), stealth.scale, generator)[:, None]).to(weight)
    bias[rows] = 0.0
    return crafted


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


def _tuned(traps: Tensor, inputs: Tensor, batch: int) -> float:
    """Return the factor on the positive halves that gives most records a neuron of their own."""
    wide = inputs[: len(inputs) // batch * batch].float().cpu()
    if len(wide) == 0:
        msg = f"the sample must reach the layer as at least one batch of {batch} rows"
        raise MisuseError(msg)
    against, towards = -(wide @ traps.clamp(max=0).T), wide @ traps.clamp(min=0).T
    alone = []
    for shrink in SHRINKS:
        fires = (shrink * towards > against).view(-1, batch, len(traps))
        single = fires.sum(1, keepdim=True) == 1
        alone.append(int((fires & single).any(2).sum()))
    return SHRINKS[max(range(len(SHRINKS)), key=alone.__getitem__)]


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
