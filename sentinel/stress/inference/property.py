"""Property: what one update says about its patients as a group, read by a shadow classifier.

The server simulates sites of its own: it draws cohorts with and without a property (most are
women, most are ill, they come from this hospital) from data that it has, trains each from the
global model that it sent, and fits a linear classifier from updates to the property. Then it reads
an update that a site released.

A property may show through the labels alone: the last bias's gradient counts them, and few
policies hide a count. So beside what the update tells stands what the share of each label tells.

References: Ganju et al., CCS 2018 (shadow classifiers for properties); Melis et al., S&P 2019,
arXiv 1805.04049 (properties from updates in federated learning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError
from sentinel.stress.inference.null import over_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sentinel.interval import Interval
    from sentinel.stress.inference.loop import Loop
    from sentinel.stress.inference.observed import Observed
    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance; one is chosen by leaving one out
_FLAGS = 2
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Cohorts:
    """Groups of patients, and the property of each.

    Attributes:
        data: all patients.
        groups: indices of those behind each update, [s, m].
        answers: the property's value, [s] int64, from 0.
    """

    data: Records
    groups: Tensor
    answers: Tensor

    def label_shares(self, classes: int) -> Tensor:
        """Share of each label in each group, [s, classes]: what counts alone tell."""
        return F.one_hot(self.data.labels[self.groups].long(), classes).double().mean(1)


def lopsided(  # noqa: PLR0913 - each names one thing that is drawn by
    data: Records, flags: Tensor, *, size: int, share: float, count: int, generator: torch.Generator
) -> Cohorts:
    """Draw groups of which `share`, or the rest of 1, have a flag.

    Args:
        data: all patients.
        flags: [n] bool.
        size: patients in a group.
        share: of a group with answer 1 that has the flag; 1 - share in a group with answer 0.
        count: groups; every second one has answer 1.
        generator: draws.

    Raises:
        MisuseError: too few patients with the flag, or without.
    """
    pools = [torch.nonzero(flags == bool(flag))[:, 0] for flag in range(_FLAGS)]
    answers = torch.arange(count) % _FLAGS
    groups = []
    for answer in answers.tolist():
        flagged = round(size * (share if answer else 1 - share))
        groups.append(
            torch.cat(
                [
                    _some(pool, wanted, generator)
                    for pool, wanted in zip(pools, (size - flagged, flagged), strict=True)
                ]
            )
        )
    return Cohorts(data, torch.stack(groups), answers)


def of_classes(
    data: Records, classes: Tensor, *, size: int, count: int, generator: torch.Generator
) -> Cohorts:
    """Draw groups that are all of one class, such as a hospital, each class as often.

    Args:
        data: all patients.
        classes: [n] int64, from 0; each with `size` patients or more.
        size: patients in a group.
        count: groups.
        generator: draws.

    Raises:
        MisuseError: a class with too few patients.
    """
    answers = torch.arange(count) % (int(classes.max()) + 1)
    groups = [
        _some(torch.nonzero(classes == answer)[:, 0], size, generator)
        for answer in answers.tolist()
    ]
    return Cohorts(data, torch.stack(groups), answers)


def simulated(loop: Loop, sent: State, cohorts: Cohorts, generator: torch.Generator) -> Tensor:
    """The update of each group, [s, D], trained from `sent` as a site would."""
    start = loop.flatten(sent)
    trained = [
        loop.flatten(loop.train(sent, cohorts.data.take(group), generator))
        for group in cohorts.groups
    ]
    return torch.stack(trained) - start


def read(shadows: Tensor, answers: Tensor, seen: Sequence[Observed]) -> Tensor:
    """Tell the property behind each of some released updates.

    Args:
        shadows: simulated updates, [s, D].
        answers: their properties, [s] int64.
        seen: what sites released from the same global model, under one treatment.

    Returns:
        The property that each is taken to have, [len(seen)] int64.

    Guarantees:
        The attacker is adaptive: it undoes clip and mask, and its classifier counts each value by
        how much noise is known to be in it.
    """
    factor = torch.stack([one.factor for one in seen]).clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.stack([one.values for one in seen]) / factor
    noise = (torch.stack([one.std for one in seen]) / factor).square().mean(0)
    return classify(shadows, answers, values, noise)


def classify(examples: Tensor, answers: Tensor, asked: Tensor, noise: Tensor) -> Tensor:
    """Ridge regression onto the classes, in closed form; the largest one wins.

    Beside the noise there is a ridge of its own, chosen by how well each example is told from the
    others.

    Args:
        examples: [s, D].
        answers: [s] int64, from 0.
        asked: [t, D].
        noise: variance of the noise on each value of `asked`, [D]; fitting without it and with
            this ridge is what fitting on noised examples comes to.

    Returns:
        [t] int64.

    Raises:
        MisuseError: one class only.
    """
    if int(answers.min()) == int(answers.max()):
        raise MisuseError("a classifier needs examples of two classes or more")
    mean = examples.double().mean(0)
    apart = examples.double() - mean
    fits = [_Fit.of(apart, answers, noise.double(), share) for share in _RIDGES]
    best = max(fits, key=lambda fit: fit.left_out)
    return best.told(asked.double() - mean)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A classifier: `scaled` examples [s, D], `weights` [s, classes], and its own test.

    Attributes:
        middle: share of each class, [classes].
        units: what a value is divided by, [D].
        left_out: share of the examples that are told right from the others.
    """

    scaled: Tensor
    weights: Tensor
    middle: Tensor
    units: Tensor
    left_out: float

    @classmethod
    def of(cls, apart: Tensor, answers: Tensor, noise: Tensor, share: float) -> _Fit:
        """Fit centred examples."""
        units = (noise + share * apart.square().mean().clamp_min(_TINY)).sqrt()
        scaled, targets = apart / units, F.one_hot(answers).double()
        middle = targets.mean(0)
        inverse = torch.linalg.inv(
            scaled @ scaled.T + len(apart) * torch.eye(len(apart), dtype=torch.float64)
        )
        weights = inverse @ (targets - middle)
        without = targets - weights / inverse.diagonal()[:, None]
        right = float((without.argmax(1) == answers).double().mean())
        return cls(scaled, weights, middle, units, right)

    def told(self, apart: Tensor) -> Tensor:
        """The class of each of some centred values [t, D], [t] int64."""
        scores = (apart / self.units) @ self.scaled.T @ self.weights + self.middle
        best: Tensor = scores.argmax(1)
        return best


