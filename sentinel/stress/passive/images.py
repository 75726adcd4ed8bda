"""The image attacker: every reconstruction it can make of one update, and the best of them.

Several attackers in one: Inverting Gradients as published, with its settings tuned against noise,
with restarts, the estimate that knows no picture, and the one with a public prior. Which of them
did best is settled with the truth at hand, in the attacker's favour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.prior import smooth_prior
from sentinel.stress.passive.reidentify import match_within_class, ranked_first
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen
    from sentinel.stress.passive.prior import ImagePrior
    from sentinel.stress.passive.reidentify import Found


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


@dataclass(frozen=True, slots=True)
class ImageAttacker:
    """Everything the attacker tries on one update.

    Attributes:
        searches: name -> settings of an attacker without a prior.
        estimates: name -> settings of an attacker with one.
        blind: name -> settings of an attacker whose prior knows no picture, only that neighbouring
            pixels are alike.
    """

    searches: Mapping[str, Matching]
    estimates: Mapping[str, Estimation]
    blind: Mapping[str, Estimation] = field(default_factory=dict)

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
        for name, estimation in self.estimates.items():
            yield name, most_likely(training, seen, prior, estimation, generator)

    def with_prior_only(self) -> ImageAttacker:
        """The attackers that do best against many pictures or much noise."""
        return ImageAttacker({}, self.estimates)

    def __len__(self) -> int:
        """How many attackers there are."""
        return len(self.searches) + len(self.estimates) + len(self.blind)


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


def best(attacks: Mapping[str, Attack]) -> str:
    """Name of the attack whose guesses look most like the truth."""
    return max(attacks, key=lambda name: attacks[name].ssim)
