"""Loader: gives Poisson-sampled batches to a training loop that knows nothing of it."""

from __future__ import annotations

import itertools
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from sentinel.dpsgd.collate import ByUnit, UnitCollate
from sentinel.dpsgd.sampling import draw
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sentinel.dpsgd.sampling import Rate
    from sentinel.dpsgd.units import Drawn, Units
    from sentinel.mechanism import Entropy


@dataclass(frozen=True, slots=True)
class Piece:
    """What is given to the loop at once: a batch, or a part of one with whole units in it.

    Attributes:
        records: dataset indices; none where the batch is empty, and a blank record is given.
        rows: which unit each row of the piece is of, from 0 on, (rows,) int64; -1: nobody's.
        units: how many.
        last: whether it ends its batch, so that a step is due.
        left_out: records that the cap kept out of the batch.
    """

    records: list[int]
    rows: torch.Tensor
    units: int
    last: bool
    left_out: int

    def by_unit(self) -> list[list[int]]:
        """The records of each unit."""
        found: list[list[int]] = [[] for _ in range(self.units)]
        for record, unit in zip(
            self.records, self.rows.tolist(), strict=False
        ):  # a blank's is none
            found[unit].append(record)
        return found


def pieces(drawn: Drawn, most: int | None) -> list[Piece]:
    """Split a batch into pieces of at most `most` records, where no unit has more by itself."""
    if not drawn.units:
        return [Piece([], torch.tensor([-1]), 0, last=True, left_out=0)]
    counts = np.bincount(drawn.slots, minlength=drawn.units)
    ends = np.cumsum(counts)
    cuts = [0]
    for unit, end in enumerate(ends):
        if most is not None and end - cuts[-1] > most and end - counts[unit] > cuts[-1]:
            cuts.append(int(end - counts[unit]))
    cuts.append(int(ends[-1]))
    return [
        _piece(drawn, begin, end, last=end == cuts[-1]) for begin, end in itertools.pairwise(cuts)
    ]


def _piece(drawn: Drawn, begin: int, end: int, *, last: bool) -> Piece:
    rows = torch.from_numpy(drawn.slots[begin:end] - drawn.slots[begin])
    left_out = drawn.left_out if last else 0
    return Piece(drawn.records[begin:end].tolist(), rows, int(rows[-1]) + 1, last, left_out)


class PrivateLoader:
    """Poisson-sampled batches of a data set, in the form that the loop's own loader gave them.

    An epoch has `cohort / batch` batches, by the public figures. Batches differ in size. An empty
    one comes as one blank record (zeros) that counts for nobody, so that loops need not know of
    empty batches.

    Guarantees:
        Every batch is drawn by `draw`, with coins of the entropy it was given: neither the loop's
        order, its batch size, its workers nor a seed of torch has a part in who is in it. How many
        batches there are is public.

    Edges:
        nobody was drawn:                         a blank record of zeros, nobody's
        more records than `most`:                 pieces that hold whole units
        a unit with more records than its cap:    as many as the cap allows
        a data set or collating that drops rows:  MisuseError, and the round is withheld
        a record that cannot be blanked:          MisuseError
        a budget that does not pay for the epoch: Withheld, before a batch is drawn
    """

    def __init__(  # noqa: PLR0913 - the parts of a loader
        self,
        loader: DataLoader[Any],
        units: Units,
        rate: Rate,
        entropy: Entropy,
        *,
        most: int | None,
        on_epoch: Callable[[int], None],
        on_piece: Callable[[Piece, Any], None],
    ) -> None:
        """Take over a loader's data set, collating and workers.

        Args:
            loader: the loop's own; its batch size and order are not used.
            units: its data set, grouped.
            rate: the public figures.
            entropy: where the coins come from.
            most: records in a piece; None for whole batches.
            on_epoch: called with the number of batches before any is drawn.
            on_piece: called with each piece, and what the loop is given for it.

        Raises:
            MisuseError: a record cannot be blanked.
        """
        self._rate, self._on_epoch, self._on_piece = rate, on_epoch, on_piece
        generator = (
            torch.Generator()
        )  # for the workers' seed: not the loop's own, which may be known
        generator.manual_seed(int.from_bytes(os.urandom(7), "little"))
        data, collate, by_unit = _source(loader)
        self._batches = _Batches(units, rate, entropy, most, by_unit=by_unit)
        self._dataset = loader.dataset
        self._inner = DataLoader(
            data,
            batch_sampler=self._batches,
            collate_fn=collate,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            generator=generator,
        )

    @property
    def dataset(self) -> Any:  # noqa: ANN401 - as torch types it
        """The data set."""
        return self._dataset

    def __len__(self) -> int:
        """Batches in an epoch: a public figure."""
        return self._rate.steps

    def __iter__(self) -> Iterator[Any]:
        """One epoch.

        Raises:
            Withheld: the budget does not pay for it.
            MisuseError: the batch before had no step.
        """
        self._on_epoch(len(self))
        pending: deque[Piece] = deque()
        self._batches.pending = pending
        for data in self._inner:
            self._on_piece(pending.popleft(), data)
            yield data