@dataclass(frozen=True, slots=True)
class Told:
    """How often a property was told.

    Attributes:
        updates: that were read, over all splits.
        accuracy: mean share of right answers.
        interval: of `accuracy`, 95 %, Student's t over splits: updates of one split share patients.
        chance: share of the most frequent answer.
        counts: mean share of right answers from the labels' shares alone.
        beyond: 95 % interval of `accuracy` less `counts`, paired by split.
    """

    updates: int
    accuracy: float
    interval: Interval
    chance: float
    counts: float
    beyond: Interval


def told(read_: Tensor, counted: Tensor, answers: Tensor) -> Told:
    """Sum up over splits.

    Args:
        read_: what the updates were taken for, [splits, t].
        counted: what the labels' shares were taken for, [splits, t].
        answers: the truth, [splits, t].

    Raises:
        MisuseError: fewer than two splits.
    """
    if len(answers) < 2:  # noqa: PLR2004 - one has no spread
        raise MisuseError("an interval over splits needs two splits or more")
    right, by_counts = ((guess == answers).double().mean(1) for guess in (read_, counted))
    return Told(
        updates=answers.numel(),
        accuracy=float(right.mean()),
        interval=over_splits(right),
        chance=int(answers.flatten().bincount().max()) / answers.numel(),
        counts=float(by_counts.mean()),
        beyond=over_splits(right - by_counts),
    )


def _some(pool: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    if len(pool) < wanted:
        raise MisuseError("a group needs more patients of a kind than there are; ask for fewer")
    return pool[torch.randperm(len(pool), generator=generator)[:wanted]]
