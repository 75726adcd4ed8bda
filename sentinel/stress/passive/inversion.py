"""Inverting Gradients: pictures whose simulated update points the way the seen update points.

Minimises 1 - cosine + weight x total variation by Adam on the gradient's signs, from random
pictures, with restarts; the restart with the lowest objective is kept. A final blur takes out what
noise leaves. Needs no prior; with little noise and few pictures it is the sharper attacker.

Reference: Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020 (arXiv:2003.14053).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.stress.ssim import gaussian_window

if TYPE_CHECKING:
    from collections.abc import Callable

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


@dataclass(frozen=True, slots=True)
class Matched:
    """What one search found.

    Attributes:
        pictures: [N, channels, H, W], pixels from 0 to 1.
        labels: classes [N], or whatever else the training was given.
        objective: at the last step; lower fits better. What restarts are chosen by.
    """

    pictures: Tensor
    labels: Tensor
    objective: float


def match_direction(
    training: LocalTraining,
    seen: Seen,
    search: Matching,
    size: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """Reconstruct the pictures behind an update.

    Args:
        training: how the site trained, labels included.
        seen: the update.
        search: settings.
        size: height and width of the pictures; before them the channels, where there are more
            than one.
        generator: of the random starts; the only randomness.

    Returns:
        [N, 1, H, W], pixels from 0 to 1, in the order of the labels as far as the update tells.
    """
    shape = picture_shape(len(training.labels), size)
    found = (
        search_once(training, seen, search, torch.rand(shape, generator=generator))
        for _ in range(search.restarts)
    )
    best = min(found, key=lambda result: result.objective)
    return blur(best.pictures, search.smoothing)


def match_jointly(  # noqa: PLR0913, PLR0917 - the attack's inputs, and the number of classes
    training: LocalTraining,
    seen: Seen,
    search: Matching,
    size: tuple[int, ...],
    classes: int,
    generator: torch.Generator,
) -> Matched:
    """Reconstruct pictures and labels together: soft labels are searched as the pictures are.

    Args:
        training: how the site trained; of its labels only their number is used, and its loss must
            take probabilities [N, classes], as the cross entropy does.
        seen: the update.
        search: settings.
        size: as for `match_direction`.
        classes: of the model.
        generator: of the random starts; the only randomness.
    """
    count = len(training.labels)
    shape = picture_shape(count, size)
    found = []
    for _ in range(search.restarts):
        logits = torch.randn((count, classes), generator=generator)
        start = torch.rand(shape, generator=generator)
        found.append(search_once(training, seen, search, start, logits=logits))
    best = min(found, key=lambda result: result.objective)
    return replace(best, pictures=blur(best.pictures, search.smoothing))


def search_once(  # noqa: PLR0913 - the attack's inputs, and what callers add to the search
    training: LocalTraining,
    seen: Seen,
    search: Matching,
    start: Tensor,
    *,
    logits: Tensor | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> Matched:
    """One search, without the blur.

    Args:
        training: how the site trained.
        seen: the update.
        search: settings; restarts are the caller's.
        start: [N, channels, H, W].
        logits: [N, classes] of soft labels that take the place of the training's; None keeps those.
        penalty: of pictures [N, ...], added to the objective.
    """
    pictures = start.clone().requires_grad_()
    soft = None if logits is None else logits.clone().requires_grad_()
    varied = [pictures] if soft is None else [pictures, soft]
    adam = torch.optim.Adam(varied, lr=search.step)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, search.iterations)
    objective, size = torch.zeros(()), seen.values.square().sum()
    for _ in range(search.iterations):
        assumed = training if soft is None else replace(training, labels=soft.softmax(dim=1))
        # The scale of the clip drops out of a cosine; its mask does not.
        simulated = seen.sanitize(assumed.update(pictures))
        objective = 1 - F.cosine_similarity(simulated, seen.values, dim=0)
        if soft is not None:  # a cosine of two classes does not move with the label but at a jump
            objective = objective + (simulated - seen.values).square().sum() / size
        objective = objective + search.total_variation * total_variation(pictures)
        if penalty is not None:
            objective = objective + penalty(pictures)
        for leaf, slope in zip(varied, torch.autograd.grad(objective, varied), strict=True):
            leaf.grad = slope.sign()
        adam.step()
        decay.step()
        with torch.no_grad():
            pictures.clamp_(0.0, 1.0)
    labels = training.labels if soft is None else soft.detach().argmax(dim=1)
    return Matched(pictures.detach(), labels, float(objective.detach()))


def picture_shape(count: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of so many pictures; one channel where the size names none."""
    height_and_width = 2
    return (count, 1, *size) if len(size) == height_and_width else (count, *size)


def total_variation(pictures: Tensor) -> Tensor:
    """Mean absolute difference of vertical and of horizontal neighbours, added."""
    vertical = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()
    return vertical + (pictures[..., 1:] - pictures[..., :-1]).abs().mean()


def blur(pictures: Tensor, spread: float) -> Tensor:
    """Gaussian blur of [N, C, H, W]; the border is repeated outwards; spread 0 changes nothing."""
    if spread == 0.0:
        return pictures
    reach = max(1, round(3 * spread))
    window = gaussian_window(2 * reach + 1, spread).to(pictures)
    padded = F.pad(pictures, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[:, None]
    rows = F.conv2d(padded, window[None, None, None, :])
    return F.conv2d(rows, window[None, None, :, None]).view(pictures.shape)
