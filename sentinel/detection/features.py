"""Features: content-free statistics of the tensors of an update.

Tensors of one shape are measured together; a large one is read in pieces, and most of it once.
None of them is a value of the update or depends on its overall size, so neither the learning rate
nor a clip changes them. A weight and its bias are read together: for one record, a dense layer's
weight update is its bias update times the record.
"""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sentinel.crew import share_out
from sentinel.detection.layers import bias_name, wide_type
from sentinel.detection.stack import GROUP, Stack, largest
from sentinel.detection.survey import (
    MOST_ROWS,
    SKETCH,
    Batch,
    Survey,
    matrix_features,
    vector_features,
)
from sentinel.errors import Withheld
from sentinel.source import Desk
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FEATURE_VERSION = 2
_SAFE = (1e-6, 1e15)  # norms at which float32 holds all squares, and no row is taken for zero


@dataclass(frozen=True, slots=True)
class TensorFeatures:
    """Features of one tensor (with its bias); those of matrices are 0 for a vector.

    Attributes:
        tail_1: log10 of the energy outside one random direction of its row space.
        tail_4: the same outside four.
        tail_16: the same outside sixteen.
        rank: log10 of the effective rank (participation ratio of the spectrum).
        unexplained: log10 of the weight's energy that the bias update does not explain.
        twins: share of the non-faint rows that are parallel to another one, bias included.
        match_02: share of a server's guesses (rows over their bias) that have another within 2 % of
            their norm.
        match_10: the same within 10 %.
        match_30: the same within 30 %.
        close: mean log10 of the distance of a guess to the nearest other one over its norm.
        aside: the same over its distance from the middle guess.
        aside_30: share of the guesses where that is below 30 %.
        faint_rows: share of the rows that are next to zero.
        row_spread: log10 of the participation ratio of the rows, as a share of the rows.
        column_spread: the same for the columns.
        flatness: log10 of the L1 norm over the L2 norm, as a share of its largest.
        peak: log10 of the largest entry over the root mean square.
        spread: log10 of the participation ratio of the entries (the inverse of kurtosis).
        faint: share of the entries that are next to zero.
        faint_columns: share of the columns that are next to zero: inputs that no record had.
    """

    tail_1: float = 0.0
    tail_4: float = 0.0
    tail_16: float = 0.0
    rank: float = 0.0
    unexplained: float = 0.0
    twins: float = 0.0
    match_02: float = 0.0
    match_10: float = 0.0
    match_30: float = 0.0
    close: float = 0.0
    aside: float = 0.0
    aside_30: float = 0.0
    faint_rows: float = 0.0
    row_spread: float = 0.0
    column_spread: float = 0.0
    flatness: float = 0.0
    peak: float = 0.0
    spread: float = 0.0
    faint: float = 0.0
    faint_columns: float = 0.0

    def vector(self) -> list[float]:
        """Return the features in the order of `FEATURES`."""
        return [float(getattr(self, name)) for name in FEATURES]


FEATURES: tuple[str, ...] = tuple(field.name for field in fields(TensorFeatures))


