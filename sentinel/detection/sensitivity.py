"""Sensitivity score of an update: the estimated share of its records that could be read out of it.

It looks at the update alone. With a reference it is expressed relative to the model at hand, and
"sharpness" says "reference"; without one, relative to a pool of other models, and it says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from sentinel.detection.bundle import (
    UPDATE_SENSITIVITY,
    Detector,
    interpolated,
    load_detector,
)
from sentinel.detection.features import FEATURES, Measured, update_features
from sentinel.detection.reference import Place, Reference
from sentinel.update import Update

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

SEED = 11
LEAST_RANK = 13  # below it, pooled features of rank compare what cannot be compared
LEAST_ANOMALY = 1e-3  # where even one record would be ordinary, nothing is divided by nothing
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
    per_tensor = dict.fromkeys(deltas, 0.0)
    chosen = reference if reference is not None else generic(learned, measured)
    if not measured:
        return SensitivityScore(0.0, per_tensor, chosen.sharpness)
    overall, *singly = _shares(chosen, measured, learned)
    for entry, score in zip(measured, singly, strict=True):
        per_tensor.update(dict.fromkeys(entry.names, BLIND if score is None else score))
    if overall is None and chosen.floor <= BLIND:
        return SensitivityScore(BLIND, per_tensor, "blind")
    return SensitivityScore(max(overall or 0.0, chosen.floor), per_tensor, chosen.sharpness)


def _shares(
    reference: Reference, measured: list[Measured], detector: Detector
) -> list[float | None]:
    """Overall, then per tensor, in one call of the detector; the calmest mode counts.

    None where no mode tells anything. What one record would be is alike for most tensors, so the
    same vector is judged once.
    """
    per_tensor, overall = reference.relative(measured)
    groups = [overall, *per_tensor]
    asked = [[[tuple(row) for row in pair.tolist()] for pair in group] for group in groups]
    vectors = list(dict.fromkeys(row for group in asked for pair in group for row in pair))
    anomaly = dict(zip(vectors, detector.anomaly(vectors) if vectors else (), strict=True))
    calmest = [
        min((share_of_single(anomaly[own], anomaly[one]) for own, one in group), default=None)
        for group in asked
    ]
    knots = detector.manifest.knots
    return [None if share is None else interpolated(share, knots) for share in calmest]


def share_of_single(anomaly: float, single: float) -> float:
    """Return the anomaly as a share of what one record's would be on the same model."""
    return anomaly / max(single, LEAST_ANOMALY)


def generic(detector: Detector, measured: list[Measured]) -> Reference:
    """Return the pooled reference of the bundle, the same place for every tensor."""
    rows = np.array([detector.manifest.generic[name] for name in FEATURES])  # [features, modes*3]
    modes = tuple(Place(*part.T) for part in np.split(rows, rows.shape[1] // 3, axis=1))
    places = {entry.names[0]: modes for entry in measured if entry.rank >= LEAST_RANK}
    return Reference(places, detector.manifest.floor, sharpness="generic")
