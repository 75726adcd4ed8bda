"""Family G, multi-round scanning: parallel rows whose biases move on from round to round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, attacked_pair, copied, layer_inputs, linear_layers
from sentinel.stress.servers.lines import Direction, cuts_at, line_of
from sentinel.stress.servers.rows import scale_from, set_even

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def scan(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    part: int = 0,
    parts: int = 4,
    layer: str | None = None,
    direction: Direction = Direction.COSINE,
    sample: Tensor | None = None,
    scale: float = 0.1,
) -> State:
    """Spend the whole layer on one part of the line; the next rounds take the other parts.

    A layer of K neurons has K bins in a round and K x parts over all rounds, so a hospital that
    trains on the same records again is read as by a layer so much wider. Neighbouring parts share
    a cut.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: draws the line where `direction` is a normal one; the same in each part then.
        part: which part, from 0.
        parts: into how many the line is divided.
        layer: attacked layer; the first fully connected one where left out.
        direction: the line that is scanned.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        scale: factor on this layer and every later fully connected one, so that no record's loss
            becomes certain; where the outputs hardly move, nor does a record's part in the rounds.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: no two fully connected layers in a row, or no such part.

    Reference: "Cutting Through Privacy" (Diana), 2025, arXiv 2505.10264; cuts set in advance.
    """
    if not 0 <= part < parts:
        msg = f"part must be from 0 to {parts - 1}, got {part}"
        raise MisuseError(msg)
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    count = len(bias)
    line = line_of(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, state, sample, first)
    levels = (part * (count - 1) + torch.arange(count) + 0.5) / (parts * (count - 1) + 1)
    weight.copy_(line.expand_as(weight))
    bias.copy_(-cuts_at(levels, line, inputs))
    set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
    scale_from(crafted, linear_layers(model, state), first, scale)
    return crafted
