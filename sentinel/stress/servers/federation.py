"""Servers of a federation in one process: an honest one, and one that turns.

Both have the same two methods, so a hospital cannot tell which one it talks to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.layers import State, copied

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sentinel.stress.servers.crafting import Craft


class FedAvgServer:
    """An honest server: hands out one global model and averages what comes back.

    Reference: McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Start from a copy of `state`."""
        self._state = copied(state)

    def global_state(self, number: int) -> State:
        """Return a copy of the global model for round `number`."""
        del number
        return copied(self._state)

    def aggregate(
        self, number: int, states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
    ) -> None:
        """Take the weighted mean of the sites' states; without any, the model stays.

        Args:
            number: the round they belong to.
            states: local state by site, with the names of the global state.
            weights: public weight by site, any positive numbers.
        """
        del number
        if not states:
            return
        total = sum(weights[site] for site in states)
        for name, value in self._state.items():
            parts = [states[site][name] * (weights[site] / total) for site in states]
            value.copy_(torch.stack(parts).sum(0) if value.is_floating_point() else value)


class MaliciousServer(FedAvgServer):
    """A server that turns in one round: it hands out a crafted model and keeps what it gets.

    Before and after, it behaves as the honest one, from the model it had: the updates of the
    crafted round are read and thrown away.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        model: nn.Module,
        craft: Craft,
        *,
        turns_at: int,
        generator: torch.Generator,
    ) -> None:
        """Start honest.

        Args:
            state: the first global state.
            model: the architecture, for the crafting function.
            craft: the crafting function.
            turns_at: number of the round that is crafted.
            generator: the attacker's randomness.
        """
        super().__init__(state)
        self._model, self._craft, self._generator = model, craft, generator
        self.turns_at = turns_at
        self.crafted: State | None = None

    def global_state(self, number: int) -> State:
        """Return the crafted model in the round where the server turns, else the honest one."""
        honest = super().global_state(number)
        if number != self.turns_at:
            return honest
        if self.crafted is None:  # every client asks; all get the same
            self.crafted = self._craft(self._model, honest, generator=self._generator)
        return copied(self.crafted)

    def aggregate(
        self, number: int, states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
    ) -> None:
        """Average as the honest server does; what comes back of the crafted round is not used."""
        if number != self.turns_at:
            super().aggregate(number, states, weights)
