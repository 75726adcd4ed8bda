"""Observed: one released update as its server sees it, with all that it knows of the treatment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sentinel.release import Decided
    from sentinel.stress.inference.loop import Loop
    from sentinel.stress.layers import State


@dataclass(frozen=True, slots=True)
class Observed:
    """What a server has of one round of one site.

    Attributes:
        sent: the global state.
        released: the update as it came, [D].
        values: the same with the mask's rescaling undone, [D]: factor x update + noise where
            `kept`, 0 elsewhere.
        factor: what the clip multiplied every value by, [D]. One unknown number for each norm
            bound in the field, which a server would find by search; given here.
        std: standard deviation of the noise on each value, [D].
        kept: [D] bool; withheld and masked values are False.
    """

    sent: State
    released: Tensor
    values: Tensor
    factor: Tensor
    std: Tensor
    kept: Tensor


def raw(loop: Loop, sent: State, local: Mapping[str, Tensor]) -> Observed:
    """An update that leaves as it is."""
    values = loop.flatten(local) - loop.flatten(sent)
    every = torch.ones_like(values)
    return Observed(sent, values, values, every, torch.zeros_like(values), every.bool())


def sanitized(
    loop: Loop, sent: State, delta: Mapping[str, Tensor], decided: Decided | None
) -> Observed:
    """An update that a guard released.

    Args:
        loop: how the site trains.
        sent: the global state.
        delta: what `Round.release(kind="delta")` gave.
        decided: `Round.decided`: clip, noise and mask of each tensor, all told to the attacker.

    Raises:
        MisuseError: a replay, of which nothing is known; or a bound on single values.
    """
    if decided is None:
        raise MisuseError("this round was released before; nothing is known of its treatment")
    recipes = decided.done.recipes
    if any(recipe.max_abs != float("inf") for recipe in recipes.values()):
        raise MisuseError("the attacker does not know policies with max_abs; leave it out")
    released = loop.flatten(delta)
    factor, std, keep = (
        loop.flatten(
            {
                name: torch.full_like(
                    delta[name], getattr(recipes[name], figure) if name in recipes else 0.0
                )
                for name in loop.names
            }
        )
        for figure in ("factor", "std", "keep")
    )
    kept = (keep == 1.0) | ((keep > 0.0) & (released != 0.0))  # exact zeros give the mask away
    return Observed(sent, released, released * keep, factor, std, kept)
