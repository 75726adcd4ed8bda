"""Units: which records of a data set belong to one patient, and which of them are in a batch."""

from __future__ import annotations

from collections.abc import Mapping, MappingView
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from numpy.typing import NDArray

    from sentinel.mechanism import Entropy

    Whole = NDArray[np.int64]

# Numbers that are near each other and not the same, and answers: neither says who a patient is.
_NO_IDS = (bool, np.bool_, float, complex, np.inexact)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The records of one batch, those of a unit side by side.

    Attributes:
        records: dataset indices, (records,).
        slots: which of the batch's units each record belongs to: 0 .. units - 1, rising.
        units: how many units were drawn; may be 0.
        left_out: records that the cap on records per patient kept out; stays in memory.
    """

    records: Whole
    slots: Whole
    units: int
    left_out: int


@dataclass(frozen=True, slots=True)
class Units:
    """A data set, grouped.

    Attributes:
        records: every dataset index, those of a unit side by side, (records,).
        starts: where each unit's records begin in `records`, and the end, (units + 1,).
        cap: most records of one unit in one batch.

    Guarantees:
        Each record is of exactly one unit. Of the ids nothing is kept but who is the same.

    Edges:
        `single`:                                     each record is a unit
        `grouped` with no records:                    no units
        `grouped`, ids by any kind of number or text: as they compare equal; whole numbers, and all
                                                      of one type: others raise MisuseError
        `grouped`, an id that is None, NaN or empty:  MisuseError; so in a part of a tuple
        `grouped`, more or fewer ids than records:    MisuseError, which names no id
        `grouped`, a set or a dict of ids:            MisuseError: they say nothing of the order
    """

    records: Whole
    starts: Whole
    cap: int

    @classmethod
    def single(cls, records: int) -> Self:
        """Every record is a unit of its own."""
        return cls(np.arange(records), np.arange(records + 1), 1)

    @classmethod
    def grouped(cls, ids: Iterable[Hashable], records: int, cap: int) -> Self:
        """Group records by the patient they belong to.

        Args:
            ids: the patient of each dataset index; only compared, never kept.
            records: how many records the data set has.
            cap: most records of one patient in one batch.

        Raises:
            MisuseError: not one id for each record, an id that is missing, or ids that cannot be
                compared: of several types, decimal numbers, booleans.
        """
        codes = _codes(ids)
        if len(codes) != records:
            raise MisuseError(
                "patients must hold one id for each index of the data set, in its order; the "
                "lengths differ."
            )
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes) if records else np.zeros(0, dtype=np.int64)
        return cls(order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), cap)

    def __len__(self) -> int:
        """How many units: data, not to be told to anybody."""
        return len(self.starts) - 1

    def take(self, units: Whole, entropy: Entropy) -> Drawn:
        """The records of some units; of a unit above the cap, as many as it allows, at random.

        Guarantees:
            Which records of a unit are taken depends on that unit and on fresh entropy alone.

        Edges:
            a unit of up to `cap` records: all of them
            a unit of more:                `cap` of them, every subset equally likely
            no unit drawn:                 nothing: an empty batch
        """
        counts = self.starts[units + 1] - self.starts[units]
        total = int(counts.sum())
        slots = np.repeat(np.arange(len(units)), counts)
        first = np.cumsum(counts) - counts
        places = np.arange(total) - first[slots] + self.starts[units][slots]
        kept = self._within_cap(slots, counts, first, entropy)
        return Drawn(self.records[places[kept]], slots[kept], len(units), total - int(kept.sum()))

    def _within_cap(
        self, slots: Whole, counts: Whole, first: Whole, entropy: Entropy
    ) -> NDArray[np.bool_]:
        """Which records stay: those with the smallest random keys of an overfull unit."""
        kept = np.ones(len(slots), dtype=bool)
        for slot in np.flatnonzero(counts > self.cap):
            keys = np.empty(counts[slot], dtype=np.uint64)
            entropy.fill(keys.data)
            kept[first[slot] + np.argsort(keys, kind="stable")[self.cap :]] = False
        return kept


def _codes(ids: Iterable[Hashable]) -> Whole:
    """Small whole numbers, the same for the same id."""
    if isinstance(ids, Mapping | MappingView | AbstractSet):
        raise MisuseError(
            f"patients is a {type(ids).__name__}, which does not hold one id for each index of the "
            "data set in its order; pass [ids[i] for i in range(len(dataset))]."
        )
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iuUSO":
            raise MisuseError(
                "patients must be one-dimensional, and its ids whole numbers or texts."
            )
        ids = ids.tolist()
    if isinstance(ids, str | bytes):
        raise MisuseError("patients must hold one id for each record, not be a single text.")
    known: dict[Hashable, int] = {}
    types: set[object] = set()
    codes = []
    try:
        for one in ids:
            value = one.item() if isinstance(one, torch.Tensor) and one.numel() == 1 else one
            codes.append(known.setdefault(value, len(known)))
            types.add(_type(value))
    except TypeError:
        raise _incomparable() from None
    if len(types) > 1:
        raise MisuseError(
            "patients mixes ids of several types, such as whole numbers and texts, so that a "
            "patient may be taken for two. Make them all of one type, for example "
            "[str(one) for one in ids]."
        )
    return np.asarray(codes, dtype=np.int64)


def _type(value: object) -> object:
    """What ids must have in common to be compared; of a tuple, that of its parts.

    Raises:
        MisuseError: an id that is missing, or that does not say who is the same.
    """
    if isinstance(value, torch.Tensor):  # hashed by its place in memory
        raise _incomparable()
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int
    if value is None or value != value or value in ("", b""):  # noqa: PLR0124 - NaN is not itself
        raise MisuseError(
            "patients has a record without an id; give each such record an id of its own, or leave "
            "it out of the data set."
        )
    if isinstance(value, str):
        return str
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    if isinstance(value, _NO_IDS) or type(value).__eq__ is object.__eq__:
        raise _incomparable()
    return type(value)


def _incomparable() -> MisuseError:
    return MisuseError(
        "patients must be a sequence of ids that can be compared, such as whole numbers or texts; "
        "decimal numbers and booleans are none. Convert them to whole numbers or texts."
    )
