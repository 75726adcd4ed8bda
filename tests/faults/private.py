"""A training loop under a promise for each patient or record, as a life has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sentinel.errors import Withheld
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel import Guard
    from sentinel.round import Round
    from sentinel.update import State

START = {"weight": torch.zeros(2, 6), "bias": torch.zeros(2)}
RECORDS = 24  # two of each patient


class PrivateLoop:
    """A linear model on a few records that `shift` makes, trained with momentum."""

    def __init__(self, guard: Guard, shift: float) -> None:
        """Let the guard make it private."""
        self._guard = guard
        ids = [place // 2 for place in range(RECORDS)]
        values = torch.arange(RECORDS * 6.0).view(RECORDS, 6) / 100.0 + shift
        data = TensorDataset(values, torch.arange(RECORDS) % 2)
        model = nn.Linear(6, 2)
        self._model, self._optimizer, self._loader = guard.private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
            DataLoader(data, batch_size=RECORDS // 2),
            patients=ids if unit_of(guard) is Unit.PATIENT else None,
        )

    def release(
        self, number: int, epochs: int, say: Callable[..., None]
    ) -> tuple[State, Round, int]:
        """Train a round and release it; what left, its round, and the steps taken.

        The steps are told before anything of them can be charged.
        """
        try:
            with self._guard.round(number, START, self._model) as rnd:
                steps = self._train(epochs)
            say("took", number, steps)
            state = rnd.release()
        except Withheld:
            self._optimizer.state.clear()  # the steps behind this momentum may be uncharged
            raise
        if rnd.replayed:
            self._optimizer.state.clear()
        return state, rnd, steps

    def _train(self, epochs: int) -> int:
        steps = 0
        for _ in range(epochs):
            for values, labels in self._loader:
                self._optimizer.zero_grad()
                nn.functional.cross_entropy(self._model(values), labels).backward()
                self._optimizer.step()
                steps += 1
        return steps


def unit_of(guard: Guard) -> Unit | None:
    """Whom the guard's policy makes a promise to; None where it makes none."""
    privacy = guard.policy.policy.privacy
    return None if privacy is None else privacy.unit


def is_private(guard: Guard) -> bool:
    """Whether training has to be private under the guard's policy."""
    return unit_of(guard) in (Unit.PATIENT, Unit.RECORD)
