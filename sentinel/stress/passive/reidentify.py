"""Whose picture is it: matching reconstructions to pictures, and finding a picture among others.

Both are done with the truth at hand, which no attacker has, so both flatter the attacker:
assignment alone lifts the similarity of guesses that know nothing. The figure for an unrelated
update, matched the same way, says by how much.

A picture can also be found without any reconstruction, by an attacker who holds the candidates:
each one's own gradient is held against the update. That asks more of a defence than that nothing
can be rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.func import grad, vmap

from sentinel.errors import MisuseError
from sentinel.interval import Count
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen
    from sentinel.stress.passive.prior import ImagePrior

_LEAST_NOISE = 0.02  # of the update's norm: what first order misses of a raw update


@dataclass(frozen=True, slots=True)
class Found:
    """How many pictures came first among the decoys of their class.

    Attributes:
        count: pictures that came first, out of all.
        classes: for each class its pictures and its decoys, as counts.
    """

    count: Count
    classes: tuple[tuple[int, int], ...]

    @classmethod
    def pooled(cls, parts: Sequence[Found]) -> Found:
        """The same over several updates.

        Raises:
            MisuseError: there are none.
        """
        hits = sum(part.count.hits for part in parts)
        count = Count(hits, sum(part.count.trials for part in parts))
        return cls(count, tuple(pair for part in parts for pair in part.classes))

    @property
    def by_chance(self) -> float:
        """Probability that at least as many come first without any information.

        Exact, where pictures and decoys are drawn alike: they are then exchangeable, and the k best
        of n pictures and m decoys are all pictures in n (n-1) .. of (n+m) (n+m-1) .. orders. The
        pictures of a class share their decoys, so hits come in clumps; an interval for independent
        trials is too narrow here.
        """
        return sum(self._chances()[self.count.hits :])

    def chance_limit(self, confidence: float = 0.99) -> float:
        """Share that chance alone stays at or under, with the given probability."""
        total = 0.0
        for hits, chance in enumerate(self._chances()):
            total += chance
            if total >= confidence:
                return hits / self.count.trials
        return 1.0

    def _chances(self) -> list[float]:
        """Probability of 0, 1, ... hits in all classes together."""
        together = [1.0]
        for pictures, decoys in self.classes:
            reach = [1.0]  # of at least 0, 1, ... hits
            for hit in range(pictures):
                reach.append(reach[-1] * (pictures - hit) / (pictures + decoys - hit))
            exactly = [a - b for a, b in zip(reach, [*reach[1:], 0.0], strict=True)]
            together = np.convolve(together, exactly).tolist()
        return together


def match_within_class(guesses: Tensor, pictures: Tensor, labels: Tensor) -> Tensor:
    """Give each picture one guess of its class, so that the mean similarity is as high as can be.

    Args:
        guesses: [N, C, H, W], in any order within a class.
        pictures: [N, C, H, W], the truth.
        labels: [N], of both.

    Returns:
        [N, C, H, W]: the guesses, each in the place of its picture.
    """
    matched = guesses.clone()
    for label in set(labels.tolist()):
        own = (labels == label).nonzero().flatten()
        likeness = torch.stack([ssim(pictures[i : i + 1], guesses[own]) for i in own])
        rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
        matched[own[torch.from_numpy(rows)]] = guesses[own[torch.from_numpy(columns)]]
    return matched


def ranked_first(
    guesses: Tensor,
    pictures: Tensor,
    labels: Tensor,
    decoys: tuple[Tensor, ...],
    prior: ImagePrior,
) -> Found:
    """Count the pictures that suit the reconstructions better than every decoy does.

    Every candidate, the true picture and each decoy alike, is scored by the reconstruction of its
    class that suits it best (correlation of what sets both apart from the public class mean). So
    without any information the true picture comes first in exactly 1 case in 1 + decoys. Matching
    the truth alone, and showing the decoys only what the truth was matched with, calls every fifth
    picture found where the reconstructions hold nothing at all.

    Args:
        guesses: [N, C, H, W].
        pictures: [N, C, H, W], the truth.
        labels: [N], of both.
        decoys: for each class [M, C, H, W], pictures that are not behind the update.
        prior: gives the class means.

    Raises:
        MisuseError: a class of the labels has no decoys.
    """
    if int(labels.max()) >= len(decoys) or any(len(own) == 0 for own in decoys):
        msg = "every class needs decoys to find a picture among"
        raise MisuseError(msg)
    hits = 0
    classes = []
    for label in set(labels.tolist()):
        own = labels == label
        shapes = prior.deviations(guesses[own], label).T
        suits = (prior.deviations(pictures[own], label) @ shapes).amax(dim=1)
        rivals = (prior.deviations(decoys[label], label) @ shapes).max()
        hits += int((suits > rivals).sum())
        classes.append((len(suits), len(decoys[label])))
    return Found(Count(hits, len(labels)), tuple(classes))


@dataclass(frozen=True, slots=True)
class Recognition:
    """The attacker who holds candidates: a matched filter on their gradients.

    It takes the update for the sum of the records' own gradients, each unknown one drawn like the
    public pictures of its class, so that these are noise beside the guard's: the log likelihood
    ratio between this candidate and an unknown picture of its class. Exact to first order for one
    step on all records.

    Attributes:
        training: how the site trained, labels included; one step on all records.
        seen: the update.
        public: for each class of the model, [M, C, H, W].

    Raises:
        MisuseError: several steps, or a class without public pictures.
    """

    training: LocalTraining
    seen: Seen
    public: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Refuse what it has no first order for."""
        if len(self.training.batches) != 1 or any(len(own) == 0 for own in self.public):
            msg = "candidates are recognised in one step, with public pictures of every class"
            raise MisuseError(msg)

    def ratios(self, candidates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Log likelihood ratios [M] of candidates [M, C, H, W] of each class."""
        counts = self.training.labels.bincount(minlength=len(self.public)).tolist()
        known = [
            influences(self.training, self.seen, own, label)
            for label, own in enumerate(self.public)
        ]
        means = [own.mean(dim=0) for own in known]
        crowd = torch.cat(
            [
                (own - mean) * (count / len(own)) ** 0.5
                for own, mean, count in zip(known, means, counts, strict=True)
            ]
        )
        expected = torch.stack([mean * n for mean, n in zip(means, counts, strict=True)]).sum(0)
        rest = self.seen.values - expected
        least = _LEAST_NOISE * float(self.seen.values.norm()) / len(rest) ** 0.5
        variance = max(self.seen.error_std, least) ** 2
        gram = (crowd @ crowd.T).double()
        gram.diagonal().add_(variance)
        found = []
        for label, own in enumerate(candidates):
            apart = influences(self.training, self.seen, own, label) - means[label]
            # Woodbury: (variance + crowd^T crowd)^-1, on both sides at once.
            pushed = torch.linalg.solve(gram, (crowd @ apart.T).double()).to(apart)
            whitened = (apart - pushed.T @ crowd) / variance
            found.append(whitened @ rest - (whitened * apart).sum(1) / 2)
        return tuple(found)

    def first(self, pictures: Tensor, decoys: tuple[Tensor, ...]) -> Found:
        """Count the pictures [N, C, H, W] behind the update that come before every decoy."""
        labels = self.training.labels
        own = tuple(pictures[labels == label] for label in range(len(decoys)))
        ratios = self.ratios(tuple(torch.cat(both) for both in zip(own, decoys, strict=True)))
        hits, classes = 0, []
        for mine, found in zip(own, ratios, strict=True):
            if len(mine):
                hits += int((found[: len(mine)] > found[len(mine) :].max()).sum())
                classes.append((len(mine), len(found) - len(mine)))
        return Found(Count(hits, len(labels)), tuple(classes))


def influences(training: LocalTraining, seen: Seen, pictures: Tensor, label: int) -> Tensor:
    """What each picture alone adds to the update of one step, as the sanitizer leaves it, [M, D].

    Args:
        training: how the site trained; of its labels only their number is used.
        seen: gives scale and mask.
        pictures: [M, C, H, W].
        label: of all of them.
    """
    parameters = {name: training.global_state[name].detach() for name in training.names}
    buffers = {
        name: training.global_state.get(name, value).detach()
        for name, value in training.model.named_buffers()
    }
    labels = training.labels.new_tensor([label])

    def loss(parameters: dict[str, Tensor], picture: Tensor) -> Tensor:
        answer = training.forward(training.model, parameters | buffers, picture[None])
        return training.loss(answer, labels)

    steps = vmap(grad(loss), in_dims=(None, 0))(parameters, pictures)
    flat = torch.cat([steps[name].flatten(1) for name in training.names], dim=1)
    return seen.sanitize(flat * (-training.learning_rate / len(training.labels)))
