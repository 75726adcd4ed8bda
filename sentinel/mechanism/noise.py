"""Noise: Gaussian, on a grid, from an entropy argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from sentinel.chunks import chunks
from sentinel.crew import blocks, share_out
from sentinel.mechanism.recipe import Recipe, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sentinel.crew import Span
    from sentinel.mechanism.entropy import Entropy

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
    """
    if std <= 0.0:
        return
    flat = tensor.view(-1)

    def write(_: str, start: int, values: torch.Tensor) -> None:
        flat[start : start + values.numel()].copy_(values)

    treat_each({"": tensor}, {"": Recipe(std=std, step=step)}, entropy, write)


def treat_all_(
    tensors: Mapping[str, torch.Tensor], recipes: Mapping[str, Recipe], entropy: Entropy
) -> dict[str, float]:
    """Carry out a recipe on each tensor, in place and on all cores; the new sums of squares.

    Args:
        tensors: name -> contiguous, floating, any shape.
        recipes: one for each name.
        entropy: every block of values draws from a branch of its own.
    """

    def keep(name: str, start: int, values: torch.Tensor) -> torch.Tensor:
        flat = tensors[name].view(-1)[start : start + values.numel()]
        values.copy_(flat.copy_(values))  # as it was rounded
        return torch.dot(values, values)

    squares = dict.fromkeys(tensors, 0.0)
    for name, parts in treat_each(tensors, recipes, entropy, keep).items():
        squares[name] = float(torch.stack(parts).sum())
    return squares


def treat_each(
    tensors: Mapping[str, torch.Tensor],
    recipes: Mapping[str, Recipe],
    entropy: Entropy,
    take: Callable[[str, int, torch.Tensor], Taken],
) -> dict[str, list[Taken]]:
    """Carry out a recipe on each tensor, on all cores, and hand on what came out.

    Args:
        tensors: name -> contiguous, floating, any shape; read only.
        recipes: one for each name.
        entropy: every block of values draws from a branch of its own.
        take: called with a name, the place of the first value in the flattened tensor, and the
            values: float64, valid until it returns.

    Returns:
        What `take` returned, by name, in the order of the values.
    """
    work = [(block, entropy.branch()) for block in blocks(tensors)]

    def start() -> Callable[[tuple[list[Span], Entropy]], list[tuple[str, Taken]]]:
        workspaces = {tensor.device: Workspace(tensor.device) for tensor in tensors.values()}

        def treat(task: tuple[list[Span], Entropy]) -> list[tuple[str, Taken]]:
            spans, source = task
            for workspace in workspaces.values():
                workspace.begin(source, sum(span.stop - span.start for span in spans))
            done = []
            for span in spans:
                at = span.start
                for piece in chunks(span.of(tensors[span.name])):
                    values = workspaces[piece.device].treat(piece, recipes[span.name])
                    done.append((span.name, take(span.name, at, values)))
                    at += piece.numel()
            return done

        return treat

    taken: dict[str, list[Taken]] = {}
    for done in share_out(work, start):
        for name, entry in done:
            taken.setdefault(name, []).append(entry)
    return taken
