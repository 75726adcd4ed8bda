"""Rows out of an update of any small net: categories as softmax, and an ensemble of searches.

Each category is searched as a softmax over its levels, each continuous column as a z-score. Without
noise the simulated update is turned to point where the seen one points; with noise, the most likely
rows under noise and marginals are searched. A rectifier's derivative is a step, which no gradient
sees through, so it is first searched with soft ones, in place of the ReLU, that get harder. All
restarts run at once; the rows of the better half are matched to those of the best, and pooled:
mean softmax of a category, median of a continuous column. What the pool agrees on is likely to be
right, so its entropy is the attacker's own measure of confidence.

Reference: Vero, Balunovic, Dimitrov, Vechev, ICML 2023 (arXiv:2210.01785).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from sentinel.stress.passive.restarts import Restarts, descend, misfits

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.passive.columns import Table
    from sentinel.stress.passive.local_training import LocalTraining, Seen


@dataclass(frozen=True, slots=True)
class Relaxation:
    """How the attacker searches.

    Attributes:
        restarts: searches from independent random rows.
        iterations: Adam steps for each hardness.
        step: size of the first Adam step.
        hardness: of the soft rectifiers, one after the other; the true net comes last.
    """

    restarts: int = 8
    iterations: int = 500
    step: float = 0.06
    hardness: tuple[float, ...] = (5.0, 20.0, 80.0)


@dataclass(frozen=True, slots=True)
class Pool:
    """What an ensemble of searches says.

    Attributes:
        rows: [N, features], pooled; every category at one of its levels.
        best: [N, features], of the restart that explains the update best.
        doubt: [N, columns] from 0 to 1: entropy of a category's pooled shares by its largest
            value, or the pool's standard deviation of a continuous column by the population's.
        misfit: of the best restart.
    """

    rows: Tensor
    best: Tensor
    doubt: Tensor
    misfit: float


def relax(
    training: LocalTraining,
    seen: Seen,
    table: Table,
    search: Relaxation,
    generator: torch.Generator,
) -> Pool:
    """Reconstruct the rows behind an update.

    Args:
        training: how the site trained, labels included.
        seen: the update, with the figures of its sanitizer.
        table: what is known of the columns.
        search: settings.
        generator: of the random starts; the only randomness.
    """
    latents = table.start((search.restarts, len(training.labels)), generator)
    lowest = latents.new_zeros(search.restarts)
    stages = [softened(training, hardness) for hardness in search.hardness]
    for stage in (*stages, training):
        replay = Restarts(stage, search.restarts)

        def objective(guess: Tensor, replay: Restarts = replay) -> Tensor:
            found = misfits(replay.updates(table.soften(guess)), seen)
            return found + table.surprise(guess).sum(-1) if seen.error_std > 0.0 else found

        latents, lowest = descend(objective, latents, search.iterations, search.step)
    return pooled(latents, lowest, table)


def softened(training: LocalTraining, hardness: float) -> LocalTraining:
    """The same training of a net with Softplus(hardness) in place of every ReLU module."""
    twin = copy.deepcopy(training.model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta=hardness))
    return replace(training, model=twin)


def pooled(latents: Tensor, misfit: Tensor, table: Table) -> Pool:
    """Pool the better half of an ensemble.

    Args:
        latents: [restarts, N, latents].
        misfit: [restarts], the lower the better.
        table: of the columns.
    """
    order = misfit.argsort()[: (len(misfit) + 1) // 2]
    leader = table.soften(latents[order[0]])
    aligned = torch.stack([_aligned(latents[one], leader, table) for one in order])
    rows, doubt = [], []
    parts = torch.split(aligned, [column.latents for column in table.columns], dim=-1)
    for column, part in zip(table.columns, parts, strict=True):
        if column.continuous:
            rows.append(column.soften(part.median(0).values))
            doubt.append(part[..., 0].std(0, correction=0).clamp_max(1.0))
        else:
            shares = part.softmax(-1).mean(0)
            rows.append(column.levels[shares.argmax(-1)])
            doubt.append(_entropy(shares))
    found = torch.cat(rows, dim=1)
    return Pool(found, table.snapped(leader), torch.stack(doubt, 1), float(misfit.min()))


def _aligned(latents: Tensor, leader: Tensor, table: Table) -> Tensor:
    """One restart's [N, latents] in the order of the rows that lie nearest to the leader's."""
    cost = table.distances(leader, table.soften(latents))
    _, places = linear_sum_assignment(cost.numpy())
    return latents[torch.as_tensor(places)]


def _entropy(shares: Tensor) -> Tensor:
    """[..., K] to its entropy by that of K equal shares; a column of one level has none."""
    levels = shares.shape[-1]
    if levels == 1:
        return shares.new_zeros(shares.shape[:-1])
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy / math.log(levels)
