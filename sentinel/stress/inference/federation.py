"""A federation whose server keeps everything that it sees: global models and released updates.

With a policy every update goes through a guard of its own hospital, as it would in the field.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.errors import Withheld
from sentinel.guard import Guard
from sentinel.stress.inference.observed import Observed, raw, sanitized
from sentinel.stress.servers.federation import FedAvgServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.inference.loop import Loop
    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

_FEDERATION = "inference"


@dataclass(frozen=True, slots=True)
class Site:
    """A hospital: everybody whom its server suspects, and who of them it trains on.

    Attributes:
        data: candidates, members and others.
        members: [n] bool.
    """

    data: Records
    members: Tensor

    @property
    def train(self) -> Records:
        """The members."""
        return self.data.take(self.members)


@dataclass(frozen=True, slots=True)
class Watched:
    """What the server of a whole federation has.

    Attributes:
        seen: what each site released, round by round.
        withheld: rounds in which a site released nothing.
        final: the global state at the end.
    """

    seen: Mapping[str, list[Observed]]
    withheld: int
    final: State


class Doors:
    """One guard for each hospital, or none."""

    def __init__(
        self, sites: Mapping[str, Site], home: Path, policy: str | Path | LoadedPolicy | None
    ) -> None:
        """Open the guards.

        Args:
            sites: by name.
            home: parent of the guards' state folders; not used without a policy. What it holds of
                the model's architecture serves the next federation too.
            policy: of all hospitals; None for updates that leave as they are.
        """
        self._home, self._policy = home, policy
        self._names = tuple(sites)

    def open(self, run: str) -> dict[str, Guard | None]:
        """The guards of one job."""
        return {name: self._guard(name, run) for name in self._names}

    def _guard(self, name: str, run: str) -> Guard | None:
        if self._policy is None:
            return None
        return Guard(
            self._policy,
            self._home / name,
            federation=_FEDERATION,
            run=run,
            alerts=io.StringIO(),  # what is withheld is counted
        )


def federate(  # noqa: PLR0913 - each names one thing that a federation has
    loop: Loop,
    start: State,
    sites: Mapping[str, Site],
    guards: Mapping[str, Guard | None],
    *,
    rounds: int,
    order: torch.Generator,
) -> Watched:
    """Run federated averaging, weighted by how many records a site trains on.

    Args:
        loop: how all sites train.
        start: the first global state; its entries are the model's.
        sites: by name.
        guards: by the same names; None for a site that is bare.
        rounds: how many.
        order: of the batches.
    """
    server = FedAvgServer(start)
    weights = {name: float(site.members.sum()) for name, site in sites.items()}
    seen: dict[str, list[Observed]] = {name: [] for name in sites}
    withheld = 0
    for number in range(rounds):
        states = {}
        for name, site in sites.items():
            sent = server.global_state(number)
            one = _hand_over(loop, sent, site, guards[name], number, order)
            if one is None:
                withheld += 1
                continue
            seen[name].append(one)
            states[name] = loop.moved(sent, one.released)
        server.aggregate(number, states, weights)
    return Watched(seen, withheld, server.global_state(rounds))


def _hand_over(  # noqa: PLR0913, PLR0917 - private; a round's parts
    loop: Loop, sent: State, site: Site, guard: Guard | None, number: int, order: torch.Generator
) -> Observed | None:
    """One round at one site; None where it releases nothing."""
    if guard is None:
        return raw(loop, sent, loop.train(sent, site.train, order))
    try:
        rnd = guard.round(number, sent, loop.model, patients=len(site.train))
        with rnd:
            loop.model.load_state_dict(loop.train(sent, site.train, order))
        return sanitized(loop, sent, rnd.release(kind="delta"), rnd.decided)
    except Withheld:
        return None
