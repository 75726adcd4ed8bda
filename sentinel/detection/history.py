"""History: what earlier global models looked like, in a few public numbers per layer.

It holds no weights: names, shapes and dtypes once; per round one log-norm per layer; of the last
round sixteen random numbers per layer, of every round sixteen for the whole model, and how far
things moved. All of it describes global models, which are public to every site. It is bounded, at
about 700 bytes a layer and 6 KiB besides (400 layers: 280 KiB), and JSON-serialisable.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sentinel.detection.layers import layers_of
from sentinel.detection.trace import LENGTH, Trace, distances, joined
from sentinel.detection.weights import SEED, measured_places
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

ROUNDS = 64  # rounds that are remembered
VERSION = 2
FADING = 0.95  # what is left of a past move after each round: of a learning rate's peak, half in 14
UNSEEN = 2e-3  # move below which sixteen numbers in half precision tell none
_LEAST = 0.01  # row norm below which a layer counts as zero: fresh zero-init layers
_DIGITS = 6  # after the point, of a log10
_COARSE = 4  # digits of a move or an offset

Shape = tuple[str, tuple[int, ...], str]  # name, shape, dtype


@dataclass(frozen=True, slots=True)
class Places:
    """Where the layers of one global model stand, in the order of the sorted layer names.

    Attributes:
        scales: log10 of each layer's root mean square row norm.
        traces: of each layer.
        offsets: median of bias / row norm of each layer, 0 without a bias.
    """

    scales: tuple[float, ...] = ()
    traces: tuple[Trace, ...] = ()
    offsets: tuple[float, ...] = ()

    @classmethod
    def of(cls, measured: Sequence[tuple[float, Trace, float]]) -> Places:
        """Keep size, trace and offset of each layer in the digits of a history."""
        return cls(
            tuple(scale_of(size) for size, _, _ in measured),
            tuple(trace for _, trace, _ in measured),
            tuple(offset_of(offset) for _, _, offset in measured),
        )

    @property
    def mark(self) -> Trace:
        """The trace of the whole model."""
        return joined(self.traces)


@dataclass(frozen=True, slots=True)
class History:
    """What is known of the global models of earlier rounds.

    Attributes:
        structure: sorted (name, shape, dtype) of the first global model: the pinned structure.
        scales: one tuple per round, oldest first: log10 of each layer's root mean square row norm,
            in the order of the sorted layer names; at most `ROUNDS`.
        last: traces and offsets of the last round; its scales are the last of `scales`.
        marks: trace of the whole model of each round, oldest first; at most `ROUNDS`.
        peaks: of each layer the largest move of a round so far, as a share of its size, fading.
        moves: how many moves have been seen.
    """

    structure: tuple[Shape, ...]
    scales: tuple[tuple[float, ...], ...] = ()
    last: Places = Places()
    marks: tuple[Trace, ...] = ()
    peaks: tuple[float, ...] = ()
    moves: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> History:
        """Begin a history with one global model."""
        return cls(structure_of(state)).after(state)

    def after(self, state: Mapping[str, Tensor]) -> History:
        """Return the history with one more round; a state of another structure adds nothing."""
        return self.joined(structure_of(state), places_of(state))

    def joined(self, structure: tuple[Shape, ...], now: Places) -> History:
        """Return the history with one more round that was measured already; see `after`."""
        if structure != self.structure:
            return self
        moved = self.moved(now)
        faded = self.peaks or (0.0,) * len(now.scales)
        peaks = tuple(
            round(max(FADING * before, move), _COARSE)
            for before, move in zip(faded, moved or faded, strict=True)
        )
        return History(
            self.structure,
            (*self.scales, now.scales)[-ROUNDS:],
            now,
            (*self.marks, now.mark)[-ROUNDS:],
            peaks,
            self.moves + bool(moved),
        )

    def moved(self, now: Places) -> tuple[float, ...]:
        """Return how far each layer moved since the last round, as a share of its size then.

        Returns:
            One for each layer, by a projection, so about; a layer that was next to nothing has
            moved by 0, since any value is far from it. Empty where there is no last round.
        """
        last = self.last
        if not now.traces or len(last.traces) != len(now.traces):
            return ()
        scales = np.array(last.scales)
        grown = 10.0 ** np.minimum(np.array(now.scales) - scales, 30.0)
        away = distances(np.array(last.traces), np.array(now.traces), grown)
        told = (scales > math.log10(_LEAST)) & np.any(last.traces, axis=1) & (away >= UNSEEN)
        return tuple(np.where(told, away, 0.0).tolist())

    def young(self) -> set[int]:
        """Return places of layers that were zero in the oldest round that is remembered."""
        if not self.scales:
            return set()
        return {place for place, scale in enumerate(self.scales[0]) if scale <= math.log10(_LEAST)}

    def to_json(self) -> str:
        """Write as one line of JSON."""
        structure, scales = _written(self.structure), ",".join(map(_written, self.scales))
        return (
            f'{{"version":{VERSION},"structure":{structure},"scales":[{scales}],'
            f'"traces":"{_packed(self.last.traces)}","offsets":{_written(self.last.offsets)},'
            f'"marks":"{_packed(self.marks)}","peaks":{_written(self.peaks)},"moves":{self.moves}}}'
        )

    @classmethod
    def from_json(cls, text: str) -> History:
        """Read what `to_json` wrote, in this version or the first one, which knew scales alone.

        Raises:
            MisuseError: the text is no history of these versions.
        """
        try:
            return cls._read(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            msg = (
                f"this is no history of version {VERSION}: the text written by History.to_json was "
                "expected; remove the file to begin a new history"
            )
            raise MisuseError(msg) from error

    @classmethod
    def _read(cls, data: Any) -> History:  # noqa: ANN401  # whatever JSON held
        if data["version"] not in {1, VERSION}:
            raise ValueError
        structure = tuple(
            (str(name), tuple(int(size) for size in shape), str(dtype))
            for name, shape, dtype in data["structure"]
        )
        scales = tuple(map(_numbers, data["scales"]))
        layers = sum(len(shape) > 1 for _, shape, _ in structure)
        if any(len(row) > layers for row in scales):
            raise ValueError
        if data["version"] == 1:  # moves are seen from the next round on
            return cls(structure, scales[-ROUNDS:])
        last = Places(
            scales[-1] if scales else (), _unpacked(data["traces"]), _numbers(data["offsets"])
        )
        peaks, moves = _numbers(data["peaks"]), int(data["moves"])
        if {len(last.traces), len(last.offsets), len(peaks)} != {len(last.scales)} or moves < 0:
            raise ValueError
        return cls(
            structure, scales[-ROUNDS:], last, _unpacked(data["marks"])[-ROUNDS:], peaks, moves
        )


def _numbers(row: Sequence[float]) -> tuple[float, ...]:
    found = tuple(map(float, row))
    if not all(map(math.isfinite, found)):
        raise ValueError
    return found


def _packed(found: tuple[Trace, ...]) -> str:
    return base64.b64encode(np.array(found, dtype="<f2").tobytes()).decode("ascii")


def _unpacked(text: str) -> tuple[Trace, ...]:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").reshape(-1, LENGTH)
    if not np.isfinite(values).all():
        raise ValueError
    return tuple(map(tuple, values.astype(float).tolist()))


@functools.lru_cache(maxsize=4 * ROUNDS)  # all but one row come back the next round
def _written(row: tuple[float, ...] | tuple[Shape, ...]) -> str:
    return json.dumps(row, separators=(",", ":"), allow_nan=False)


def structure_of(state: Mapping[str, Tensor]) -> tuple[Shape, ...]:
    """Return sorted (name, shape, dtype) of a state."""
    return tuple(
        (name, tuple(state[name].shape), str(state[name].dtype).removeprefix("torch."))
        for name in sorted(state)
    )


def places_of(state: Mapping[str, Tensor]) -> Places:
    """Return where the layers of a state stand, in one reading of it."""
    return Places.of(measured_places(layers_of(state), SEED))


def scale_of(size: float) -> float:
    """Return log10 of a layer's root mean square row norm, not below the floor.

    It is rounded: a history is written and read in every round.
    """
    return round(math.log10(max(size, _LEAST)), _DIGITS) if math.isfinite(size) else 38.0


def offset_of(value: float) -> float:
    """Return a median of bias / row norm as it is kept."""
    return round(min(max(value, -1e3), 1e3), _COARSE)
