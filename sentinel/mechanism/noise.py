"""Noise: Gaussian, on a grid, from an entropy argument."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

import torch

from sentinel.crew import share_out
from sentinel.mechanism.recipe import Recipe, Workspace
from sentinel.memory import room
from sentinel.source import Held
from sentinel.spans import parted, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sentinel.mechanism.entropy import Entropy
    from sentinel.memory import Rooms
    from sentinel.source import Source
    from sentinel.spans import Span

Taken = TypeVar("Taken")


def add_noise_(tensor: torch.Tensor, std: float, step: float, entropy: Entropy) -> None:
    """Round `tensor` to multiples of `step` and add Gaussian noise, in place.

    Args:
        tensor: contiguous, floating, any shape.
        std: standard deviation of the noise per coordinate, in the units of the tensor; 2^10 to
            2^46 steps, or 0.
        step: the grid, a power of two; the norm bound must allow for the rounding.
        entropy: where the randomness comes from.

    Guarantees:
        Those of `Workspace`; the sum is rounded once to the dtype of the tensor. `std` 0 leaves the
        tensor as it is. The draws are as far from ideal ones as `slack` says.

    Edges:
        std of 0:                          the tensor stays as it is
        std below 0, or NaN:               ValueError; it stays as it is
        a step that is no power of two:    ValueError
        std under 2^10 or over 2^46 steps: ValueError
        a 0-d tensor:                      one draw
        an empty tensor:                   nothing is drawn
        float16 or bfloat16:               the noise of float64, rounded once with the value
        NaN or Inf among the values:       stays what it is; the others are noised
        a tensor that is not contiguous:   RuntimeError; it stays as it is
    """
    if std == 0.0:
        return
    flat = tensor.view(-1)

    def write(run: Sequence[Span], values: torch.Tensor) -> None:
        (span,) = run
        span.of(flat).copy_(values)

    treat_each(Held({"": tensor}), {"": Recipe(std=std, step=step)}, entropy, write)


def treat_all(
    source: Source, recipes: Mapping[str, Recipe], entropy: Entropy, rooms: Rooms = room
) -> tuple[Held, dict[str, float]]:
    """Carry out a recipe on each tensor, on all cores.

    Args:
        source: the tensors; read only.
        recipes: one for each name.
        entropy: every block of values draws from a branch of its own.
        rooms: where the memory for the results comes from.

    Returns:
        The results, in the dtypes of the source; and their sums of squares.

    Guarantees:
        Each result is what `Workspace` makes of the value, rounded once to its dtype, with a draw
        of its own. The source is not written to. The sums of squares are those of the rounded
        values.

    Edges:
        no tensors:                  nothing, and nothing is drawn
        a name without a recipe:     is not read, and not among the results
        an empty tensor:             an empty one, and a sum of 0
        a 0-d tensor:                one draw
        NaN or Inf among the values: stays what it is; that sum is not finite
    """
    made = {
        name: rooms(source.shapes[name], source.dtype(name), source.device(name))
        for name in source
        if name in recipes
    }

    def keep(run: Sequence[Span], values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        values.copy_(values.to(source.dtype(run[0].name)))  # as it is rounded
        found = []
        for span, part in zip(run, parted(values, run), strict=True):
            span.of(made[span.name].view(-1)).copy_(part)
            found.append((span.name, torch.dot(part, part)))
        return found

    squares = dict.fromkeys(made, 0.0)
    for found in treat_each(source, recipes, entropy, keep):
        for name, square in found:
            squares[name] += float(square)
    return Held(made), squares


def treat_each(
    source: Source,
    recipes: Mapping[str, Recipe],
    entropy: Entropy,
    take: Callable[[Sequence[Span], torch.Tensor], Taken],
) -> list[Taken]:
    """Carry out a recipe on each tensor, on all cores, and hand on what came out.

    Args:
        source: the tensors; read only.
        recipes: one for each name that is read.
        entropy: every block of values draws from a branch of its own.
        take: called with spans of tensors that have one recipe, dtype and device, and with their
            values one after the other: float64, valid until it returns.

    Returns:
        What `take` returned, in the order of the values.
    """
    work = [(block, entropy.branch()) for block in source.blocks(recipes)]
    most = max((size_of(spans) for spans, _ in work), default=0)

    def start() -> Callable[[tuple[list[Span], Entropy]], list[Taken]]:
        workspaces = {at: Workspace(at, most) for at in set(map(source.device, recipes))}

        def treat(task: tuple[list[Span], Entropy]) -> list[Taken]:
            spans, branch = task
            for workspace in workspaces.values():
                workspace.begin(branch, size_of(spans))
            return [
                take(run, workspaces[values.device].treat(values, recipes[run[0].name]))
                for run, values in source.runs(spans, recipes.__getitem__)
            ]

        return treat

    return list(itertools.chain.from_iterable(share_out(work, start)))
