"""Loop: a site's local training as its server knows it, and the part of each record in it.

The server wrote the training plan: it knows model, loss, learning rate, epochs and batch size. It
does not know the order of the batches, nor who is in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call, grad, vmap

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

_MOST_VALUES = 1 << 22  # of per-record gradients made at once: what stays in the cache is faster


@dataclass(frozen=True, slots=True)
class Loop:
    """Plain SGD over shuffled batches.

    Models that mix the records of a batch (BatchNorm in training mode) have no gradient of one
    record; torch.func refuses them.

    Attributes:
        model: the architecture; its own weights are not read, its mode is.
        loss: of answers and labels, the mean over a batch.
        rate: learning rate.
        epochs: passes over the records.
        batch: records per step; all of them where left out, which makes one epoch FedSGD.
        before: called before each step and each piece of gradients; what it raises ends the work.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float
    epochs: int = 1
    batch: int | None = None
    before: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """Refuse a training of nothing."""
        if self.epochs < 1 or (self.batch is not None and self.batch < 1):
            raise MisuseError("a loop needs at least one epoch, and batches of at least one record")

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order in which updates are laid out."""
        return tuple(name for name, _ in self.model.named_parameters())

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Lay parameters, or changes of them, out as [D]."""
        return torch.cat([values[name].detach().flatten() for name in self.names])

    def moved(self, sent: State, update: Tensor) -> State:
        """The state that an update [D] leads to."""
        sizes = [sent[name].numel() for name in self.names]
        parts = zip(self.names, torch.split(update, sizes), strict=True)
        return {**sent, **{name: sent[name] + part.view_as(sent[name]) for name, part in parts}}

    def path(self, sent: State, data: Records, order: torch.Generator) -> list[State]:
        """Train from `sent`; the states before each step, and the last one."""
        states = [sent]
        for _ in range(self.epochs):
            shuffled = torch.randperm(len(data), generator=order)
            for chosen in torch.split(shuffled, self.batch or len(data)):
                self._pause()
                states.append(self._stepped(states[-1], data.take(chosen)))
        return states

    def train(self, sent: State, data: Records, order: torch.Generator) -> State:
        """The state after training."""
        return self.path(sent, data, order)[-1]

    def losses(self, state: State, data: Records) -> Tensor:
        """The loss of each record, [n] float64."""

        def one(record: Tensor, label: Tensor) -> Tensor:
            return self._loss(state, {}, record[None], label[None])

        with torch.no_grad():
            found: Tensor = vmap(one)(data.inputs, data.labels)
        return found.double()

    def gradients(self, state: State, data: Records) -> Tensor:
        """The gradient of each record's loss, [n, D]."""
        per_record = vmap(grad(self._of_one), in_dims=(None, None, 0, 0))
        parameters = self._parameters(state)
        width = sum(value.numel() for value in parameters.values())
        parts = []
        for first in range(0, len(data), max(1, _MOST_VALUES // width)):
            self._pause()
            some = slice(first, first + max(1, _MOST_VALUES // width))
            found = per_record(parameters, state, data.inputs[some], data.labels[some])
            parts.append(torch.cat([found[name].flatten(1) for name in self.names], 1))
        return torch.cat(parts)

    def influences(self, states: Sequence[State], data: Records, cohort: int) -> Tensor:
        """What each record would add to the update of a cohort that it is in, to first order.

        Args:
            states: on the way of the training; the gradients are averaged over them.
            data: the records.
            cohort: how many records are trained on.

        Returns:
            [n, D]. Exact for FedSGD; for FedAvg the record's effect on later steps is left out.
        """
        mean = torch.stack([self.gradients(state, data) for state in states]).mean(0)
        steps = self.epochs / min(self.batch or cohort, cohort)
        return mean.mul_(-self.rate * steps)

    def _pause(self) -> None:
        if self.before is not None:
            self.before()

    def _stepped(self, now: State, batch: Records) -> State:
        leaves = {name: now[name].detach().requires_grad_() for name in self.names}
        loss = self._loss(leaves, now, batch.inputs, batch.labels)
        steps = zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
        return {**now, **{name: now[name] - self.rate * step for name, step in steps}}

    def _parameters(self, state: State) -> State:
        return {name: state[name] for name in self.names}

    def _loss(self, parameters: State, state: State, inputs: Tensor, labels: Tensor) -> Tensor:
        answers = functional_call(self.model, {**state, **parameters}, (inputs,))
        return self.loss(answers, labels)

    def _of_one(self, parameters: State, state: State, record: Tensor, label: Tensor) -> Tensor:
        return self._loss(parameters, state, record[None], label[None])


def midway(states: Sequence[State], points: int) -> list[State]:
    """So many of the states before a step, evenly spread; all where there are fewer."""
    steps = len(states) - 1
    points = min(points, steps)
    return [states[int((number + 0.5) * steps / points)] for number in range(points)]
