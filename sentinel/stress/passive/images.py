"""The image attacker: every reconstruction it can make of one update, and the best of them.

Several attackers in one: Inverting Gradients as published, with its settings tuned against noise,
with restarts, the estimate that knows no picture, and the one with a public prior. Which of them
did best is settled with the truth at hand, in the attacker's favour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.inversion import Matching, blur, match_direction, search_once
from sentinel.stress.passive.prior import filled_prior, smooth_prior
from sentinel.stress.passive.reidentify import Found, match_within_class, ranked_first
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen
    from sentinel.stress.passive.prior import ImagePrior

_SURE = 1.96  # standard errors to either end of a 95 % interval


@dataclass(frozen=True, slots=True)
class Attack:
    """What one attacker made of an update.

    Attributes:
        guesses: [N, 1, H, W], matched to the pictures within each class.
        ssim: mean similarity to the pictures.
        found: pictures that rank first among the decoys of their class.
    """

    guesses: Tensor
    ssim: float
    found: Found


@dataclass(frozen=True, slots=True)
class Truth:
    """The pictures behind an update, and those that are not; only for scoring.

    Attributes:
        pictures: [N, 1, H, W].
        labels: [N].
        decoys: for each class, [M, 1, H, W].
    """

    pictures: Tensor
    labels: Tensor
    decoys: tuple[Tensor, ...]

    def score(self, guesses: Tensor, prior: ImagePrior) -> Attack:
        """Match guesses to the pictures, and say how good they are."""
        matched = match_within_class(guesses, self.pictures, self.labels)
        alike = float(ssim(matched, self.pictures).mean())
        found = ranked_first(guesses, self.pictures, self.labels, self.decoys, prior)
        return Attack(matched, alike, found)


def dealt(
    pictures: tuple[Tensor, ...], each: int, decoys: int, generator: torch.Generator
) -> list[Truth]:
    """Deal pictures out to as many updates as they suffice for; none is behind two of them.

    Decoys of an update are drawn from all the pictures that are not behind it, so that without any
    information nothing tells them from those that are.

    Args:
        pictures: for each class, [M, 1, H, W].
        each: of every class behind one update.
        decoys: of every class, to find a picture among.
        generator: of the order.

    Raises:
        MisuseError: there are too few for one update.
    """
    least = min(len(own) for own in pictures)
    if least < each + decoys:
        msg = f"an update takes {each} pictures of each class and {decoys} others, got {least}"
        raise MisuseError(msg)
    orders = [torch.randperm(len(own), generator=generator) for own in pictures]
    labels = torch.arange(len(pictures)).repeat_interleave(each)
    found = []
    for first in range(0, least - each + 1, each):
        behind = [order[first : first + each] for order in orders]
        others = [torch.cat([order[:first], order[first + each :]]) for order in orders]
        mixed = [rest[torch.randperm(len(rest), generator=generator)[:decoys]] for rest in others]
        found.append(
            Truth(
                torch.cat([own[some] for own, some in zip(pictures, behind, strict=True)]),
                labels,
                tuple(own[some] for own, some in zip(pictures, mixed, strict=True)),
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Gain:
    """What one attacker got of several updates, beside what the class mean gives.

    Attributes:
        gains: for each picture, its similarity to the guess less that to the mean of public
            pictures of its class, [T].
        found: pictures that rank first among the decoys of their class.
    """

    gains: Tensor
    found: Found

    @classmethod
    def over(cls, updates: Sequence[tuple[Truth, Attack]], prior: ImagePrior) -> Gain:
        """Pool one attacker's results over updates.

        Args:
            updates: what was behind each, and what the attacker made of it.
            prior: gives the class means.
        """
        gains = [
            ssim(attack.guesses, truth.pictures) - ssim(prior.means[truth.labels], truth.pictures)
            for truth, attack in updates
        ]
        return cls(torch.cat(gains), Found.pooled([attack.found for _, attack in updates]))

    @property
    def mean(self) -> float:
        """Mean gain; matching guesses to the truth flatters it."""
        return float(self.gains.mean())

    @property
    def half(self) -> float:
        """Half the width of its 95 % interval; pictures are taken as independent."""
        return _SURE * float(self.gains.std()) / math.sqrt(len(self.gains))

    @property
    def upper(self) -> float:
        """Upper end of that interval."""
        return self.mean + self.half


@dataclass(frozen=True, slots=True)
class ImageAttacker:
    """Everything the attacker tries on one update.

    Attributes:
        searches: name -> settings of an attacker without a prior.
        estimates: name -> settings of an attacker with one.
        blind: name -> settings of an attacker whose prior knows no picture, only that neighbouring
            pixels are alike.
        steps: name -> settings of a search that sets out from the mean public picture of each
            class, in steps too small for noise to take that away.
        filled: name -> settings of an attacker whose prior has a smooth remainder beside the
            directions of public pictures.
    """

    searches: Mapping[str, Matching]
    estimates: Mapping[str, Estimation]
    blind: Mapping[str, Estimation] = field(default_factory=dict)
    steps: Mapping[str, Matching] = field(default_factory=dict)
    filled: Mapping[str, Estimation] = field(default_factory=dict)

    def reconstruct(
        self,
        training: LocalTraining,
        seen: Seen,
        prior: ImagePrior,
        generator: torch.Generator,
    ) -> Iterator[tuple[str, Tensor]]:
        """Run one after the other.

        Args:
            training: how the site trained, labels included.
            seen: the update, with the figures of its sanitizer.
            prior: fitted on public pictures; also gives the size of the pictures.
            generator: of all starts.

        Yields:
            Name of the attacker, and its [N, 1, H, W], as soon as it is done.
        """
        height, width = prior.means.shape[-2:]
        for name, search in self.searches.items():
            yield name, match_direction(training, seen, search, (height, width), generator)
        smooth = smooth_prior((height, width), len(prior.means)) if self.blind else prior
        for name, estimation in self.blind.items():
            yield name, most_likely(training, seen, smooth, estimation, generator)
        for name, search in self.steps.items():
            start = prior.means[training.labels]
            near = search_once(training, seen, search, start).pictures
            yield name, blur(near, search.smoothing)
        for name, estimation in self.estimates.items():
            yield name, most_likely(training, seen, prior, estimation, generator)
        full = filled_prior(prior) if self.filled else prior
        for name, estimation in self.filled.items():
            yield name, most_likely(training, seen, full, estimation, generator)

    def with_prior_only(self) -> ImageAttacker:
        """The attackers that do best against many pictures or much noise."""
        return ImageAttacker({}, self.estimates)

    def __len__(self) -> int:
        """How many attackers there are."""
        every = (self.searches, self.estimates, self.blind, self.steps, self.filled)
        return sum(len(some) for some in every)


# Settings found with the truth known, on updates of 1 and of 64 chest X-rays.
LONE = Matching(iterations=600, total_variation=5e-3)
# Against the raw update of one: how much total variation serves best depends on the net.
RAW = ImageAttacker(
    searches={
        "TV .005": LONE,
        "TV .01": Matching(iterations=600, total_variation=1e-2),
        "TV .05": Matching(iterations=600, total_variation=5e-2),
        "TV .1": Matching(iterations=600, total_variation=1e-1),
    },
    estimates={},
    blind={
        "smooth prior": Estimation(rounds=10, products=40, least_noise=0.02, first_noise=1.0),
    },
)
BATCH = ImageAttacker(
    searches={
        "untuned": Matching(iterations=80, total_variation=1e-1),
        "smoothed": Matching(iterations=80, total_variation=3.0, smoothing=1.5),
        "restarted": Matching(iterations=50, total_variation=3.0, smoothing=1.5, restarts=2),
    },
    estimates={
        "public prior": Estimation(),
        "public prior, damped": Estimation(least_noise=2.0),
    },
)
# Whatever is known to do best through the noise of a shipped policy; for its floor.
FLOOR = ImageAttacker(
    searches={
        "total variation": Matching(iterations=60, total_variation=1e-1),
        "smoothing": Matching(iterations=60, total_variation=3.0, smoothing=1.5),
        "restarts": Matching(iterations=40, total_variation=3.0, smoothing=1.5, restarts=2),
    },
    estimates=BATCH.estimates,
    steps={"from the mean": Matching(iterations=40, step=5e-4, total_variation=1.0)},
    filled={"public prior, filled": Estimation(least_noise=2.0)},
)


def best(attacks: Mapping[str, Attack]) -> str:
    """Name of the attack whose guesses look most like the truth."""
    return max(attacks, key=lambda name: attacks[name].ssim)
