"""FedAvg: pictures behind an update of several local steps and epochs, their order unknown.

The attacker replays the site's training with batches that it draws itself. A record meets other
weights in each epoch, and which batch it is in is not known, so every epoch gets pictures of its
own; a prior that knows no order ties them: the mean picture of a class is the same in each epoch.
In the end the epochs' pictures are matched within their classes and averaged.

Reference: Dimitrov, Balunovic, Konstantinov, Vechev, TMLR 2022 (arXiv:2206.12395).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment

from sentinel.stress.passive.estimate import most_likely
from sentinel.stress.passive.inversion import (
    Matched,
    Matching,
    blur,
    picture_shape,
    search_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sentinel.stress.passive.estimate import Estimation
    from sentinel.stress.passive.local_training import LocalTraining, Seen
    from sentinel.stress.passive.prior import ImagePrior


@dataclass(frozen=True, slots=True)
class LocalLoop:
    """How a site goes through its records between two updates.

    Attributes:
        epochs: passes over all records, each in an order of its own.
        batch: records per step; the last of an epoch may have fewer.
    """

    epochs: int
    batch: int

    def batches(self, records: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Indices of the records of each step, in an order that is drawn."""
        return tuple(
            step
            for _ in range(self.epochs)
            for step in self.steps(torch.randperm(records, generator=generator))
        )

    def steps(self, order: Tensor) -> list[Tensor]:
        """One epoch, cut into batches."""
        return [order[first : first + self.batch] for first in range(0, len(order), self.batch)]


@dataclass(frozen=True, slots=True)
class Simulation:
    """How the attacker searches.

    Attributes:
        matching: settings of each search; restarts draw pictures and order anew.
        tie: weight of the order-invariant prior over the epochs.
    """

    matching: Matching = field(default_factory=lambda: Matching(iterations=400))
    tie: float = 1.0


def match_loop(  # noqa: PLR0913, PLR0917 - the attack's inputs, and the loop that it simulates
    training: LocalTraining,
    seen: Seen,
    loop: LocalLoop,
    search: Simulation,
    size: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """Reconstruct the pictures behind an update of several steps.

    Args:
        training: how the site trained. Its batches are not read: the attacker does not know them.
        seen: the update.
        loop: epochs and batch size, which a server prescribes.
        search: settings.
        size: height and width of the pictures, before them the channels where there are several.
        generator: of starts and orders; the only randomness.

    Returns:
        [N, 1, H, W], pixels from 0 to 1; a class's pictures come in no particular order.
    """
    count = len(training.labels)
    found = []
    for _ in range(search.matching.restarts):
        replayed = unrolled(training, loop, generator)
        # All epochs start from the same pictures, so that matching them later is easier.
        start = torch.rand(picture_shape(count, size), generator=generator)
        start = start.repeat(loop.epochs, *[1] * (start.ndim - 1))
        penalty = _tied(training.labels, loop.epochs, search.tie)
        found.append(search_once(replayed, seen, search.matching, start, penalty=penalty))
    best: Matched = min(found, key=lambda result: result.objective)
    epochs = best.pictures.chunk(loop.epochs)
    return blur(_merged(epochs, training.labels), search.matching.smoothing)


def most_likely_loop(  # noqa: PLR0913, PLR0917 - the attack's inputs, and the loop that it simulates
    training: LocalTraining,
    seen: Seen,
    loop: LocalLoop,
    prior: ImagePrior,
    search: Estimation,
    generator: torch.Generator,
) -> Tensor:
    """The same by Gauss-Newton: a record is one picture in all epochs, in batches that are drawn.

    Surer than first-order search, since local steps bend the objective; what the wrong order
    spoils is taken for noise, so `least_noise` must not be too small. Arguments and result as for
    `match_loop`, with a prior that need not know any picture (`smooth_prior`).
    """
    order = loop.batches(len(training.labels), generator)
    return most_likely(replace(training, batches=order), seen, prior, search, generator)


def unrolled(training: LocalTraining, loop: LocalLoop, generator: torch.Generator) -> LocalTraining:
    """The training with a copy of every record for each epoch, in an order that is drawn.

    Its inputs are [epochs * N, ...], epoch after epoch. Each step has its share of every class as
    near as can be: of all orders that is the likeliest, and errs least from the others.
    """
    count = len(training.labels)
    batches = []
    for epoch in range(loop.epochs):
        order = _mixed(training.labels, generator)
        batches += [step + epoch * count for step in loop.steps(order)]
    labels = training.labels.repeat(loop.epochs)
    return replace(training, labels=labels, batches=tuple(batches))


def _mixed(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which every class is spread evenly."""
    place = torch.empty(len(labels))
    for own in _by_class(labels):
        shuffled = own[torch.randperm(len(own), generator=generator)]
        shift = torch.rand((), generator=generator)
        place[shuffled] = (torch.arange(len(own)) + shift) / len(own)
    return place.argsort()


def _tied(labels: Tensor, epochs: int, weight: float) -> Callable[[Tensor], Tensor] | None:
    """The order-invariant prior: how far each epoch's class means are from those of the first."""
    if epochs == 1 or weight == 0.0:
        return None
    groups = _by_class(labels)
    mean = torch.zeros((len(groups), len(labels)))
    for group, own in enumerate(groups):
        mean[group, own] = 1 / len(own)

    def penalty(pictures: Tensor) -> Tensor:
        by_epoch = mean @ pictures.view(epochs, len(labels), -1)  # [epochs, classes, pixels]
        return weight * (by_epoch - by_epoch.mean(dim=0)).square().mean()

    return penalty


def _merged(epochs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The mean over the epochs, whose pictures are first matched to the last epoch's by class."""
    last = epochs[-1]
    total = last.clone()
    for pictures in epochs[:-1]:
        for own in _by_class(labels):
            apart = torch.cdist(last[own].flatten(1), pictures[own].flatten(1))
            rows, columns = linear_sum_assignment(apart.numpy())
            total[own[torch.from_numpy(rows)]] += pictures[own[torch.from_numpy(columns)]]
    return total / len(epochs)


def _by_class(labels: Tensor) -> list[Tensor]:
    """Indices of the records of each class that occurs."""
    return [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
