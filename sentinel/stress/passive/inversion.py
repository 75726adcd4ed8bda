"""Inverting Gradients: pictures whose simulated update points the way the seen update points.

Minimises 1 - cosine + weight x total variation by Adam on the gradient's signs, from random
pictures, with restarts; the restart with the lowest objective is kept. A final blur takes out what
noise leaves. Needs no prior; with little noise and few pictures it is the sharper attacker.

Reference: Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020 (arXiv:2003.14053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.stress.ssim import gaussian_window

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen


@dataclass(frozen=True, slots=True)
class Matching:
    """How the attacker searches.

    Attributes:
        iterations: Adam steps of one restart.
        step: size of the first step, in units of the pixel range; decays to zero as a cosine.
        total_variation: weight of the mean absolute difference of neighbouring pixels.
        smoothing: standard deviation of the final blur, in pixels; 0 for none.
        restarts: searches from independent random pictures.
    """

    iterations: int = 600
    step: float = 0.1
    total_variation: float = 5e-3
    smoothing: float = 0.0
    restarts: int = 1


def match_direction(
    training: LocalTraining,
    seen: Seen,
    search: Matching,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Reconstruct the pictures behind an update.

    Args:
        training: how the site trained, labels included.
        seen: the update.
        search: settings.
        size: height and width of the pictures.
        generator: of the random starts; the only randomness.

    Returns:
        [N, 1, H, W], pixels from 0 to 1, in the order of the labels as far as the update tells.
    """
    shape = (len(training.labels), 1, *size)
    found = [
        _search(training, seen, search, torch.rand(shape, generator=generator))
        for _ in range(search.restarts)
    ]
    best = min(found, key=lambda result: result[0])[1]
    return blur(best, search.smoothing)


def total_variation(pictures: Tensor) -> Tensor:
    """Mean absolute difference of vertical and of horizontal neighbours, added."""
    vertical = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()
    return vertical + (pictures[..., 1:] - pictures[..., :-1]).abs().mean()


def blur(pictures: Tensor, spread: float) -> Tensor:
    """Gaussian blur of [N, 1, H, W]; the border is repeated outwards; spread 0 changes nothing."""
    if spread == 0.0:
        return pictures
    reach = max(1, round(3 * spread))
    window = gaussian_window(2 * reach + 1, spread).to(pictures)
    padded = F.pad(pictures, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, window[None, None, None, :]), window[None, None, :, None])


def _search(
    training: LocalTraining,
    seen: Seen,
    search: Matching,
    start: Tensor,
) -> tuple[float, Tensor]:
    """One restart: its last objective, and its pictures."""
    pictures = start.requires_grad_()
    adam = torch.optim.Adam([pictures], lr=search.step)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, search.iterations)
    objective = torch.zeros(())
    for _ in range(search.iterations):
        # The scale of the clip drops out of a cosine; its mask does not.
        simulated = seen.sanitize(training.update(pictures))
        objective = 1 - F.cosine_similarity(simulated, seen.values, dim=0)
        objective = objective + search.total_variation * total_variation(pictures)
        pictures.grad = torch.autograd.grad(objective, pictures)[0].sign()
        adam.step()
        decay.step()
        with torch.no_grad():
            pictures.clamp_(0.0, 1.0)
    return float(objective.detach()), pictures.detach()
