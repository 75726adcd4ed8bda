"""Deep Leakage from Gradients: pictures, and labels, whose simulated update is the seen one.

Minimises the squared distance of the two updates by L-BFGS, from random pictures. Needs a net that
is smooth in its input (sigmoid rather than ReLU) and a raw update; where both hold it is exact to
the last digit, and where they do not it shows what a naive attacker gets. Labels are known,
recovered before, or searched as logits together with the pictures, as published.

References: Zhu, Liu, Han, NeurIPS 2019 (arXiv:1906.08935); Zhao, Mopuri, Bilen (iDLG,
arXiv:2001.02610).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.stress.passive.inversion import Matched, picture_shape, total_variation

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen


@dataclass(frozen=True, slots=True)
class Descent:
    """How the attacker searches.

    Attributes:
        iterations: L-BFGS steps of one restart.
        history: earlier steps that stand for the curvature.
        restarts: searches from independent starts; the one that fits best is kept.
        total_variation: weight beside a distance in units of the seen update's; 0 as published.
    """

    iterations: int = 150
    history: int = 100
    restarts: int = 3
    total_variation: float = 0.0


def match_distance(  # noqa: PLR0913 - the attack's inputs, and the number of classes
    training: LocalTraining,
    seen: Seen,
    search: Descent,
    size: tuple[int, ...],
    generator: torch.Generator,
    *,
    classes: int | None = None,
) -> Matched:
    """Reconstruct the pictures behind an update.

    Args:
        training: how the site trained, labels included; with `classes`, only their number counts.
        seen: the update; its clip's scale and its mask are simulated.
        search: settings.
        size: height and width of the pictures, before them the channels where there are several.
        generator: of the random starts; the only randomness.
        classes: of the model, where labels are searched too; the loss must take probabilities.

    Returns:
        Pictures clamped to 0 .. 1, labels, and the distance as a share of the seen norm, squared.
        A search that never left its start or ran to infinity loses to every other.
    """
    count = len(training.labels)
    found = []
    for _ in range(search.restarts):
        start = torch.rand(picture_shape(count, size), generator=generator)
        logits = None if classes is None else torch.randn((count, classes), generator=generator)
        found.append(_descend(training, seen, search, start, logits))
    return min(found, key=lambda result: result.objective)


def _descend(
    training: LocalTraining, seen: Seen, search: Descent, start: Tensor, logits: Tensor | None
) -> Matched:
    pictures = start.requires_grad_()
    varied = [pictures] if logits is None else [pictures, logits.requires_grad_()]
    size = seen.values.square().sum()
    lbfgs = torch.optim.LBFGS(
        varied,
        max_iter=search.iterations,
        max_eval=2 * search.iterations,
        history_size=search.history,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def distance() -> Tensor:
        assumed = training
        if logits is not None:
            assumed = replace(training, labels=logits.softmax(dim=1))
        misfit = (seen.sanitize(assumed.update(pictures)) - seen.values).square().sum() / size
        if search.total_variation:
            misfit = misfit + search.total_variation * total_variation(pictures)
        return misfit

    def closure() -> float:
        misfit = distance()
        for leaf, slope in zip(varied, torch.autograd.grad(misfit, varied), strict=True):
            leaf.grad = slope
        return float(misfit.detach())

    lbfgs.step(closure)  # type: ignore[no-untyped-call]  # a decorator of torch hides its types
    reached = float(distance().detach())
    labels = training.labels if logits is None else logits.detach().argmax(dim=1)
    inside = pictures.detach().nan_to_num(0.5).clamp(0.0, 1.0)
    return Matched(inside, labels, reached if math.isfinite(reached) else math.inf)
