"""A site's local training as its attacker replays it: records in, update out, differentiable.

The attacker is given what it might only guess in the field: labels, order of the batches, learning
rate, and every figure of the sanitizer. Whatever resists it here resists less informed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


def plain(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The model's answer to the inputs as they are, with these parameters."""
    answer: Tensor = functional_call(model, dict(parameters), (inputs,))
    return answer


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server has: an update, and how it was treated.

    Attributes:
        values: [D], every parameter's change, in the order of `LocalTraining.names`.
        scale: factor by which the clip shrank the update. One unknown number in the field, which
            a server would find by search; given to the attacker here.
        noise_std: standard deviation of the noise on each coordinate.
        keep: share of the coordinates kept; the rest is exactly zero, and the kept are x 1/keep.
    """

    values: Tensor
    scale: float = 1.0
    noise_std: float = 0.0
    keep: float = 1.0

    def sanitize(self, update: Tensor) -> Tensor:
        """The same scale and mask on a simulated update [D], without noise; differentiable."""
        update = update * self.scale
        if self.keep < 1.0:  # exact zeros give the mask away
            update = update * (self.values != 0) / self.keep
        return update


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Plain SGD from the global state, one step for each batch.

    One batch of all records is FedSGD; several are FedAvg.

    Attributes:
        model: its architecture; its own weights are not read, its mode is.
        global_state: name -> tensor of every parameter, as the server sent them.
        labels: of the records behind the update; classes [N], or whatever else `loss` takes.
        batches: indices of the records of each step, in order.
        learning_rate: of each step.
        forward: how the model answers what the attacker varies: pictures, embeddings, soft
            categories.
        loss: of answers and labels, the mean over a batch.
    """

    model: nn.Module
    global_state: Mapping[str, Tensor]
    labels: Tensor
    batches: tuple[Tensor, ...]
    learning_rate: float
    forward: Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor] = plain
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order in which updates are laid out."""
        return tuple(name for name, _ in self.model.named_parameters())

    def update(self, inputs: Tensor, *, differentiable: bool = True) -> Tensor:
        """Train on inputs [N, ...]; return local - global, [D]."""
        start = {name: self.global_state[name].detach() for name in self.names}
        local = start
        for batch in self.batches:
            steps = self._gradient(local, inputs[batch], self.labels[batch], differentiable)
            local = {
                name: local[name] - self.learning_rate * step
                for name, step in zip(self.names, steps, strict=True)
            }
        change = torch.cat([(local[name] - start[name]).flatten() for name in self.names])
        return change if differentiable else change.detach()

    def flatten(self, delta: Mapping[str, Tensor]) -> Tensor:
        """Lay a released update (name -> change) out as [D].

        Raises:
            MisuseError: a parameter is missing.
        """
        missing = [name for name in self.names if name not in delta]
        if missing:
            msg = f"the update lacks {missing[0]!r}; it must hold every parameter of the model"
            raise MisuseError(msg)
        return torch.cat([delta[name].detach().flatten() for name in self.names])

    def _gradient(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        differentiable: bool,  # noqa: FBT001 - private, passed on
    ) -> tuple[Tensor, ...]:
        leaves = {
            name: value if value.requires_grad else value.clone().requires_grad_()
            for name, value in parameters.items()
        }
        loss = self.loss(self.forward(self.model, leaves, inputs), labels)
        return torch.autograd.grad(loss, list(leaves.values()), create_graph=differentiable)
