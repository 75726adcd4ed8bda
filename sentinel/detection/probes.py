"""Probes: one forward and one backward pass of synthetic records through a copy of a model.

The records are of several kinds at once, since a crafted model is tuned to the records of its
victims and nobody else's: standard normal, uniform, and for images smooth fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.rounds import losses_of
from sentinel.detection.synthetic import (
    ModelError,
    fitting_shape,
    foreign,
    records,
    run,
    undisturbed,
    vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MANY = 32  # records of each kind
FEW = 8  # of those so large that a pass of many takes seconds
LARGE = 1 << 14  # values of a record from which it is large
ALIVE = 1e-3  # error of a unit beside the record's largest, below which the unit did not fire
WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer did on the probes.

    Attributes:
        dense: whether it is fully connected and sees each record as one row.
        fired: [records, units], whether the unit's output was above zero somewhere.
        active: [records, units], whether the loss depends on the unit's output; None where no
            gradient reached it.
        sizes: [records], about the norm of each record's gradient in the weight.
    """

    dense: bool
    fired: Tensor
    active: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """What a model did on the probes.

    Attributes:
        layers: by the module's name, in the order in which they ran.
        output: [records, ...].
        loss: [records], against synthetic labels; None where no gradient could be taken.
        each: how many records there are of each kind; one kind stands behind the other.
        plain: whether a record is one row of numbers.
    """

    layers: dict[str, Seen]
    output: Tensor
    loss: Tensor | None
    each: int
    plain: bool

    def kinds(self) -> list[slice]:
        """Places of the records of each kind."""
        return [slice(start, start + self.each) for start in range(0, len(self.output), self.each)]


def probed(
    module: nn.Module, sample: Sequence[int] | None, generator: torch.Generator
) -> Probed | None:
    """Run the probes.

    Args:
        module: a copy that holds the global model, in evaluation mode; it gets hooks.
        sample: shape of one input, or None to find it.
        generator: draws records and labels.

    Returns:
        What was seen, without gradients where the model's own code allows none; None where the
        model takes no input that is known here.
    """
    try:
        shape = fitting_shape(module, generator, sample)
        if shape is None:
            return None
        rows, each = _records(module, shape, generator)
        watched = _watch(module, len(rows))
        output = run(module, rows)
    except ModelError:
        return None
    loss, errors = None, dict[str, Tensor]()
    if output.requires_grad:
        try:
            loss, errors = _errors(output, rows, watched, generator)
        except ModelError:
            loss = None
    layers = {
        name: _seen(module.get_submodule(name), *pair, errors.get(name))
        for name, pair in watched.items()
    }
    return Probed(layers, output.detach(), loss, each, plain=rows.ndim == 2)  # noqa: PLR2004  # [records, columns]


def _records(
    module: nn.Module, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, int]:
    """Draw the records of all kinds, [kinds * each, *shape]."""
    tokens = vocabulary(module)
    each = MANY if torch.Size(shape).numel() < LARGE else FEW
    first = records(each, shape, generator, tokens=tokens)
    if tokens is not None:
        return torch.cat([first, records(each, shape, generator, tokens=tokens)]), 2 * each
    kinds = [first, torch.rand(each, *shape, generator=generator)]
    if len(shape) > 1:
        kinds.append(torch.randn(each, *shape, generator=generator))
    return torch.cat(kinds), each


def _watch(module: nn.Module, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Have every layer leave its input and output in what is returned, once it has run."""
    watched: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> object:
        def hook(_module: nn.Module, inputs: tuple[object, ...], output: object) -> object:
            entered = inputs[0] if inputs else None
            if not isinstance(output, Tensor) or not isinstance(entered, Tensor):
                return output
            if output.ndim < 2 or len(output) != count or len(entered) != count:  # noqa: PLR2004  # no row per record
                return output
            watched[name] = (entered, output)
            return output.clone()  # what follows may write into it

        return hook

    for name, part in module.named_modules():
        if isinstance(part, WATCHED):
            part.register_forward_hook(hook_of(name))  # type: ignore[arg-type]  # any hook does
    return watched


def _errors(
    output: Tensor,
    rows: Tensor,
    watched: Mapping[str, tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each record, and its derivative by every layer's output."""
    classes = 2 if output.ndim == 1 else max(output.shape[-1], 2)
    labels = torch.randint(classes, (len(rows),), generator=generator)
    targets = torch.rand(output.shape, generator=generator)
    names = [name for name, (_, after) in watched.items() if after.requires_grad]
    with undisturbed(), foreign():
        loss = losses_of(output, labels, rows, targets)
        found = torch.autograd.grad(
            loss.sum(), [watched[name][1] for name in names], allow_unused=True
        )
    pairs = zip(names, found, strict=True)
    return loss.detach(), {name: error for name, error in pairs if error is not None}


def _seen(module: nn.Module, entered: Tensor, output: Tensor, error: Tensor | None) -> Seen:
    axis = -1 if isinstance(module, nn.Linear) else 1
    dense = isinstance(module, nn.Linear) and output.ndim == 2  # noqa: PLR2004  # [records, units]
    fired = _peaks(output.detach(), axis) > 0
    if error is None:
        return Seen(dense, fired)
    peaks = _peaks(error.abs(), axis)
    active = peaks > ALIVE * peaks.amax(1, keepdim=True)
    sizes = _norms(error) * _norms(entered.detach())
    return Seen(dense, fired, active, sizes)


def _peaks(values: Tensor, axis: int) -> Tensor:
    """Return each unit's largest value over places, [records, units]."""
    return values.movedim(axis, 1).flatten(2).amax(2) if values.ndim > 2 else values  # noqa: PLR2004  # [records, units] already


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1).double(), dim=1)
    return norms
