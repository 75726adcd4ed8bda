"""Servers of a federation in one process: an honest one, and one that turns.

Both have the same two methods, so a hospital cannot tell which one it talks to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, copied
from sentinel.stress.servers.craft import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sentinel.stress.servers.craft import Craft


class FedAvgServer:
    """An honest server: hands out one global model and averages what comes back.

    Reference: McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Start from a copy of `state`."""
        self._state = copied(state)

    def global_state(self, number: int, client: str | None = None) -> State:
        """Return a copy of the global model for round `number`, the same for every client."""
        del number, client
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
        self._state = self._mean(states, weights)

    def _mean(
        self, states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
    ) -> State:
        """Return the weighted mean of the floating entries; the others stay as they are."""
        total = sum(weights[site] for site in states)
        return {
            name: torch.stack([states[site][name] * (weights[site] / total) for site in states])
            .sum(0)
            .to(value.dtype)
            if value.is_floating_point()
            else value.clone()
            for name, value in self._state.items()
        }


class MaliciousServer(FedAvgServer):
    """A server that turns: in some rounds it hands out a crafted model and keeps what it gets.

    Before and after, it behaves as the honest one, from the model it had: the updates of a crafted
    round are read and thrown away. So rounds of a scan all start from the same model. A craft that
    learns, as `scan.Search`, is told the mean of what comes back.
    """

    def __init__(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
        self,
        state: Mapping[str, Tensor],
        model: nn.Module,
        craft: Craft | Sequence[Craft],
        *,
        turns_at: int,
        generator: torch.Generator,
        every: int | None = None,
        clients: Mapping[str, Craft] | None = None,
    ) -> None:
        """Start honest.

        Args:
            state: the first global state.
            model: the architecture, for the crafting function.
            craft: the crafting function; or several, one for each turn, and then from the first
                again.
            turns_at: number of the first round that is crafted.
            generator: the attacker's randomness.
            every: turn again after so many rounds; once only where left out.
            clients: what single clients get in place of `craft`, by name.

        Raises:
            MisuseError: no craft, or `every` is not positive.
        """
        super().__init__(state)
        self._crafts = tuple(craft) if isinstance(craft, Sequence) else (craft,)
        if not self._crafts or (every is not None and every < 1):
            msg = "a malicious server needs a craft, and `every` of at least 1 or left out"
            raise MisuseError(msg)
        self._model, self._generator = model, generator
        self._clients = dict(clients or {})
        self.turns_at, self._every = turns_at, every
        self._sent: dict[tuple[int, str | None], State] = {}
        self._made_by: dict[tuple[int, str | None], Craft] = {}
        self.crafted: State | None = None

    def turn(self, number: int) -> int | None:
        """Return how many crafted rounds lie before round `number`; none if that is honest."""
        since = number - self.turns_at
        if self._every is None:
            return 0 if since == 0 else None
        return since // self._every if since >= 0 and since % self._every == 0 else None

    def global_state(self, number: int, client: str | None = None) -> State:
        """Return the crafted model in a round where the server turns, else the honest one."""
        honest = super().global_state(number, client)
        turn = self.turn(number)
        if turn is None:
            return honest
        key = number, client if client in self._clients else None
        if key not in self._sent:  # every client asks; those of a kind get the same
            craft = self._crafts[turn % len(self._crafts)]
            if client is not None:
                craft = self._clients.get(client, craft)
            self._sent[key] = craft(self._model, honest, generator=self._generator)
            self._made_by[key] = craft
        self.crafted = self._sent[key]
        return copied(self.crafted)

    def aggregate(
        self, number: int, states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
    ) -> None:
        """Average as the honest server does; of a crafted round only its craft may learn."""
        if self.turn(number) is None:
            super().aggregate(number, states, weights)
            return
        for (made_in, client), craft in self._made_by.items():
            if made_in != number or not isinstance(craft, Learner):
                continue
            sites = [site for site in states if (site if site in self._clients else None) == client]
            if sites:
                craft.learn(self._mean({site: states[site] for site in sites}, weights))
