"""A site's local training as its attacker replays it: records in, update out, differentiable.

The attacker is given what it might only guess in the field: labels, order of the batches, learning
rate, and every figure of the sanitizer. Whatever resists it here resists less informed ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        hidden_mask: whether what was dropped cannot be told from what was kept, as where the
            server sees sums over sites. The attacker then reckons with what the mask leaves in
            the mean, which is the whole update.
    """

    values: Tensor
    scale: float = 1.0
    noise_std: float = 0.0
    keep: float = 1.0
    hidden_mask: bool = False

    @property
    def kept(self) -> Tensor:
        """[D], true where a coordinate says anything: exact zeros give a visible mask away."""
        if self.keep == 1.0 or self.hidden_mask:
            return torch.ones_like(self.values, dtype=torch.bool)
        return self.values != 0

    @property
    def signal_norm(self) -> float:
        """What of the norm of the values the noise does not explain; a tenth of it at least."""
        size = self.values.norm().item()
        noise = self.noise_std * math.sqrt(self.values.numel() / self.keep)
        return math.sqrt(max(size**2 - noise**2, (0.1 * size) ** 2))

    @property
    def error_std(self) -> float:
        """Standard deviation of a coordinate that says anything around its simulated value.

        Under a hidden mask the update itself is noise to the attacker: each coordinate is 0, or
        1/keep times what it was.
        """
        if not self.hidden_mask:
            return self.noise_std / self.keep
        dropped = (1.0 - self.keep) * self.signal_norm**2 / self.values.numel()
        return math.sqrt(self.noise_std**2 / self.keep + dropped)

    def sanitize(self, update: Tensor) -> Tensor:
        """The same scale and mask on a simulated update [D], without noise; differentiable."""
        update = update * self.scale
        if self.keep < 1.0 and not self.hidden_mask:
            update = update * self.kept / self.keep
        return update


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Plain SGD from the global state, one step for each batch.

    One batch of all records is FedSGD; several are FedAvg.

    Attributes:
        model: its architecture; its own weights are not read, its mode is: batch normalisation
            takes the batch's statistics in training mode, and the server's in evaluation mode.
            Dropout in training mode cannot be replayed: its masks are the site's own.
        global_state: name -> tensor of every parameter, as the server sent them. Buffers that are
            in it are used; others are the model's own. None is changed.
        labels: of the records behind the update; classes [N], or whatever else `loss` takes.
        batches: indices of the records of each step, in order.
        learning_rate: of each step.
        forward: how the model answers what the attacker varies: pictures, embeddings, soft
            categories. It is handed parameters and buffers by name.
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
        with sdpa_kernel(SDPBackend.MATH):  # the faster attentions cannot be derived twice
            loss = self.loss(self.forward(self.model, leaves | self._buffers(), inputs), labels)
        return torch.autograd.grad(loss, list(leaves.values()), create_graph=differentiable)

    def _buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers as the server sent them: a forward pass may write to them."""
        return {
            name: self.global_state.get(name, value).detach().clone()
            for name, value in self.model.named_buffers()
        }
