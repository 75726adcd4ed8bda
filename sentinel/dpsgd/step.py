"""Step: from what the taps saw of one batch to a private average gradient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sentinel.dpsgd import clipping, layers
from sentinel.dpsgd.clipping import Lookup, Outer, Rows, Whole
from sentinel.mechanism import add_noise_

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from sentinel.dpsgd.clipping import ClippedSum, Part
    from sentinel.dpsgd.taps import Capture
    from sentinel.mechanism import Entropy

_WRITTEN_OUT = 1 << 21  # values of gradients that are written out at a time: 8 MiB
_MOST_ROWS = 256  # rows at a time: the inner products of a unit's rows grow with their square


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter's values stand in the sum."""

    parameter: nn.Parameter
    begin: int
    end: int


def slots_of(parameters: Sequence[nn.Parameter]) -> tuple[Slot, ...]:
    """One parameter after the other."""
    slots, begin = [], 0
    for parameter in parameters:
        slots.append(Slot(parameter, begin, begin + parameter.numel()))
        begin += parameter.numel()
    return tuple(slots)


@dataclass(frozen=True, slots=True)
class _Use:
    """One use of a parameter by a layer: its name there, and what the layer saw."""

    name: str
    capture: Capture


_Uses = dict[Slot, list[_Use]]


def add_batch_(
    total: ClippedSum, places: Sequence[Slot], captures: Sequence[Capture], rows: Tensor
) -> None:
    """Clip and add a batch, a few units at a time.

    Args:
        total: the sum so far.
        places: of the parameters in the sum.
        captures: what the layers saw.
        rows: which of the batch's units each of its rows is of, rising from 0 by 0 or 1; -1 for
            rows that are nobody's, at the end. On the CPU.
    """
    uses = _by_parameter(places, captures)
    for first, end in _few(rows, uses):
        slots = rows[first:end] - rows[first]
        units = int(slots[-1]) + 1
        few = Rows(slots.to(total.values.device), units)
        clipping.clip_and_add_(total, list(_parts(uses, (first, end), few)), units)


def _by_parameter(places: Sequence[Slot], captures: Sequence[Capture]) -> _Uses:
    """Where each parameter was used; those that were not used have no gradient."""
    by_id = {id(place.parameter): place for place in places}
    uses: _Uses = {}
    for capture in captures:
        for name, parameter in layers.own_parameters(capture.layer).items():
            uses.setdefault(by_id[id(parameter)], []).append(_Use(name, capture))
    return uses


def _few(rows: Tensor, uses: _Uses) -> Iterator[tuple[int, int]]:
    """Rows of whole units, few enough to be written out."""
    written = sum(place.end - place.begin for place, used in uses.items() if _is_whole(used))
    most = min(_MOST_ROWS, max(1, _WRITTEN_OUT // max(1, written)))
    begins = _begins(rows)
    first = 0
    for begin, end in itertools.pairwise(begins):
        if end - first > most and begin > first:
            yield first, begin
            first = begin
    if begins[-1] > first:
        yield first, begins[-1]


def _begins(rows: Tensor) -> list[int]:
    """The first row of each unit, and the end of the last one."""
    owners = rows.numpy()
    owners = owners[owners >= 0]
    changes = np.flatnonzero(owners[1:] != owners[:-1]) + 1
    return [0, *changes.tolist(), len(owners)] if len(owners) else [0]


def _is_whole(used: list[_Use]) -> bool:
    """Whether a parameter's gradients have to be written out."""
    if len(used) > 1:
        return True
    layer = used[0].capture.layer
    return not (layers.is_outer(layer, used[0].capture.inputs) or layers.is_lookup(layer))


def _parts(uses: _Uses, span: tuple[int, int], rows: Rows) -> Iterator[tuple[Part, float]]:
    """The gradients of the units in some rows, and by what to multiply them."""
    outer: dict[int, tuple[Capture, dict[str, int]]] = {}  # a Linear's weight and bias together
    for place, used in uses.items():
        capture = used[0].capture
        joined = outer.get(id(capture))
        if joined is not None:
            joined[1][used[0].name] = place.begin
            continue
        seen = capture.seen(*span)
        if seen is None or len(used) > 1:
            yield Whole(place.begin, _written_out(place.parameter, used, span), rows), 1.0
        elif _is_whole(used):
            found = layers.gradients(capture.layer, *seen, used[0].name)
            yield Whole(place.begin, found, rows), capture.scale
        elif layers.is_lookup(capture.layer):
            shape = (place.parameter.shape[0], place.parameter.shape[1])
            looked_up = layers.lookups(capture.layer, *seen)
            yield Lookup(place.begin, shape, looked_up, rows), capture.scale
        else:
            outer[id(capture)] = capture, {used[0].name: place.begin}
    for capture, begins in outer.values():
        seen = capture.seen(*span)
        assert seen is not None  # noqa: S101 - else it is not in `outer`
        yield Outer((begins.get("weight"), begins.get("bias")), *seen, rows), capture.scale


def _written_out(parameter: nn.Parameter, used: list[_Use], span: tuple[int, int]) -> Tensor:
    """The sum of all uses, (rows, values); rows that a use did not see get nothing from it."""
    first, end = span
    total: Tensor | None = None
    for use in used:
        capture = use.capture
        begin, stop = max(first, capture.first), min(end, capture.first + len(capture.inputs))
        seen = capture.seen(begin, stop) if begin < stop else None
        if seen is None:
            continue
        found = layers.gradients(capture.layer, *seen, use.name).flatten(1) * capture.scale
        if total is None and (begin, stop) == span:
            total = found
            continue
        if total is None:
            total = found.new_zeros(end - first, parameter.numel())
        total[begin - first : stop - first] += found
    if total is None:
        return parameter.detach().new_zeros(end - first, parameter.numel())
    return total


def noised_average(total: ClippedSum, divisor: int, entropy: Entropy) -> Tensor:
    """Add noise to a sum of clipped gradients and divide; uses the sum up.

    Args:
        total: the sum.
        divisor: public: the expected units in a batch, never how many there were.
        entropy: where the noise comes from.

    Returns:
        (coordinates,) float64.

    Guarantees:
        The sum is rounded to the grid that its bound names and gets one draw of noise for each
        coordinate (`sentinel.mechanism.add_noise_`). Everything after is post-processing. An empty
        batch gives noise alone.
    """
    clip = total.bound
    add_noise_(total.values, clip.noise_multiplier, clip.step, entropy)
    return total.values.mul_(clip.clip_norm / divisor)
