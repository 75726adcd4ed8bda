"""Clues: what the detector of sensitivity sees of an update, with and without a reference.

Three kinds: absolute features of the layer that is read and over all layers; where the update lies
between ordinary rounds and one of a single record; and what leaked from the rehearsals that it
resembles most. Without a reference the last two are `UNKNOWN`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sentinel.detection.features import FEATURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sentinel.detection.features import Measured
    from sentinel.detection.reference import Reference

    Vector = NDArray[np.float64]

UNKNOWN = -9.0
ABSOLUTE: tuple[str, ...] = (
    *(f"read_{name}" for name in FEATURES),
    *(f"least_{name}" for name in FEATURES),
    *(f"most_{name}" for name in FEATURES),
    *(f"mean_{name}" for name in FEATURES),
    "full_rank",
    "matrices",
)
GROUPS: dict[str, tuple[str, ...]] = {
    "rank": ("tail_1", "tail_4", "tail_16", "rank", "unexplained"),
    "company": ("twins", "match_02", "match_10", "match_30", "close", "aside", "aside_30"),
    "gaps": ("faint_rows", "faint", "faint_columns"),
    "shape": ("row_spread", "column_spread", "flatness", "peak", "spread"),
}
RELATIVE: tuple[str, ...] = (*GROUPS, "all")
ALIKE = ("leakage", "novelty", "least", "most", "records", "noise")
LOCAL: tuple[str, ...] = tuple(
    f"{where}_{what}" for where in ("all", "sharp", "read") for what in ALIKE
)
CLUES: tuple[str, ...] = (*ABSOLUTE, *RELATIVE, *LOCAL)


def absolute(measured: Sequence[Measured], read: Measured | None) -> Vector:
    """Return the clues that need no reference, in the order of `ABSOLUTE`.

    Args:
        measured: the update.
        read: the layer that a server would read; a likely one where left out.
    """
    matrices = [entry for entry in measured if entry.rank > 1]
    biased = [entry for entry in matrices if len(entry.names) > 1]
    if read is None:
        read = max(biased or matrices or measured, key=lambda entry: (entry.rank, entry.energy))
    rows = np.array([entry.vector for entry in biased or matrices or measured])
    energy = np.array([entry.energy for entry in biased or matrices or measured])
    share = (
        energy / energy.sum()
        if 0.0 < energy.sum() < np.inf
        else np.full(len(rows), 1.0 / len(rows))
    )
    counts = [np.log10(max(read.rank, 1)), np.log10(1 + len(matrices))]
    return np.concatenate([read.vector, rows.min(0), rows.max(0), share @ rows, counts])


def clues(measured: Sequence[Measured], reference: Reference | None) -> Vector:
    """Return what the detector sees, in the order of `CLUES`."""
    if reference is None:
        unknown = np.full(len(RELATIVE) + len(LOCAL), UNKNOWN)
        return np.concatenate([absolute(measured, None), unknown])
    named = {entry.names[0]: entry for entry in measured}
    read = next((named[name] for name in reference.read if name in named), None)
    return np.concatenate(
        [absolute(measured, read), reference.relative(named), reference.alike(named, read)]
    )


def alone(entries: Sequence[Measured]) -> Vector:
    """Return for each of these matrices what `clues` are of it alone, without a reference."""
    vectors = np.array([entry.vector for entry in entries]).reshape(-1, len(FEATURES))
    ranks = np.log10([max(entry.rank, 1) for entry in entries])
    ones = np.full(len(entries), np.log10(2))
    unknown = np.full((len(entries), len(RELATIVE) + len(LOCAL)), UNKNOWN)
    return np.concatenate([np.tile(vectors, 4), np.stack([ranks, ones], axis=1), unknown], axis=1)


_LEAKAGES = [index for index, name in enumerate(CLUES) if name.endswith("_leakage")]


def resembling(seen: Vector) -> float | None:
    """Return the mean leakage of the rehearsals that the update resembles; None without any."""
    told = [float(seen[index]) for index in _LEAKAGES if seen[index] != UNKNOWN]
    return sum(told) / len(told) if told else None
