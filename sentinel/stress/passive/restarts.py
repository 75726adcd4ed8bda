"""Many searches at once: one replay of the local training that carries a whole ensemble of guesses.

Nets on tables are so small that an attacker's time goes into calls, not arithmetic; so all restarts
share each call. Every restart has its own copy of the parameters, and they do not touch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.func import vmap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from sentinel.stress.passive.local_training import LocalTraining, Seen

FINAL_STEP = 0.02  # of the first step of a descent, at its end


@dataclass(frozen=True, slots=True)
class Restarts:
    """The same local training under many guesses.

    Attributes:
        training: one of them. A net whose layers mix records or draw random numbers (BatchNorm in
            train mode, dropout) cannot be replayed like this; torch says so.
        count: how many.
    """

    training: LocalTraining
    count: int

    def updates(self, inputs: Tensor) -> Tensor:
        """[count, N, ...] to what each would have left, [count, D]; differentiable."""
        one = self.training
        stacked = {
            name: value.expand(self.count, *value.shape) for name, value in one.global_state.items()
        }
        together = replace(one, global_state=stacked, forward=self._forward, loss=self._loss)
        flat = together.update(inputs.transpose(0, 1))
        sizes = [stacked[name].numel() for name in one.names]
        parts = torch.split(flat, sizes)
        return torch.cat([part.view(self.count, -1) for part in parts], dim=1)

    def _forward(
        self, model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor
    ) -> Tensor:
        def one(own: dict[str, Tensor], mine: Tensor) -> Tensor:
            return self.training.forward(model, own, mine)

        return vmap(one)(dict(parameters), inputs.transpose(0, 1))

    def _loss(self, answers: Tensor, labels: Tensor) -> Tensor:
        return vmap(self.training.loss, (0, None))(answers, labels).sum()


def misfits(simulated: Tensor, seen: Seen) -> Tensor:
    """How far each simulated update [count, D] is from the seen one, [count].

    Half the squared distance by the noise's variance, where there is noise: minus the log of the
    likelihood. Without noise, the squared distance by the squared norm, plus 1 - cosine.
    """
    treated = seen.sanitize(simulated)
    apart = (treated - seen.values).square().sum(-1)
    if seen.error_std > 0.0:
        return apart / (2 * seen.error_std**2)
    cosine = torch.nn.functional.cosine_similarity(treated, seen.values[None], dim=-1)
    return apart / seen.values.square().sum().clamp_min(1e-30) + 1 - cosine


def descend(
    objective: Callable[[Tensor], Tensor], start: Tensor, iterations: int, step: float
) -> tuple[Tensor, Tensor]:
    """Lower an objective of every restart by Adam.

    Args:
        objective: [count, ...] to [count]; each restart's own.
        start: [count, ...].
        iterations: steps of Adam.
        step: size of the first; they shrink as a cosine.

    Returns:
        Where each restart was at its lowest, [count, ...], and how low that was, [count].
    """
    guesses = start.clone().requires_grad_()
    adam = torch.optim.Adam([guesses], lr=step)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations, step * FINAL_STEP)
    best, lowest = start.clone(), torch.full((len(start),), torch.inf)
    for _ in range(iterations):
        values = objective(guesses)
        (guesses.grad,) = torch.autograd.grad(values.sum(), guesses)
        with torch.no_grad():
            lower = values < lowest
            lowest = torch.where(lower, values.detach(), lowest)
            best[lower] = guesses.detach()[lower]
        adam.step()
        decay.step()
    return best, lowest
