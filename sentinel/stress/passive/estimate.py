"""The attacker with a prior: the most likely pictures, given the update, its noise, and the class.

With Gaussian noise of known size and a Gaussian prior, the most likely latents minimise
|seen - simulated|^2 / (2 std^2) + |latent|^2 / 2. Gauss-Newton takes the update as linear in the
latents around the present guess, where that minimum is a linear system; conjugate gradients solve
it with products alone. The noise is first taken for larger than it is, and lowered step by step, so
that the coarse features are settled before the fine ones. Against strong noise this beats every
first-order search: in the linear limit it is the best estimate there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen
    from sentinel.stress.passive.prior import ImagePrior

_HALVINGS = 4  # of a step that raises the objective, before it is given up


@dataclass(frozen=True, slots=True)
class Estimation:
    """How the attacker searches.

    Attributes:
        rounds: linearisations.
        products: conjugate-gradient steps in each.
        least_noise: noise assumed at least, as a ratio to the update's norm: for a raw update this
            is the error of the linear model, and damps it.
        first_noise: ratio assumed in the first round, falling by equal factors.
    """

    rounds: int = 3
    products: int = 25
    least_noise: float = 0.5
    first_noise: float = 3.0


def most_likely(  # noqa: PLR0913 - the attack's inputs, and where it starts
    training: LocalTraining,
    seen: Seen,
    prior: ImagePrior,
    search: Estimation,
    generator: torch.Generator,
    *,
    start: Tensor | None = None,
) -> Tensor:
    """Reconstruct the pictures behind an update.

    Args:
        training: how the site trained, labels included.
        seen: the update, with the figures of its sanitizer.
        prior: what public pictures say about each class.
        search: settings.
        generator: of the random start, which breaks the tie between pictures of one class.
        start: pictures [N, 1, H, W] to start from, such as a first-order search has found; random
            ones near the class mean where left out.

    Returns:
        [N, 1, H, W], pixels from 0 to 1; one class's pictures come in no particular order.
    """
    problem = _Problem(training, seen, prior)
    shape = (len(training.labels), prior.components)
    latent = 0.1 * torch.randn(shape, generator=generator)
    if start is not None:
        latent = prior.encode(start, training.labels)
    for std in _schedule(seen, search):
        latent = problem.linearised(latent, std, search.products)
    return prior.decode(latent, training.labels).clamp(0.0, 1.0)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, steps: int, tolerance: float = 1e-3
) -> Tensor:
    """Solve product(x) = right for a symmetric positive definite product.

    Args:
        product: x -> A x, shapes as `right`.
        right: any shape.
        steps: at most so many products.
        tolerance: relative residual at which to stop.
    """
    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = right.clone()
    size = residual.square().sum()
    enough = size * tolerance**2
    for _ in range(steps):
        if size <= enough:
            break
        image = product(direction)
        length = size / (direction * image).sum()
        solution += length * direction
        residual -= length * image
        previous, size = size, residual.square().sum()
        direction = residual + (size / previous) * direction
    return solution


def _schedule(seen: Seen, search: Estimation) -> list[float]:
    """Noise to assume in each round: from large to what it is."""
    unit = seen.signal_norm / math.sqrt(seen.values.numel())
    last = max(seen.error_std, search.least_noise * unit)
    first = max(last, search.first_noise * unit)
    steps = max(search.rounds - 2, 1)
    return [max(last, first * (last / first) ** (i / steps)) for i in range(search.rounds)]


@dataclass(frozen=True, slots=True)
class _Problem:
    """One update to be explained by latents [N, K]."""

    training: LocalTraining
    seen: Seen
    prior: ImagePrior

    def simulate(self, latent: Tensor) -> Tensor:
        """The update that these latents would have left, without noise, [D]."""
        pictures = self.prior.decode(latent, self.training.labels)
        return self.seen.sanitize(self.training.update(pictures))

    def objective(self, latent: Tensor, std: float) -> float:
        """Minus the log of the latents' posterior density, up to a constant."""
        misfit = (self.simulate(latent) - self.seen.values).square().sum() / (2 * std**2)
        return float((misfit + latent.square().sum() / 2).detach())

    def linearised(self, latent: Tensor, std: float, products: int) -> Tensor:
        """One linearisation: the step to its minimum, shortened until the objective falls."""
        latent = latent.detach().requires_grad_()
        simulated = self.simulate(latent)
        residual = (self.seen.values - simulated).detach()
        probe = torch.zeros_like(simulated, requires_grad=True)
        # J^T probe, as a function of the probe: its derivative along a vector is J vector.
        (pulled,) = torch.autograd.grad(simulated, latent, probe, create_graph=True)

        def curvature(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, probe, vector, retain_graph=True)
            (back,) = torch.autograd.grad(simulated, latent, pushed, retain_graph=True)
            return back / std**2 + vector

        (slope,) = torch.autograd.grad(simulated, latent, residual, retain_graph=True)
        start = latent.detach()
        step = conjugate_gradients(curvature, slope / std**2 - start, products)
        return self._shortened(start, step, std)

    def _shortened(self, start: Tensor, step: Tensor, std: float) -> Tensor:
        """Start + step, or half of it, and so on; the start where nothing helps."""
        before = self.objective(start, std)
        for halving in range(_HALVINGS):
            candidate = start + step * 0.5**halving
            if self.objective(candidate, std) < before:
                return candidate
        return start
