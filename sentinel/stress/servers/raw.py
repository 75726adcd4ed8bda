"""One raw gradient of the hospital's, and what the attacker reads out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.detection.rounds import loss_of
from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    chosen_layer,
    has_pair,
    linear_layers,
    loaded,
    recorded_inputs,
)
from sentinel.stress.passive.tabular import EXACT, UNTREATED, LayerView, guess_rows, nearest, view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    Batch = tuple[Tensor, Tensor]

ROUNDING = 1e-5  # share of its parts that a sum must exceed to be more than their rounding
ALIKE = 0.999  # cosine from which two neurons feed the next layer in the same pattern


@dataclass(frozen=True, slots=True)
class Gradient:
    """One raw gradient and what it is made of.

    Attributes:
        values: gradient by parameter, of the mean loss; zero where none arrived.
        inputs: [rows, features] what reached the attacked layer, each row but once.
        norms: [records] norm of each record's part, in all layers but the last.
        alike: cosine of the largest part to the whole, in the same layers.
    """

    values: State
    inputs: Tensor
    norms: Tensor
    alike: float


def read_layer(model: nn.Module, state: Mapping[str, Tensor], layer: str | None) -> str:
    """Return the layer whose input is read: the first of a pair, or the last without one."""
    default = 0 if has_pair(model, state) else -1
    return chosen_layer(linear_layers(model, state), layer, default=default)


def gradient_of(
    model: nn.Module, state: Mapping[str, Tensor], batch: Batch, layer: str
) -> Gradient:
    """Return the gradient of one batch at `state`, in training mode, and what it is made of."""
    twin = loaded(model, state).train()
    records, labels = batch
    output, inputs = recorded_inputs(twin, records, layer)
    parameters = {
        name: value
        for name, value in twin.named_parameters(remove_duplicate=False)
        if value.requires_grad
    }
    if f"{layer}.weight" not in parameters:
        msg = f"layer {layer!r} is frozen, so no update of it leaves; name one that is trained"
        raise MisuseError(msg)
    last = linear_layers(model, state)[-1]
    once = dict(twin.named_parameters())  # of several names of one weight the first
    below = [name for name in parameters if name in once and not name.startswith(f"{last}.")]
    pieces = [
        loss_of(output[index : index + 1], labels[index : index + 1], records[index : index + 1])
        for index in range(len(records))
    ]
    values = _gradients(torch.stack(pieces).mean(), parameters)
    whole = largest = _joined(values, below)
    norms: list[Tensor] = []
    for piece in pieces:  # one record's part at a time: all of them may not fit
        part = _joined(_gradients(piece, parameters), below)
        norms.append(part.norm())
        if norms[-1] == max(norms):
            largest = part
    alike = float(torch.nn.functional.cosine_similarity(whole, largest, dim=0))
    return Gradient(values, _own(inputs.detach()), torch.stack(norms), alike)


def rows_read(
    model: nn.Module,
    state: Mapping[str, Tensor],
    gradient: Gradient,
    layer: str,
    secret: Tensor | None = None,
) -> int:
    """Return how many of the rows that reached `layer` the attacker reads from the gradient."""
    return count_read(viewed(model, state, gradient.values, layer), gradient.inputs, secret)


def guesses(seen: LayerView, secret: Tensor | None = None) -> Tensor:
    """Return the attacker's guesses: those for the whole layer, and for each group of its neurons.

    The attacker knows which neurons it gave to which output; those with the same pattern of
    columns behind them are read among themselves.

    Args:
        seen: the attacked layer.
        secret: [directions, neurons], the mixtures of neurons that a hidden attack reads besides.
    """
    parts = [guess_rows(seen, UNTREATED)]
    if secret is not None:
        parts.append(_mixed(seen, secret.double()))
    for group in _groups(seen.sent_next):
        lead = int(seen.sent_next[:, group].abs().sum(1).argmax())
        parts.append(
            guess_rows(
                LayerView(
                    weight=seen.weight[group],
                    bias=seen.bias[group],
                    sent_weight=seen.sent_weight[group],
                    sent_bias=seen.sent_bias[group],
                    next_weight=seen.next_weight[:, group],
                    next_bias=seen.next_bias,
                    sent_next=seen.sent_next[lead : lead + 1, group].expand(2, -1),
                ),
                UNTREATED,
            )
        )
    return torch.cat(parts)


def _mixed(seen: LayerView, secret: Tensor) -> Tensor:
    """Return the read-outs of mixtures of neurons whose divisor is more than rounding."""
    divisors = secret @ seen.bias
    chosen = divisors.abs() > ROUNDING * (secret.abs() @ seen.bias.abs())
    return (secret @ seen.weight)[chosen] / divisors[chosen, None]


def _groups(columns: Tensor) -> list[Tensor]:
    """Return the neurons whose columns [outputs, neurons] are alike but for their scale."""
    unit = torch.nn.functional.normalize(columns, dim=0)
    left = torch.ones(columns.shape[1], dtype=torch.bool)
    found = []
    for neuron in range(columns.shape[1]):
        if left[neuron]:
            alike = ((unit[:, neuron] @ unit).abs() > ALIKE) & left
            left &= ~alike
            left[neuron] = False
            whole = bool(alike.all()) and bool(columns[0].any())  # read already
            if int(alike.sum()) > 1 and not whole:
                found.append(torch.nonzero(alike)[:, 0])
    return found


def viewed(model: nn.Module, state: Mapping[str, Tensor], values: State, layer: str) -> LayerView:
    """Return what the server sees of `layer` when a client steps once at rate one."""
    wide = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    received = {
        name: value - values[name].double() if name in values else value
        for name, value in wide.items()
    }
    try:
        _, following = attacked_pair(model, state, layer)
    except MisuseError:
        return _last_viewed(wide, received, layer)
    return view(wide, received, layer, following)


def _last_viewed(sent: State, received: State, layer: str) -> LayerView:
    """Return the view of a last layer: nothing follows, so every neuron weighs the same."""
    weight, bias = sent[f"{layer}.weight"], sent[f"{layer}.bias"]
    nothing = weight.new_zeros(2, len(bias))
    return LayerView(
        weight=received[f"{layer}.weight"] - weight,
        bias=received[f"{layer}.bias"] - bias,
        sent_weight=weight,
        sent_bias=bias,
        next_weight=nothing,
        next_bias=weight.new_zeros(2),
        sent_next=torch.ones_like(nothing),
    )


def count_read(seen: LayerView, rows: Tensor, secret: Tensor | None = None) -> int:
    """Count the rows that a guess comes to within 1 % of; `secret` as for `guesses`."""
    if len(rows) == 0 or not seen.weight.any():
        return 0
    return int((nearest(guesses(seen, secret), rows) < EXACT).sum())


def _own(rows: Tensor) -> Tensor:
    """Return the rows that are no other row's twin and not empty.

    A class token and a word at its usual place are the same in many records, so reading one tells
    nothing of any.
    """
    wide = rows.double()
    sizes = wide.norm(dim=1)
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    return rows[(distances.amin(1) > EXACT * sizes) & (sizes > 0)]


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> State:
    found = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(parameters.items(), found, strict=True)
    }


def _joined(values: State, names: Sequence[str]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names]) if names else torch.zeros(1)
