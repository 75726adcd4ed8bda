"""What is run on the chest X-rays, and everything that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.interval import wilson
from sentinel.stress.passive.images import BATCH, LONE, Attack, ImageAttacker, best

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from sentinel.interval import Interval
    from sentinel.stress.passive.inversion import Matching
    from sentinel.stress.passive.reidentify import Found


@dataclass(frozen=True, slots=True)
class XraySettings:
    """What is run.

    Attributes:
        policy: name or path of the hospital's policy.
        lone: pictures that are each attacked alone, from raw gradients; at least 1.
        rate: learning rate of the hospital's one step on all its pictures. 5 makes the update as
            long as the shipped policy lets it be, so that it stands against the noise as high as
            any update can.
        components: directions per class of the attacker's prior.
        shown: pictures of the batch in the report.
        lone_search: how single pictures are attacked.
        attacker: what is tried on the update of the batch.
        seed: of the model and the attacker, never of the guard's noise.
    """

    policy: str = "chest-xray"
    lone: int = 3
    rate: float = 5.0
    components: int = 60
    shown: int = 6
    lone_search: Matching = LONE
    attacker: ImageAttacker = BATCH
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a run that has nothing to show."""
        if self.lone < 1 or self.shown < 1:
            msg = "a run needs at least one picture alone and one picture to show"
            raise MisuseError(msg)


@dataclass(frozen=True, slots=True)
class Sanitized:
    """What was done to the released update.

    Attributes:
        norm: L2 norm of the raw update.
        max_norm: what the policy clips it to.
        noise_norm: expected L2 norm of the noise.
        keep: share of the coordinates kept.
        rules: ids of the policy's rules that applied.
    """

    norm: float
    max_norm: float
    noise_norm: float
    keep: float
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class XrayPictures:
    """Pictures for the report; all uint8, 0 black to 255 white.

    Attributes:
        lone: [height, width], a picture behind a raw one-image gradient.
        lone_reconstructed: [height, width], what the attacker made of that gradient.
        originals: [shown, height, width], pictures behind the batch's update.
        class_means: the same shape: the guess without any data, for each.
        raw: the same shape: the matched reconstruction from the raw update of the batch.
        sanitized: the same shape: from the released update.
    """

    lone: NDArray[np.uint8]
    lone_reconstructed: NDArray[np.uint8]
    originals: NDArray[np.uint8]
    class_means: NDArray[np.uint8]
    raw: NDArray[np.uint8]
    sanitized: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class XrayResult:
    """Everything the demo and its report say about the chest X-rays.

    Attributes:
        settings: what was run.
        net: the model, in words.
        parameters: of the model.
        stage: how far the model was trained when it was attacked.
        batch_size: pictures behind the released update, all in one step.
        lone_ssims: similarity of each reconstruction from a raw one-image gradient.
        lone_reason: code with which the policy withheld the update of a single patient; None
            where it let the update out.
        treatment: what was done to the released update.
        ssim_class_mean: similarity of the public class mean to the pictures behind the update.
        ssim_unrelated: what the best attacker scores, matched to the same pictures, from the raw
            update of *other* pictures: how far matching alone lifts a guess.
        raw: attacks on the raw update of the batch, by attacker.
        sanitized: attacks on the released update, by attacker.
        pictures: for the report.
    """

    settings: XraySettings
    net: str
    parameters: int
    stage: str
    batch_size: int
    lone_ssims: tuple[float, ...]
    lone_reason: str | None
    treatment: Sanitized
    ssim_class_mean: float
    ssim_unrelated: float
    raw: Mapping[str, Attack]
    sanitized: Mapping[str, Attack]
    pictures: XrayPictures

    @property
    def ssim_raw(self) -> float:
        """Mean similarity of the reconstructions from raw one-image gradients."""
        return sum(self.lone_ssims) / len(self.lone_ssims)

    @property
    def lone_image_withheld(self) -> bool:
        """Whether the policy kept the update of a single patient in."""
        return self.lone_reason is not None

    @property
    def ssim_raw_batch(self) -> float:
        """The best that any attacker gets from the raw update of the batch."""
        return self.raw[best(self.raw)].ssim

    @property
    def ssim_sanitized(self) -> float:
        """The best that any attacker gets from the released update."""
        return self.sanitized[best(self.sanitized)].ssim

    @property
    def reid_top1_raw(self) -> float:
        """Share of pictures found among 100 of their class in the raw update, by the best at it."""
        return _most_found(self.raw).count.share

    @property
    def reid_top1(self) -> float:
        """Share of pictures found among 100 of their class in the released update, likewise."""
        return _most_found(self.sanitized).count.share

    @property
    def reid_interval(self) -> Interval:
        """95 % interval of `reid_top1` as if pictures were independent; see `reid_by_chance`."""
        return wilson(_most_found(self.sanitized).count)

    @property
    def reid_by_chance(self) -> float:
        """Bound on the probability that chance alone finds as many, for the best of all attackers.

        The exact probability for one attacker, times their number (Bonferroni).
        """
        return min(1.0, _most_found(self.sanitized).by_chance * len(self.sanitized))

    @property
    def reid_chance_limit(self) -> float:
        """Share that chance alone keeps all attackers at or under in at least 99 % of runs."""
        return _most_found(self.sanitized).chance_limit(1.0 - 0.01 / len(self.sanitized))


def _most_found(attacks: Mapping[str, Attack]) -> Found:
    """What the attacker found who found most."""
    return max((attack.found for attack in attacks.values()), key=lambda found: found.count.hits)
