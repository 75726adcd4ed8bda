"""Convolutions made transparent, so that the crafted layer behind them sees the image itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    convolutions,
    copied,
    layer_inputs,
    linear_layers,
)
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.lines import cuts_at, middles
from sentinel.stress.servers.rows import set_even

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sentinel.stress.passive.tabular import LayerView

BOOST = 500.0  # of the published kernels, so that bins stand far from one another


@fitted
def pass_through(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator | None = None,
) -> State:
    """Turn every convolution into the identity, so that a later layer sees the image itself.

    Args:
        model: the architecture.
        state: an honest global state.
        generator: not used; here because all crafting functions share one shape.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no convolution.

    Reference: Boenisch et al., 2023, arXiv 2112.02918, section on convolutional layers.
    """
    del generator
    crafted = copied(state)
    for name in _needed(model, state, "pass_through"):
        nn.init.dirac_(crafted[f"{name}.weight"])
        if f"{name}.bias" in crafted:
            crafted[f"{name}.bias"].zero_()
    return crafted


@fitted
def loki(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    client: int = 0,
    clients: int = 1,
    sample: Tensor | None = None,
    boost: float = BOOST,
) -> State:
    """Send each client kernels that write its images into channels of its own, in front of bins.

    In the sum over clients, a client's columns of the first dense layer then hold its records
    alone. The published attack inserts these layers; here the model's own kernels become them.
    The first channel of each client carries the constant one in place of a bias of its own, since
    the layer's bias sums over all clients.

    Args:
        model: the architecture, convolutions with ReLUs in front of two fully connected layers.
        state: an honest global state.
        generator: not used: all clients must get the same bins.
        client: number of this client, from 0.
        clients: how many share the channels.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        boost: factor on the first kernels.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: no convolution, no two fully connected layers in a row, or fewer than two
            channels for each client.

    Reference: Zhao et al., "LOKI", IEEE S&P 2024, arXiv 2303.12233.
    """
    del generator
    names = _needed(model, state, "loki")
    first, following = attacked_pair(model, state)
    crafted = copied(state)
    own = client_channels(model, state, client, clients)
    _route(crafted, names, own, boost)
    columns = client_columns(model, state, client, clients)[1:]
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    line = torch.zeros(weight.shape[1])
    line[torch.cat(list(columns))] = 1.0 / sum(map(len, columns))
    inputs = None if sample is None else layer_inputs(model, crafted, sample, first)
    weight.copy_(line.expand_as(weight))
    bias.copy_(-cuts_at(middles(len(bias)), line, inputs))
    set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
    # Small outputs: a loss that is certain of a record has no gradient for it.
    crafted[f"{following}.weight"] /= boost * len(bias)
    return crafted


def client_channels(
    model: nn.Module, state: Mapping[str, Tensor], client: int, clients: int
) -> list[int]:
    """Return the channels that a client's images are written into; the first holds the constant.

    Raises:
        MisuseError: the narrowest convolution has fewer than two channels for each client, or
            there is no such client.
    """
    names = _needed(model, state, "loki")
    narrowest = min(state[f"{name}.weight"].shape[0] for name in names)
    share = narrowest // clients
    if share < 2 or not 0 <= client < clients:  # noqa: PLR2004 - a constant and an image
        msg = (
            f"loki needs two channels of the narrowest convolution for each client; there are "
            f"{narrowest} channels for {clients} clients, and client {client} was asked for"
        )
        raise MisuseError(msg)
    image = state[f"{names[0]}.weight"].shape[1]
    return list(range(client * share, client * share + min(share, 1 + image)))


def client_columns(
    model: nn.Module, state: Mapping[str, Tensor], client: int, clients: int
) -> list[Tensor]:
    """Return the columns of the first dense layer that each of a client's channels feeds."""
    names = _needed(model, state, "loki")
    first, _ = attacked_pair(model, state)
    width = state[f"{first}.weight"].shape[1]
    channels = state[f"{names[-1]}.weight"].shape[0]
    if width % channels:
        msg = (
            f"loki needs the {channels} channels of the last convolution to feed layer {first!r} "
            f"place by place; its {width} inputs are no multiple of them"
        )
        raise MisuseError(msg)
    places = width // channels
    return [
        torch.arange(channel * places, (channel + 1) * places)
        for channel in client_channels(model, state, client, clients)
    ]


def separated(seen: LayerView, columns: Sequence[Tensor]) -> LayerView:
    """Return one client's view of a sum over clients: its image's columns, by its constant's.

    Args:
        seen: the first dense layer's view, of the summed updates.
        columns: of the client, as `client_columns` returns them.
    """
    constant, *image = columns
    chosen = torch.cat(image)
    return replace(
        seen,
        weight=seen.weight[:, chosen],
        bias=seen.weight[:, constant[0]],
        sent_weight=seen.sent_weight[:, chosen],
    )


def _route(crafted: State, names: list[str], own: list[int], boost: float) -> None:
    """Write kernels that carry a constant and the image through channels `own`, and nothing else.

    The first convolution makes the constant from its bias; later ones pass the channels on.
    """
    for place, name in enumerate(names):
        kernel = crafted[f"{name}.weight"]
        kernel.zero_()
        middle = tuple(side // 2 for side in kernel.shape[2:])
        if f"{name}.bias" not in crafted:
            msg = "loki needs convolutions with a bias, for the constant that stands for one"
            raise MisuseError(msg)
        bias = crafted[f"{name}.bias"]
        bias.zero_()
        for number, channel in enumerate(own):
            if place > 0:
                kernel[(channel, channel, *middle)] = 1.0
            elif number == 0:
                bias[channel] = 1.0
            else:
                kernel[(channel, number - 1, *middle)] = boost


def _needed(model: nn.Module, state: Mapping[str, Tensor], craft: str) -> list[str]:
    names = convolutions(model, state)
    if not names:
        msg = f"{craft} needs a model with a convolution (torch.nn.Conv1d, 2d or 3d); it has none"
        raise MisuseError(msg)
    return names
