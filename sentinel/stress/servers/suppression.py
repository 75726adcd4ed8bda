"""Family E, inconsistency: other clients get dead models, so that their sum is one client's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    chosen_layer,
    copied,
    has_pair,
    last_norm,
    linear_layers,
)
from sentinel.stress.servers.fit import fitted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@fitted
def suppression(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    push: float = 1000.0,
    spared: float = 0.0,
) -> State:
    """Kill a ReLU layer by its bias, so that this client's update is zero and another's stands out.

    Without two fully connected layers in a row, the last normalisation before the last layer is
    killed, and with it everything below and the last layer's weight.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: chooses the rows that are spared.
        layer: attacked layer; the first fully connected one where left out.
        push: how far below zero every bias is put.
        spared: share of the rows that stay alive.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: no ReLU follows the layer, and no batch or group normalisation feeds the last.

    Reference: Pasquini et al., "Eluding Secure Aggregation", CCS 2022, arXiv 2111.07380.
    """
    crafted = copied(state)
    bias = crafted[f"{_killed(model, state, layer)}.bias"]
    dead = torch.randperm(len(bias), generator=generator)[round(spared * len(bias)) :]
    bias[dead] = -push
    return crafted


def _killed(model: nn.Module, state: Mapping[str, Tensor], layer: str | None) -> str:
    """Return the layer whose bias is pushed down."""
    if layer is None and not has_pair(model, state):
        last = chosen_layer(linear_layers(model, state), None, default=-1)
        found = last_norm(model, state, state[f"{last}.weight"].shape[1])
        if found is not None:
            return found
        msg = (
            "suppression needs two fully connected layers in a row, or a batch or group "
            "normalisation that feeds the last one; there is neither"
        )
        raise MisuseError(msg)
    return attacked_pair(model, state, layer)[0]
