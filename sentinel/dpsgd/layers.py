"""Layers: the gradient of each record at each layer, and the layers that private training refuses.

A layer is known by what went into it and by the gradient of the loss at what came out; both have
one row for each record. From them follows each record's own gradient. Layers that no rule here
knows are recomputed row by row with `torch.func`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from sentinel.dpsgd.precision import EXACT
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LET_OUT = (
    "Replace it, or freeze its parameters with requires_grad_(False) if it may stay as it is."
)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that a layer holds itself, by name."""
    return {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def is_outer(layer: nn.Module, inputs: Tensor) -> bool:
    """Whether each row's weight gradient is an outer product: a Linear on (rows, features)."""
    return type(layer) is nn.Linear and inputs.dim() == 2  # noqa: PLR2004 - rows and features


def works_along(layer: nn.Module) -> bool:
    """Whether a layer works along a dimension that `require_along_records` has to look at."""
    return _along(layer) is not None


def is_lookup(layer: nn.Module) -> bool:
    """Whether each row's gradient touches few rows of the weight: an Embedding."""
    return type(layer) is nn.Embedding


def layers_to_tap(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that hold trainable parameters, each once, with a name.

    Raises:
        MisuseError: a layer mixes records, or its gradients cannot be told apart by record.
    """
    for name, layer in model.named_modules():
        require_separate(name, layer)
        if own_parameters(layer):
            _require_supported(name, layer)
            yield name, layer


def require_separate(name: str, layer: nn.Module) -> None:
    """Refuse what computes one record's output from other records.

    Raises:
        MisuseError: and what to use in its place.
    """
    where = f"Layer {name!r} is a {type(layer).__name__}"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of every BatchNorm
        raise MisuseError(
            f"{where}, which mixes the records of a batch, so that no patient's part can be "
            "bounded. Use torch.nn.GroupNorm in its place, for example GroupNorm(min(32, "
            "channels), channels)."
        )
    if getattr(layer, "track_running_stats", False):
        raise MisuseError(
            f"{where} that keeps running statistics of the patients; make it with "
            "track_running_stats=False, or use torch.nn.GroupNorm."
        )
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        raise MisuseError(
            f"{where}; private training has no gradients by record for recurrent layers. Use "
            "convolutions or attention in its place."
        )
    if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first:
        raise MisuseError(
            f"{where} that attends along the first dimension, which is the records; make it with "
            "batch_first=True."
        )
    if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise MisuseError(f"{where}; pass the model itself, model.module.")
    if hasattr(layer, "_orig_mod"):
        raise MisuseError("The model is compiled; pass the model itself, before torch.compile.")
    require_along_records(layer, None)
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):  # noqa: SLF001 - own ones only
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in EXACT:
            raise MisuseError(
                f"{where} with values that are not float32 or float64, trained or frozen; convert "
                "the model first: gradients in half precision are too coarse to be clipped exactly."
            )


def require_along_records(layer: nn.Module, dims: int | None) -> None:
    """Refuse a layer that works along the first dimension, which is the records.

    Args:
        layer: any layer; of most kinds none does.
        dims: dimensions of what goes in; None where it is not known yet.

    Raises:
        MisuseError: it does, as far as can be told.
    """
    named = _along(layer)
    dim = 1 if named is None else named if isinstance(named, int) else getattr(layer, named)
    if dim is None and dims is not None:
        dim = 0 if dims in (0, 1, 3) else 1  # what torch's softmax takes where none is named
    if dim == 0 or (isinstance(dim, int) and dims is not None and dim + dims == 0):
        raise MisuseError(
            f"A {type(layer).__name__} of the model works along dimension 0, which is the records: "
            "it would mix them. Name the dimension of the features (dim=1, or start_dim=1)."
        )


def _along(layer: nn.Module) -> str | int | None:
    """The dimension that a layer works along, or the attribute that names it; most have none."""
    return next((found for kind, found in _ALONG.items() if isinstance(layer, kind)), None)


def _require_supported(name: str, layer: nn.Module) -> None:
    where = f"Layer {name!r} ({type(layer).__name__})"
    if next(layer.children(), None) is not None:
        raise MisuseError(
            f"{where} holds both parameters of its own and other layers, so that its gradients "
            f"cannot be told apart by record. Move those parameters into a layer of their own. "
            f"{_LET_OUT}"
        )
    if isinstance(layer, nn.Embedding) and layer.sparse:
        raise MisuseError(f"{where} has sparse gradients; make it with sparse=False.")
    if type(layer) in _RULES and not set(own_parameters(layer)) <= {"weight", "bias"}:
        raise MisuseError(f"{where} computes its weight from other parameters. {_LET_OUT}")
    if isinstance(layer, nn.EmbeddingBag) or (
        isinstance(layer, nn.Embedding) and (layer.scale_grad_by_freq or layer.max_norm is not None)
    ):
        raise MisuseError(
            f"{where} looks at other records or changes its weight in the forward pass; use a "
            "torch.nn.Embedding without max_norm and scale_grad_by_freq."
        )


def gradients(layer: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    """Each row's gradient of one of a layer's own parameters.

    Args:
        layer: a layer that `layers_to_tap` gave.
        inputs: what went in, (rows, ...).
        grads: gradient of the loss at what came out, (rows, ...).
        name: of the parameter in the layer.

    Returns:
        (rows, *shape of the parameter).

    Raises:
        MisuseError: the layer cannot be run record by record.
    """
    return _RULES.get(type(layer), _recomputed)(layer, inputs, grads, name)


def _linear(_: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    rows = len(inputs)
    signals = grads.reshape(rows, -1, grads.shape[-1])  # (rows, positions, out)
    if name == "bias":
        return signals.sum(1)
    positions = inputs.reshape(rows, -1, inputs.shape[-1])  # (rows, positions, in)
    return torch.bmm(signals.transpose(1, 2), positions)


def _convolution(layer: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    """One matrix product for each row, of what came back and the patches that went in."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # noqa: S101 - by `_RULES`
    signals = grads.flatten(2)  # (rows, out channels, positions)
    if name == "bias":
        return signals.sum(2)
    rows, groups, shape = len(inputs), layer.groups, layer.weight.shape
    patches = _patches(layer, inputs, list(grads.shape[2:]))
    patches = patches.reshape(rows * groups, -1, signals.shape[2])
    signals = signals.reshape(rows * groups, -1, signals.shape[2])
    found: Tensor = torch.bmm(signals, patches.transpose(1, 2)).view(rows, *shape)
    return found


def _patches(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, positions: list[int]
) -> Tensor:
    """What each weight met at each position: a view, (rows, channels, *kernel, *positions)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode).contiguous()  # noqa: SLF001 - torch's own figures
    row, channel, *steps = padded.stride()
    within = [step * apart for step, apart in zip(steps, layer.dilation, strict=True)]
    along = [step * apart for step, apart in zip(steps, layer.stride, strict=True)]
    size = [*padded.shape[:2], *layer.kernel_size, *positions]
    return padded.as_strided(size, [row, channel, *within, *along])


def _layer_norm(layer: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)  # noqa: S101 - by `_RULES`
    if name == "weight":
        grads = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps) * grads
    return grads.reshape(len(inputs), -1, *layer.normalized_shape).sum(1)


def _group_norm(layer: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)  # noqa: S101 - by `_RULES`
    if name == "weight":
        grads = F.group_norm(inputs, layer.num_groups, eps=layer.eps) * grads
    return grads.reshape(len(inputs), layer.num_channels, -1).sum(2)


def _embedding(layer: nn.Module, inputs: Tensor, grads: Tensor, _: str) -> Tensor:
    """Only for an embedding whose weight is used elsewhere too; else see `clipping.Lookup`."""
    tokens, signals = lookups(layer, inputs, grads)
    assert isinstance(layer, nn.Embedding)  # noqa: S101 - by `_RULES`
    out = signals.new_zeros(len(tokens), *layer.weight.shape)
    return out.scatter_add_(1, tokens[..., None].expand_as(signals), signals)


def lookups(layer: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """What an embedding's gradient is made of: words (rows, positions), signals (..., width)."""
    assert isinstance(layer, nn.Embedding)  # noqa: S101 - by `is_lookup`
    tokens = inputs.reshape(len(inputs), -1)
    signals = grads.reshape(*tokens.shape, grads.shape[-1])
    if layer.padding_idx is not None:
        signals = signals.masked_fill((tokens == layer.padding_idx)[..., None], 0.0)
    return tokens, signals


def _recomputed(layer: nn.Module, inputs: Tensor, grads: Tensor, name: str) -> Tensor:
    """Run the layer again on each row alone and differentiate."""
    rest = {key: value.detach() for key, value in layer.named_parameters() if key != name}
    rest |= {key: value.detach() for key, value in layer.named_buffers()}
    alone = _Alone(layer)

    def loss(parameter: Tensor, row: Tensor, grad: Tensor) -> Tensor:
        values = {f"layer.{key}": value for key, value in (rest | {name: parameter}).items()}
        out: Tensor = torch.func.functional_call(alone, values, (row[None],))
        return (out * grad[None]).sum()

    try:
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        found: Tensor = each(own_parameters(layer)[name].detach(), inputs.detach(), grads)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise MisuseError(
            f"A layer of class {type(layer).__name__} cannot be run record by record "
            f"({type(error).__name__}), so that its gradients cannot be told apart. {_LET_OUT}"
        ) from None
    return found


class _Alone(nn.Module):
    """A layer without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, row: Tensor) -> Tensor:
        out: Tensor = type(self.layer).forward(self.layer, row)
        return out


# Layers that work along a dimension, and what they call it, or which it is.
_ALONG: dict[type[nn.Module], str | int] = {
    nn.Softmax2d: -3,
    nn.CosineSimilarity: "dim",
    nn.Softmax: "dim",
    nn.LogSoftmax: "dim",
    nn.Softmin: "dim",
    nn.GLU: "dim",
    nn.Flatten: "start_dim",
    nn.Unflatten: "dim",
}
_RULES: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, str], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}
