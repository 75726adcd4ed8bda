"""The weight matrices of a state: what an attack on a global model has to bend.

A layer is every floating entry with two or more dimensions, taken as a matrix of one row per unit,
with the bias that belongs to it. Names decide only which bias belongs to which weight; everything
else is read from shapes, so that the order of the mapping does not matter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

MATRIX = 2  # dimensions from which an entry is a weight matrix
SIDE, SIDE_OF_LINES = 7, 31  # up to which a kernel is small: of pictures and volumes, of lines
JOINED = 4  # equal layers, at most, that a convolution takes up side by side


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight matrix.

    Attributes:
        index: place of the weight's name among the sorted names of the state.
        name: the weight's name.
        weight: [units, ...], in the dtype of the state, borrowed.
        bias: [units], or None.
        bias_name: name of the bias, or None.
        feeds: whether some other layer takes this one's units as input.
        channels: second dimension of the weight.
        convolution: whether the weight has more than two dimensions.
    """

    index: int
    name: str
    weight: Tensor
    bias: Tensor | None
    bias_name: str | None
    feeds: bool
    channels: int
    convolution: bool

    @property
    def units(self) -> int:
        """Rows of the weight as a matrix."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the weight as a matrix."""
        return self.weight.numel() // self.units  # neither is 0

    @property
    def depthwise(self) -> bool:
        """Whether each row is a small kernel over one channel: rows see channels of their own.

        So does the first layer of a grey picture, whose rows see little places all over it.
        """
        if not self.convolution or self.channels > 1:
            return False
        sides = self.weight.shape[2:]
        return max(sides) <= (SIDE_OF_LINES if len(sides) == 1 else SIDE)


def layers_of(state: Mapping[str, Tensor]) -> list[Layer]:
    """Return every weight matrix of a state, in the order of the sorted names."""
    order = {name: index for index, name in enumerate(sorted(state))}
    matrices = {name: state[name] for name in order if _is_matrix(state[name])}
    dense = Counter(value.shape[1] for value in matrices.values() if value.ndim == MATRIX)
    kernels = Counter(value.shape[1] for value in matrices.values() if value.ndim > MATRIX)
    return [
        _layer(order[name], name, value, state, feeds=_feeds(value, dense, kernels))
        for name, value in matrices.items()
    ]


def entry_name(module: str, leaf: str) -> str:
    """Return the name of a module's own entry; the root module's has no prefix."""
    return f"{module}.{leaf}" if module else leaf


def bias_name(name: str) -> str:
    """Return the name that the bias of weight `name` has by PyTorch's habit."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}{leaf.replace('weight', 'bias')}"


def weight_name(name: str) -> str | None:
    """Return the name that the weight of bias `name` has; None where it is no bias."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}{leaf.replace('bias', 'weight')}" if "bias" in leaf else None


def _is_matrix(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim >= MATRIX and value.numel() > 0


def _layer(
    index: int, name: str, value: Tensor, state: Mapping[str, Tensor], *, feeds: bool
) -> Layer:
    units = value.shape[0]
    other = bias_name(name)
    bias = state.get(other) if other != name else None
    if bias is not None and (bias.shape != (units,) or not bias.is_floating_point()):
        bias = None
    return Layer(
        index=index,
        name=name,
        weight=value.detach(),
        bias=None if bias is None else bias.detach(),
        bias_name=None if bias is None else other,
        feeds=feeds,
        channels=value.shape[1],
        convolution=value.ndim > MATRIX,
    )


def _feeds(value: Tensor, dense: Counter[int], kernels: Counter[int]) -> bool:
    """Whether a layer other than itself has a width that fits its units.

    Kernels do not take up what a dense layer gives: six classes are no six channels. A dense layer
    takes up channels at many places, a convolution the channels of a few layers side by side; one
    of a single channel takes up each by itself, whoever gives it.
    """
    units, own = value.shape[:2]
    if value.ndim == MATRIX:
        return dense[units] > (own == units)
    joined = [units * count for count in range(1, JOINED + 1) if units * count > 1]
    flattened = any(width % units == 0 for width in dense)
    return flattened or sum(kernels[width] for width in joined) > (own in joined)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider, sharing memory where it already is."""
    return tensor.to(wide_type(tensor))


def wide_type(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that holds all of these, float32 or wider."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
