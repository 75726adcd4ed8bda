"""History: what earlier global models looked like, in a few public numbers per layer.

It holds no weights: names, shapes and dtypes once, and per round one log-norm per layer. All of it
describes global models, which are public to every site. It is bounded and JSON-serialisable.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sentinel.detection.layers import layers_of, wide_type
from sentinel.detection.stack import Stack
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ROUNDS = 64  # rounds that are remembered
VERSION = 1
_LEAST = 0.01  # row norm below which a layer counts as zero: fresh zero-init layers
_DIGITS = 6  # after the point, of a log10

Shape = tuple[str, tuple[int, ...], str]  # name, shape, dtype


@dataclass(frozen=True, slots=True)
class History:
    """What is known of the global models of earlier rounds.

    Attributes:
        structure: sorted (name, shape, dtype) of the first global model: the pinned structure.
        scales: one tuple per round, oldest first: log10 of each layer's root mean square row norm,
            in the order of the sorted layer names; at most `ROUNDS`.
    """

    structure: tuple[Shape, ...]
    scales: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> History:
        """Begin a history with one global model."""
        return cls(structure_of(state), (scales_of(state),))

    def after(self, state: Mapping[str, Tensor]) -> History:
        """Return the history with one more round; a state of another structure adds nothing."""
        return self.joined(structure_of(state), scales_of(state))

    def joined(self, structure: tuple[Shape, ...], scales: tuple[float, ...]) -> History:
        """Return the history with one more round that was measured already; see `after`."""
        if structure != self.structure:
            return self
        return History(self.structure, (*self.scales, scales)[-ROUNDS:])

    def to_json(self) -> str:
        """Write as one line of JSON."""
        structure, scales = _written(self.structure), ",".join(map(_written, self.scales))
        return f'{{"version":{VERSION},"structure":{structure},"scales":[{scales}]}}'

    @classmethod
    def from_json(cls, text: str) -> History:
        """Read what `to_json` wrote.

        Raises:
            MisuseError: the text is no history of this version.
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
        if data["version"] != VERSION:
            raise ValueError
        structure = tuple(
            (str(name), tuple(int(size) for size in shape), str(dtype))
            for name, shape, dtype in data["structure"]
        )
        scales = tuple(tuple(map(float, row)) for row in data["scales"])
        finite = all(all(map(math.isfinite, row)) for row in scales)
        layers = sum(len(shape) > 1 for _, shape, _ in structure)
        if not finite or any(len(row) > layers for row in scales):
            raise ValueError
        return cls(structure, scales[-ROUNDS:])


@functools.lru_cache(maxsize=4 * ROUNDS)  # all but one row come back the next round
def _written(row: tuple[float, ...] | tuple[Shape, ...]) -> str:
    return json.dumps(row, separators=(",", ":"), allow_nan=False)


def structure_of(state: Mapping[str, Tensor]) -> tuple[Shape, ...]:
    """Return sorted (name, shape, dtype) of a state."""
    return tuple(
        (name, tuple(state[name].shape), str(state[name].dtype).removeprefix("torch."))
        for name in sorted(state)
    )


def scales_of(state: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return log10 of each layer's root mean square row norm, not below the floor."""
    sizes = []
    for layer in layers_of(state):
        stack = Stack.of([layer.weight], layer.units, wide_type(layer.weight))
        squares = [
            torch.linalg.vector_norm(stack.part(rows)).double().square()
            for rows in stack.row_slabs()
        ]
        sizes.append(math.sqrt(math.fsum(map(float, squares)) / layer.units))
    return tuple(map(scale_of, sizes))


def scale_of(size: float) -> float:
    """Return log10 of a layer's root mean square row norm, not below the floor.

    It is rounded: a history is written and read in every round.
    """
    return round(math.log10(max(size, _LEAST)), _DIGITS) if math.isfinite(size) else 38.0
