"""Collate: a loop's own `collate_fn`, run on the records of one unit at a time.

A collate function may sort its records, drop some, or mix them; rows could then not be told apart
by patient any more. Given one patient's records at a time it cannot: whatever comes back is that
patient's. The results are joined in the batch's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable


class ByUnit:
    """A data set that is asked for records by unit: a list of lists of indices."""

    def __init__(self, data: Any) -> None:  # noqa: ANN401 - whatever the loop's data set is
        """Over the loop's own."""
        self._data = data

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - whatever a record is
        """One record."""
        return self._data[index]

    def __getitems__(self, units: list[list[int]]) -> list[list[Any]]:
        """The records of each unit."""
        many = getattr(self._data, "__getitems__", None)
        if many is not None:
            return [list(many(indices)) for indices in units]
        return [[self._data[index] for index in indices] for indices in units]


class UnitCollate:
    """Collates each unit alone and joins what comes back.

    Guarantees:
        No row of the batch is made of records of two units: the function never sees two of them at
        once.

    Edges:
        a function that keeps its records in order: gives the same as over the whole batch
        one that sorts, shuffles or mixes them:     the same within a unit, none across
        one that drops or repeats records:          an error
        one that pads to the longest in the batch:  an error where units differ in width
        no unit:                                    what it makes of one blank record
    """

    def __init__(self, inner: Callable[[list[Any]], Any], blank: Any) -> None:  # noqa: ANN401 - whatever a record is
        """`blank` is the record that stands for an empty batch."""
        self._inner, self._blank = inner, blank

    def __call__(self, units: list[list[Any]]) -> Any:  # noqa: ANN401 - whatever it collates to
        """The batch."""
        if not units:
            return self._inner([self._blank])
        parts = [self._inner(records) for records in units]
        return _join(parts, [len(records) for records in units])


def _join(parts: list[Any], counts: list[int]) -> Any:  # noqa: ANN401 - as above
    """Put the same place of every unit's result together, rows under rows."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise _unlike()
    if isinstance(first, torch.Tensor | np.ndarray):
        return _join_rows(parts, counts)
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise _unlike()
        joined = {key: _join([part[key] for part in parts], counts) for key in first}
        return type(first)(joined)  # type: ignore[call-arg]  # a kind of dict, made as dict is
    if isinstance(first, list | tuple):
        return _join_lists(parts, counts)
    if isinstance(first, str | int | float | None) and all(part == first for part in parts):
        return first
    raise MisuseError(
        f"collate_fn gives a {type(first).__name__} that differs from patient to patient (or "
        "record to record); private training joins tensors, arrays and lists with one row for "
        "each record, in tuples, lists or dicts."
    )


def _join_rows(parts: list[Any], counts: list[int]) -> Any:  # noqa: ANN401 - tensors or arrays
    if any(part.ndim == 0 or len(part) != count for part, count in zip(parts, counts, strict=True)):
        raise MisuseError(
            "collate_fn gave other rows than the records it was given. It must keep every record, "
            "first dimension first: a record that is not to count is kept and gets the weight 0 in "
            "the loss."
        )
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise MisuseError(
            "collate_fn gives another width for each patient (or record). It is run on one at a "
            "time; pad to one fixed length (padding to the longest in a batch would look at "
            "others)."
        )
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)


def _join_lists(parts: list[Any], counts: list[int]) -> Any:  # noqa: ANN401 - lists or tuples
    first = parts[0]
    texts = all(isinstance(one, str | int | float | None) for part in parts for one in part)
    if texts and all(len(part) == count for part, count in zip(parts, counts, strict=True)):
        return type(first)(one for part in parts for one in part)
    if any(len(part) != len(first) for part in parts):
        raise _unlike()
    joined = [_join(list(same), counts) for same in zip(*parts, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)


def _unlike() -> MisuseError:
    return MisuseError(
        "collate_fn gives results of another form for each patient (or record); private training "
        "runs it on one at a time and joins what it gives. Give the same form for all."
    )