# Where fewer records move each feature: fewer directions, more stillness, less evenly spread.
FEWER: dict[str, int] = dict.fromkeys(FEATURES, -1) | dict.fromkeys(
    (
        "twins",
        "match_02",
        "match_10",
        "match_30",
        "aside_30",
        "faint_rows",
        "peak",
        "faint",
        "faint_columns",
    ),
    1,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The features of one tensor of an update.

    Attributes:
        names: the tensor's name, and that of its bias.
        vector: in the order of `FEATURES`.
        rank: the largest rank it can have; 1 for a vector.
        energy: its squared norm.
    """

    names: tuple[str, ...]
    vector: list[float]
    rank: int
    energy: float


def update_features(deltas: Mapping[str, Tensor], generator: torch.Generator) -> list[Measured]:
    """Measure an update.

    Args:
        deltas: name -> difference, any shape; never written. Each is asked for once, when it is
            measured, and few are held at a time; where `deltas` has an attribute `shapes`
            (name -> shape), none is asked for its shape.
        generator: draws sketches; a CPU generator of the caller.

    Raises:
        Withheld: NOT_FINITE, naming the entry.

    Returns:
        One entry per tensor (a bias with its weight), in the order of the sorted names. Tensors
        of no value, and zero ones, are left out: they tell nothing.
    """
    shapes = getattr(deltas, "shapes", None)
    if shapes is None:
        shapes = {name: delta.shape for name, delta in deltas.items()}
    entries = _entries(shapes)
    sketched = _windows([entry for entry in entries if entry.drawing])
    plain = sorted((entry for entry in entries if not entry.drawing), key=_Entry.form)
    draws = _Draws(generator)

    def start() -> Callable[[tuple[int | None, list[_Entry]]], list[Measured]]:
        desk = Desk(deltas)

        def measure(task: tuple[int | None, list[_Entry]]) -> list[Measured]:
            groups = _drawn(*task, desk, draws)
            return [entry for group in groups for entry in _measured(group)]

        return measure

    tasks = [*enumerate(sketched), *((None, window) for window in _windows(plain))]
    with torch.no_grad():
        found = share_out(tasks, start)
    return sorted(itertools.chain.from_iterable(found), key=lambda entry: entry.names)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to be measured: its name with its bias's, and its shape as a matrix or vector."""

    names: tuple[str, ...]
    rows: int
    columns: int
    is_matrix: bool

    @property
    def drawing(self) -> bool:
        """Whether it is looked at in random directions: it has more columns than those."""
        return self.is_matrix and self.columns > SKETCH

    @property
    def cost(self) -> int:
        """Values that are handled for it at a time."""
        rows = max(self.rows, SKETCH) if self.drawing else self.rows
        return rows * max(self.columns, min(self.rows, MOST_ROWS))

    @property
    def moved(self) -> tuple[str, ...]:
        """Names of what is measured: not of a weight whose bias moved alone."""
        return self.names if self.is_matrix else self.names[-1:]

    def form(self) -> tuple[int, ...]:
        """What tensors that are measured together have in common."""
        return (self.is_matrix, self.rows, self.columns, len(self.names))


def _entries(shapes: Mapping[str, torch.Size]) -> list[_Entry]:
    """Every tensor that has values, in the order of the sorted names; a bias with its weight."""
    paired = {bias_name(name): name for name in shapes if _pairs(name, shapes)}
    found = []
    for name in sorted(shapes):
        shape, other = shapes[name], bias_name(name)
        if name in paired or not shape.numel():
            continue
        names = (name, other) if paired.get(other) == name else (name,)
        rows = shape[0] if len(shape) > 1 else 1
        found.append(_Entry(names, rows, shape.numel() // rows, len(shape) > 1))
    return found


def _pairs(name: str, shapes: Mapping[str, torch.Size]) -> bool:
    other = bias_name(name)
    if other == name or other not in shapes:
        return False
    return len(shapes[name]) > 1 and shapes[other] == shapes[name][:1]


def _windows(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """Cut into runs of small tensors that are held at a time, and large ones alone."""
    cut: list[list[_Entry]] = []
    room = 0
    for entry in entries:
        cost = entry.cost
        if cost > room:
            cut.append([])
            room = GROUP
        cut[-1].append(entry)
        room -= cost
    return cut


class _Draws:
    """Random directions for windows of tensors, in the order of the windows whoever comes first.

    Windows are shared out in order, so that whoever is waited for is at work.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._turn = threading.Condition()
        self._next = 0

    def draw(self, number: int, columns: Sequence[int]) -> list[Tensor]:
        """Directions for the rows of matrices of so many columns, [columns, `SKETCH`] each.

        The next window waits until this one is `done`.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._next >= number)
            # The same numbers as one draw after the other: each is of a multiple of 16 values.
            drawn = torch.randn(sum(columns) * SKETCH, generator=self._generator, device="cpu")
        drawn /= math.sqrt(SKETCH)
        parts = torch.split(drawn, [count * SKETCH for count in columns])
        return [part.view(-1, SKETCH) for part in parts]

    def done(self, number: int) -> None:
        """Let the next window draw, whatever became of this one."""
        with self._turn:
            self._next = max(self._next, number + 1)
            self._turn.notify_all()


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors of one form, measured together."""

    entries: list[_Entry]
    batch: Batch

    def select(self, places: list[int], divisor: Tensor | None = None) -> _Group:
        """Some of them, each to be divided."""
        entries = [self.entries[place] for place in places]
        return _Group(entries, self.batch.select(places, divisor))


def _drawn(number: int | None, window: list[_Entry], desk: Desk, draws: _Draws) -> list[_Group]:
    """Ask for the tensors of a window, and draw directions for those that are not zero."""
    if number is None:
        return _groups(window, desk)
    try:
        groups = _groups(window, desk)
        moved = {entry.names for group in groups for entry in group.entries if entry.is_matrix}
        order = [entry for entry in window if entry.names in moved]
        drawn = draws.draw(number, [entry.columns for entry in order])
    finally:
        draws.done(number)
    found = dict(zip([entry.names for entry in order], drawn, strict=True))
    return [_directed(group, found) for group in groups]


def _groups(window: list[_Entry], desk: Desk) -> list[_Group]:
    """Ask for tensors and stack those of one form; a zero weight gives way to its bias."""
    alike: dict[tuple[object, ...], list[tuple[_Entry, list[Tensor]]]] = {}
    laid = desk.lay(name for entry in window for name in entry.names)
    for entry in window:
        tensors = [laid[name] for name in entry.names]
        kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
        alike.setdefault((*entry.form(), *kinds), []).append((entry, tensors))
    found = []
    while alike:  # what is stacked is let go
        group = _stacked(alike.popitem()[1])
        zero = group.batch.stack.still() if group.batch.is_matrix else []
        moved = [place for place in range(len(group.entries)) if place not in zero]
        if moved:
            found.append(group.select(moved))
        if zero and group.batch.bias is not None:
            found.append(_biases([group.entries[place] for place in zero], group.batch.bias[zero]))
    return found


def _stacked(alike: list[tuple[_Entry, list[Tensor]]]) -> _Group:
    entries = [entry for entry, _ in alike]
    dtype = wide_type(*alike[0][1])
    stack = Stack.of([tensors[0] for _, tensors in alike], entries[0].rows, dtype)
    bias = None
    if len(entries[0].names) > 1:
        bias = torch.stack([tensors[1] for _, tensors in alike]).to(stack.values.device, dtype)
    return _Group(entries, Batch(stack, bias, is_matrix=entries[0].is_matrix))


def _biases(entries: list[_Entry], bias: Tensor) -> _Group:
    """Biases whose weights did not move, as vectors."""
    columns = bias.shape[1]
    vectors = [replace(entry, rows=1, columns=columns, is_matrix=False) for entry in entries]
    return _Group(vectors, Batch(Stack.of(list(bias), 1, bias.dtype), None, is_matrix=False))


def _directed(group: _Group, drawn: Mapping[tuple[str, ...], Tensor]) -> _Group:
    if not group.entries[0].drawing:
        return group
    values = group.batch.stack.values
    directions = torch.stack([drawn[entry.names] for entry in group.entries]).to(values.device)
    return replace(
        group, batch=replace(group.batch, directions=directions.to(group.batch.stack.dtype))
    )


def _measured(group: _Group) -> list[Measured]:
    """Measure tensors of one form, each as a share where squares would leave float32.

    No feature depends on size.
    """
    seen = Survey.of(group.batch)
    sizes, divisor = seen.sizes.tolist(), group.batch.stack.divisor
    odd = [place for place, size in enumerate(sizes) if not _SAFE[0] < size < _SAFE[1]]
    if odd and divisor is None:
        rest = [place for place in range(len(sizes)) if place not in odd]
        parts = (_scaled(group, odd), group.select(rest))
        return [entry for part in parts if part.entries for entry in _measured(part)]
    features = matrix_features if group.batch.is_matrix else vector_features
    found, nothing = features(group.batch, seen), torch.zeros_like(seen.sizes)
    vectors = torch.stack([found.get(name, nothing) for name in FEATURES], dim=1).tolist()
    units = [1.0] * len(sizes) if divisor is None else divisor.tolist()
    return [
        Measured(entry.names, vector, min(entry.rows, entry.columns), (size * unit) * (size * unit))
        for entry, vector, size, unit in zip(group.entries, vectors, sizes, units, strict=True)
    ]


def _scaled(group: _Group, odd: list[int]) -> _Group:
    """Tensors of very large and small size as shares of their largest value; zero ones left out."""
    kept, shares = [], []
    for place in odd:
        peak = _peak(group, place)
        if peak:
            kept.append(place)
            shares.append(peak)
    stack = group.batch.stack
    return group.select(kept, stack.values.new_tensor(shares, dtype=stack.dtype))


def _peak(group: _Group, place: int) -> float:
    """Largest magnitude of a tensor and its bias."""
    peaks = [largest(group.batch.stack.values[place])]
    if group.batch.bias is not None:
        peaks.append(largest(group.batch.bias[place]))
    for name, peak in zip(group.entries[place].moved, peaks, strict=True):
        if not math.isfinite(peak):
            raise Withheld(
                Reason.NOT_FINITE,
                f"Entry {name!r} holds values that are not finite; nothing was scored. Check the "
                "training step for divergence.",
            )
    return max(peaks)
