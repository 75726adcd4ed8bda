"""Family D, transformer traps: attention made transparent, feed-forward rows made bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    attention_layers,
    copied,
    layer_inputs,
)
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.lines import Direction, cuts_at, line_of, middles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

STEEP = 1000.0  # rows this long make a GELU a ReLU for all but the tokens next to a cut


@fitted
def transparent_attention(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator | None = None,
    before: str | None = None,
) -> State:
    """Zero what attention adds, so that each token passes unmixed on the path beside it.

    Args:
        model: the architecture, with a skip connection around each attention.
        state: an honest global state.
        generator: not used; here because all crafting functions share one shape.
        before: only attentions in front of the layer of this name; all where left out.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no attention with a fully connected layer at its end.

    Reference: Fowl et al., "Decepticons", 2022, arXiv 2201.12675.
    """
    del generator
    crafted = copied(state)
    ends = _attention_ends(model, state, before)
    if not ends:
        msg = "this attack needs an attention layer that ends in a torch.nn.Linear; there is none"
        raise MisuseError(msg)
    for name in ends:
        crafted[f"{name}.weight"].zero_()
        if f"{name}.bias" in crafted:
            crafted[f"{name}.bias"].zero_()
    return crafted


@fitted
def token_bins(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    sample: Tensor | None = None,
    direction: Direction = Direction.GAUSSIAN,
    steepness: float = STEEP,
) -> State:
    """Make attention transparent and the first feed-forward layer bins that scan single tokens.

    Attention behind the bins stays, since it is what carries the tokens to the class token.

    Args:
        model: the architecture: blocks of attention and feed-forward layers with skips.
        state: an honest global state.
        generator: draws the scanned line and the column behind the bins.
        layer: attacked layer; the first fully connected one outside attention where left out.
        sample: [n, ...] records whose tokens the thresholds are quantiles of; where left out, the
            layer's input is taken for standard normal, as behind a layer normalisation.
        direction: the line that is scanned.
        steepness: length of the rows.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: no attention in front of two fully connected layers in a row.

    Reference: Fowl et al., "Decepticons", 2022, arXiv 2201.12675; in place.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = transparent_attention(model, state, before=first)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    line = line_of(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, crafted, sample, first)
    weight.copy_(steepness * line.expand_as(weight))
    bias.copy_(-steepness * cuts_at(middles(len(bias)), line, inputs))
    behind = crafted[f"{following}.weight"]
    # Random, not even: the next layer normalisation takes no gradient along an even column.
    column = torch.randn(len(behind), generator=generator)
    behind.copy_((column[:, None] / (steepness * len(bias))).expand_as(behind))
    return crafted


def _attention_ends(model: nn.Module, state: Mapping[str, Tensor], before: str | None) -> list[str]:
    """Return the last fully connected layer of each attention in front of `before`."""
    order = [name for name, _ in model.named_modules()]
    stop = len(order) if before is None else order.index(before)
    ends = []
    for attention in attention_layers(model):
        inside = [
            name
            for name in order[:stop]
            if name.startswith(f"{attention}.")
            and isinstance(model.get_submodule(name), nn.Linear)
            and f"{name}.weight" in state
        ]
        ends += inside[-1:]
    return ends