def _source(loader: DataLoader[Any]) -> tuple[Any, Any, bool]:
    """A data set, how its records become a batch, and whether it is asked for them by unit."""
    data, collate = loader.dataset, loader.collate_fn
    if collate is not default_collate:
        return ByUnit(data), UnitCollate(collate, _blank(data[0])), True
    if type(data) is TensorDataset:
        table = _Table(data)
        return table, _Collate(list, _blank(table[0])), False  # a blank batch of one
    return data, _Collate(default_collate, [_blank(data[0])]), False


class _Batches:
    """Draws the batches, in this process whatever the workers do."""

    def __init__(
        self, units: Units, rate: Rate, entropy: Entropy, most: int | None, *, by_unit: bool
    ) -> None:
        self._by_unit = by_unit
        self._units, self._rate, self._entropy, self._most = units, rate, entropy, most
        self.pending: deque[Piece] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        pending = self.pending
        for _ in range(self._rate.steps):
            for piece in pieces(draw(self._units, self._rate, self._entropy), self._most):
                pending.append(piece)
                yield piece.by_unit() if self._by_unit else piece.records


class _Table:
    """The rows of tensors, a batch at a time: as `default_collate` gives them, and faster."""

    def __init__(self, data: TensorDataset) -> None:
        self._tensors = data.tensors

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[index : index + 1] for tensor in self._tensors)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[indices] for tensor in self._tensors) if indices else ()


class _Collate:
    """torch's own collating; of no records, that of one blank record."""

    def __init__(self, inner: Callable[[Any], Any], of_none: Any) -> None:  # noqa: ANN401 - whatever a record is
        self._inner, self._of_none = inner, of_none

    def __call__(self, records: list[Any]) -> Any:  # noqa: ANN401 - whatever it collates to
        return self._inner(records if len(records) else self._of_none)


def _blank(record: Any) -> Any:  # noqa: ANN401 - whatever a record is
    """A record of the same form that holds zeros only."""
    if isinstance(record, torch.Tensor):
        return torch.zeros_like(record)
    if isinstance(record, np.ndarray | np.generic):
        return np.zeros_like(record)
    if record is None or isinstance(record, bool | int | float | str):
        return None if record is None else type(record)()
    if isinstance(record, dict):
        return {key: _blank(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        parts = [_blank(part) for part in record]
        return type(record)(*parts) if hasattr(record, "_fields") else type(record)(parts)
    raise MisuseError(
        f"The data set gives a {type(record).__name__}; private training needs tensors, arrays, "
        "numbers or texts, in tuples, lists or dicts. Convert the records in the data set."
    )


def require_loader(loader: object) -> DataLoader[Any]:
    """The loader, if private batches can be drawn from its data set.

    Raises:
        MisuseError: it is none, is a stream, is empty, has an order of its own, or no batches.
    """
    if not isinstance(loader, DataLoader):
        raise MisuseError(
            "loader must be a torch.utils.data.DataLoader: private training draws its batches "
            "itself, by a coin for each patient, and cannot account for batches of any other kind."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise MisuseError(
            "The loader's data set is a stream; private training needs one with indices and a "
            "length, since each patient's records are drawn by chance."
        )
    if not len(loader.dataset):
        raise MisuseError("The loader's data set is empty.")
    if loader.batch_sampler is None:
        raise MisuseError(
            "The loader gives single records (batch_size=None); private training gives batches. "
            "Set a batch size, which only says how the records are put together."
        )
    if type(loader.batch_sampler) is not BatchSampler or type(loader.sampler) not in (
        SequentialSampler,
        RandomSampler,
    ):
        raise MisuseError(
            "The loader has a sampler of its own, which private training cannot follow: each "
            "patient has the same chance in every batch. Leave the sampler out."
        )
    return loader
