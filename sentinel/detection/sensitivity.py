"""Sensitivity score of an update: the estimated share of its records that could be read out of it.

It looks at the update alone. With a reference it is expressed relative to the model at hand, and
"sharpness" says "reference"; without one, relative to a pool of other models, and it says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from sentinel.detection.bundle import UPDATE_SENSITIVITY, Detector, interpolated, load_detector
from sentinel.detection.clues import alone, clues, resembling
from sentinel.detection.features import Measured, update_features
from sentinel.update import Update

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from sentinel.detection.reference import Reference

SEED = 11
# Where nothing tells few records from many. High, because the update may well be of one record;
# below .5, from which the shipped policies tighten, because it is no evidence of that either.
BLIND = 0.45
Sharpness = Literal["probed", "reference", "generic", "blind"]


@dataclass(frozen=True, slots=True)
class SensitivityScore:
    """How revealing an update is.

    Attributes:
        overall: 0 to 1, the estimated share of the records that could be read.
        per_tensor: the same from each tensor alone; 0 for a tensor that did not change.
        sharpness: "reference" (relative to this very model), "generic" (to other models), "blind"
            (nothing tells few records from many here: overall is `BLIND` and says nothing) or
            "probed" (the site's own records were looked for in it as well).
    """

    overall: float
    per_tensor: dict[str, float]
    sharpness: Sharpness

    def raised(self, share: float, names: Iterable[str]) -> SensitivityScore:
        """Return the score where this share of the site's records was read, by these tensors."""
        read = {name: max(share, self.per_tensor.get(name, 0.0)) for name in names}
        return SensitivityScore(max(share, self.overall), {**self.per_tensor, **read}, "probed")


def score_update(
    update: Update | Mapping[str, Tensor],
    reference: Reference | None = None,
    *,
    detector: Detector | None = None,
) -> SensitivityScore:
    """Score an update.

    Args:
        update: an update, or name -> local - global.
        reference: what updates of this model look like; without one the score is less sharp.
        detector: the shipped bundle where left out.

    Returns:
        The score; the same for the same arguments. An update of zeros scores 0; one in which
        nothing tells few records from many scores `BLIND`, or the reference's floor where that is
        more.

    Raises:
        Withheld: DETECTOR_UNAVAILABLE, or NOT_FINITE.

    Guarantees:
        Nothing is written to the update. Its overall size (learning rate, clip) does not matter.
    """
    deltas = update.deltas if isinstance(update, Update) else update
    learned = detector or load_detector(UPDATE_SENSITIVITY)
    measured = update_features(deltas, torch.Generator().manual_seed(SEED))
    sharpness: Sharpness = "generic" if reference is None else "reference"
    floor = learned.manifest.floor if reference is None else reference.floor
    per_tensor = dict.fromkeys(deltas, 0.0)
    if not measured:
        return SensitivityScore(0.0, per_tensor, sharpness)
    whole = estimate(learned, measured, reference)
    singly = _singly(learned, measured, reference)
    for entry, score in zip(measured, singly, strict=True):
        per_tensor.update(dict.fromkeys(entry.names, BLIND if score is None else score))
    if whole is None and floor <= BLIND:
        return SensitivityScore(BLIND, per_tensor, "blind")
    return SensitivityScore(max(whole or 0.0, floor), per_tensor, sharpness)


def estimate(
    detector: Detector, measured: Sequence[Measured], reference: Reference | None
) -> float | None:
    """Estimate the share of the records that could be read; None where nothing tells."""
    seen = clues(measured, reference)
    if reference is None:
        known = any(entry.rank > 1 for entry in measured)
        return detector.generic([seen.tolist()])[0] if known else None
    alike = resembling(seen)
    if alike is None:
        return None
    learned, pooled = detector.leakage([seen.tolist(), clues(measured, None).tolist()])
    return interpolated(joined(learned, pooled, alike), detector.manifest.knots)


def joined(learned: float, pooled: float, alike: float) -> float:
    """Join three opinions: with the reference, without it, and of the rehearsals that are alike.

    A geometric mean of what knows the model and what does not: where nothing leaked from any
    rehearsal that the update resembles, nothing does from it. A noised update of few records looks
    much like a large one beside a reference, and less so to what all models taught.
    """
    return math.sqrt(max(pooled, 0.0) * math.sqrt(max(learned, 0.0) * max(alike, 0.0)))


def _singly(
    detector: Detector, measured: Sequence[Measured], reference: Reference | None
) -> list[float | None]:
    """Estimate from each tensor alone; None where it tells nothing."""
    if reference is not None:
        return [reference.single(entry) for entry in measured]
    told = [entry for entry in measured if entry.rank > 1]
    shares = detector.generic(alone(told)) if told else []
    found = dict(zip((entry.names for entry in told), shares, strict=True))
    return [found.get(entry.names) for entry in measured]
