"""The layers of a model that an attack needs, found by type and name in any torch.nn.Module."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

State = dict[str, Tensor]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm


def copied(state: Mapping[str, Tensor]) -> State:
    """Return a copy that shares no storage and carries no graph."""
    return {name: value.detach().clone() for name, value in state.items()}


def linear_layers(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the fully connected layers whose weight and bias the state holds, in model order.

    Those inside an attention are left out: no activation follows them, so no neuron of theirs
    stays silent.
    """
    attentions = tuple(f"{name}." for name in attention_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and {f"{name}.weight", f"{name}.bias"} <= state.keys()
        and not name.startswith(attentions)
    ]


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the attention layers: torch's own, and any whose class is called so."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and (
            isinstance(module, nn.MultiheadAttention)
            or "attention" in type(module).__name__.lower()
        )
    ]


def convolutions(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the convolutions whose kernels the state holds, in model order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Convolution) and f"{name}.weight" in state
    ]


def last_norm(model: nn.Module, state: Mapping[str, Tensor], channels: int) -> str | None:
    """Name of the last batch or group normalisation with a bias of `channels` entries, if any."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Norm)
        and f"{name}.bias" in state
        and len(state[f"{name}.bias"]) == channels
    ]
    return names[-1] if names else None


def attacked_pair(
    model: nn.Module, state: Mapping[str, Tensor], layer: str | None = None
) -> tuple[str, str]:
    """Return the attacked layer and the one that it feeds.

    Args:
        model: the architecture.
        state: its global state.
        layer: name of the attacked layer; the first fully connected one where left out.

    Raises:
        MisuseError: no such layer, or no later fully connected layer of fitting width.
    """
    names = linear_layers(model, state)
    first = chosen_layer(names, layer, default=0)
    width = state[f"{first}.weight"].shape[0]
    for name in names[names.index(first) + 1 :]:
        if state[f"{name}.weight"].shape[1] == width:
            return first, name
    msg = (
        f"layer {first!r} feeds no later torch.nn.Linear with a bias and {width} inputs; "
        "this attack needs two fully connected layers in a row"
    )
    raise MisuseError(msg)


def has_pair(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the first fully connected layer feeds another."""
    try:
        attacked_pair(model, state)
    except MisuseError:
        return False
    return True


def loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the model that holds `state`; the model itself is not touched."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


def layer_inputs(
    model: nn.Module, state: Mapping[str, Tensor], records: Tensor, layer: str
) -> Tensor:
    """What reaches `layer` for these records, in evaluation mode, on a copy of the model.

    Args:
        model: the architecture; neither it nor its mode is changed.
        state: the global state to run it with.
        records: [n, ...] as the model takes them.
        layer: name of a fully connected layer.

    Returns:
        [n, d], flattened: one row for each record, or for each token of each record.
    """
    twin = loaded(model, state).eval()
    with torch.no_grad():
        return recorded_inputs(twin, records, layer)[1]


def recorded_inputs(model: nn.Module, records: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Run the model as it stands, and return its output and what reached `layer`, [n, d].

    Raises:
        MisuseError: the forward pass does not reach the layer.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        output = model(records)
    finally:
        handle.remove()
    if not seen:
        msg = f"layer {layer!r} is not reached in a forward pass; name one that is"
        raise MisuseError(msg)
    return output, seen[0].flatten(0, -2)


def chosen_layer(names: list[str], layer: str | None, default: int) -> str:
    """Return `layer`, or the name at `default` where none is given.

    Raises:
        MisuseError: there is no fully connected layer, or none of that name.
    """
    if not names:
        msg = "this attack needs a torch.nn.Linear layer with a bias in the state; there is none"
        raise MisuseError(msg)
    if layer is None:
        return names[default]
    if layer not in names:
        msg = f"{layer!r} is no torch.nn.Linear with a bias; there are {', '.join(names)}"
        raise MisuseError(msg)
    return layer
