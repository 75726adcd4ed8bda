"""Whose picture is it: matching reconstructions to pictures, and finding a picture among others.

Both are done with the truth at hand, which no attacker has, so both flatter the attacker:
assignment alone lifts the similarity of guesses that know nothing. The figure for an unrelated
update, matched the same way, says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sentinel.errors import MisuseError
from sentinel.interval import Count
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.passive.prior import ImagePrior


@dataclass(frozen=True, slots=True)
class Found:
    """How many pictures came first among the decoys of their class.

    Attributes:
        count: pictures that came first, out of all.
        classes: for each class its pictures and its decoys, as counts.
    """

    count: Count
    classes: tuple[tuple[int, int], ...]

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
        guesses: [N, 1, H, W], in any order within a class.
        pictures: [N, 1, H, W], the truth.
        labels: [N], of both.

    Returns:
        [N, 1, H, W]: the guesses, each in the place of its picture.
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
        guesses: [N, 1, H, W].
        pictures: [N, 1, H, W], the truth.
        labels: [N], of both.
        decoys: for each class [M, 1, H, W], pictures that are not behind the update.
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
