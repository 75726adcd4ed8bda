"""Source: many named tensors that are read piece by piece, so that none has to be held whole.

`Held` are tensors in memory. `Differences` are `local - global` of two states, computed anew at
each reading: a raw update is as large as the model and as telling as the patients behind it, and
there is never a copy of it. What lies in a file that the system maps into memory may so be larger
than the memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sentinel.chunks import CHUNK, chunks
from sentinel.crew import Span, blocks, share_out
from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

_SAME = 2.0**-40  # two sums of the same squares, in whatever order; the clip leaves more room


class Source(Mapping[str, torch.Tensor], ABC):
    """Named tensors, all floating; iterating gives the names, in a fixed order.

    Attributes:
        shapes: the shape of each, without reading it.
    """

    shapes: dict[str, torch.Size]

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each tensor has."""
        return {name: shape.numel() for name, shape in self.shapes.items()}

    def blocks(self, names: Container[str]) -> list[list[Span]]:
        """Blocks of work on some of the tensors; cut the same way whichever they are."""
        cut = ([span for span in spans if span.name in names] for spans in blocks(self.sizes))
        return [spans for spans in cut if spans]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.shapes)

    @abstractmethod
    def device(self, name: str) -> torch.device:
        """Where the values of a tensor are."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is read: float32 or float64 for differences."""

    @abstractmethod
    def pieces(self, span: Span) -> Iterator[torch.Tensor]:
        """The values of a span, in order: (values,), up to `CHUNK` each; read only.

        Each is valid until the next is asked for. Threads may read different spans at once.
        """


class Held(Source):
    """Tensors in memory: contiguous, any floating dtype.

    Guarantees:
        What is read is the tensors themselves, not a copy; nothing is written to them.

    Edges:
        `pieces` of a 0-d tensor:                 one value
        `pieces` of a tensor without a flat view: RuntimeError
        `device` or `dtype`:                      the tensor's own
        an empty tensor:                          in no block of work
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Borrow the tensors."""
        self.tensors = dict(tensors)
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor itself."""
        return self.tensors[name]

    def device(self, name: str) -> torch.device:
        """Where the values of a tensor are."""
        return self.tensors[name].device

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.tensors[name].dtype

    def pieces(self, span: Span) -> Iterator[torch.Tensor]:
        """Views of the values of a span."""
        return chunks(span.of(self.tensors[span.name]))


class Differences(Source):
    """`local - global`, in float32, or in float64 where one of the two is.

    Attributes:
        squares: sum of squares of each, accumulated in float64.

    Guarantees:
        A span that is read by `pieces` is the one that was measured: where its sum of squares is
        another (by more than 2^-40 of itself), the states were changed since, and the reading ends
        in `Withheld`. So nothing can grow between the norm and what is scaled by it.

    Edges:
        NaN, Inf, or squares beyond float64:     NOT_FINITE, naming the entry
        `pieces` of a state that was changed:    Withheld (LOCAL_MODEL_CHANGED) after the last one
        `pieces` of a 0-d tensor:                one value
        `pieces` of an empty tensor:             none; its sum is 0
        `dtype` of float16 or bfloat16:          float32
        `dtype` where one of the two is float64: float64
        `put` into what was used before:         every value is written anew
        layouts other than row by row:           that tensor is copied once, and read row by row
        `device` where the two differ:           the local one's; the global values are moved to it,
                                                 piece by piece
    """

    def __init__(
        self,
        names: Iterable[str],
        local_state: Mapping[str, torch.Tensor],
        global_state: Mapping[str, torch.Tensor],
    ) -> None:
        """Measure the differences of the tensors `names`, in one pass; borrow the states.

        Raises:
            Withheld: NOT_FINITE.
        """
        self._local = {name: local_state[name].detach().contiguous() for name in names}
        self._base = {name: global_state[name].detach().contiguous() for name in self._local}
        self.shapes = {name: tensor.shape for name, tensor in self._local.items()}
        self._known: dict[Span, float] = {}
        self.squares = self._measured()

    def __getitem__(self, name: str) -> torch.Tensor:
        """Compute one difference: contiguous, in memory of its own."""
        local = self._local[name]
        return self.put(name, torch.empty(local.shape, dtype=self.dtype(name), device=local.device))

    def put(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Write one difference into `whole`: contiguous, of its shape, dtype and device."""
        pairs = zip(chunks(self._local[name]), chunks(self._base[name]), strict=True)
        for out, (new, old) in zip(chunks(whole), pairs, strict=True):
            _subtract(new, old, out)
        return whole

    def device(self, name: str) -> torch.device:
        """The device of the local state."""
        return self._local[name].device

    def dtype(self, name: str) -> torch.dtype:
        """float64 where one of the states is, else float32."""
        return _wide(self._local[name], self._base[name])

    def pieces(self, span: Span) -> Iterator[torch.Tensor]:
        """The values of a span, float64.

        Raises:
            Withheld: LOCAL_MODEL_CHANGED, once the last piece was read.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.device(span.name))
        for wide in self._computed(span):
            square += torch.dot(wide, wide)
            yield wide
        if not math.isclose(float(square), self._known[span], rel_tol=_SAME):
            raise Withheld(
                Reason.LOCAL_MODEL_CHANGED,
                "The model was changed while its update was being released; nothing was released. "
                "Release once training has stopped, in every thread.",
            )

    def _computed(self, span: Span) -> Iterator[torch.Tensor]:
        new, old = span.of(self._local[span.name]), span.of(self._base[span.name])
        room_for = min(CHUNK, new.numel())
        difference = torch.empty(room_for, dtype=_wide(new, old), device=new.device)
        wide = torch.empty(room_for, dtype=torch.float64, device=new.device)
        for theirs, ours in zip(chunks(new), chunks(old), strict=True):
            count = theirs.numel()
            yield wide[:count].copy_(_subtract(theirs, ours, difference[:count]))

    def _measured(self) -> dict[str, float]:
        def start() -> Callable[[list[Span]], list[float]]:
            return lambda spans: [self._square(span) for span in spans]

        cut = self.blocks(self.shapes)
        parts: dict[str, list[float]] = {name: [] for name in self.shapes}
        for spans, found in zip(cut, share_out(cut, start), strict=True):
            for span, square in zip(spans, found, strict=True):
                self._known[span] = square
                parts[span.name].append(square)
        return {name: _finite_sum(name, squares) for name, squares in parts.items()}

    def _square(self, span: Span) -> float:
        return float(sum(torch.dot(wide, wide) for wide in self._computed(span)))


class Desk:
    """One thread's room for the tensors that it looks at, used again for the next ones.

    Fresh memory of a tensor's size costs more time than the difference that is written to it.

    Guarantees:
        What is laid out are the values of the source. Of each dtype and device there is one room,
        as large as the most that was laid out at once.

    Edges:
        `lay` again:                    the same room; what was laid out before is gone
        `lay` of more than before:      a larger room in the place of the former
        `lay` of float32 and float64:   a room each
        `lay` of a 0-d or empty tensor: in its own shape
        `lay` of tensors in memory:     the tensors themselves
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lay out tensors of these."""
        self._tensors = tensors
        self._rooms: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def lay(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names, read only: valid until the next call."""
        source = self._tensors
        if not isinstance(source, Differences):
            return {name: source[name].detach() for name in names}
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name in names:
            kinds.setdefault((source.dtype(name), source.device(name)), []).append(name)
        return {
            name: source.put(name, place.view(source.shapes[name]))
            for kind, alike in kinds.items()
            for name, place in zip(alike, self._places(kind, alike, source), strict=True)
        }

    def _places(
        self, kind: tuple[torch.dtype, torch.device], names: list[str], source: Differences
    ) -> tuple[torch.Tensor, ...]:
        sizes = [source.shapes[name].numel() for name in names]
        room = self._rooms.get(kind)
        if room is None or room.numel() < sum(sizes):
            dtype, device = kind
            room = self._rooms[kind] = torch.empty(sum(sizes), dtype=dtype, device=device)
        return torch.split(room[: sum(sizes)], sizes)


def _wide(local: torch.Tensor, base: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (local.dtype, base.dtype) else torch.float32


def _subtract(new: torch.Tensor, old: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.sub(new.to(out.dtype), old.to(out.device, out.dtype), out=out)


def _finite_sum(name: str, parts: list[float]) -> float:
    square = sum(parts)  # infinite where it is too large; `fsum` would raise
    if not math.isfinite(square):
        raise Withheld(
            Reason.NOT_FINITE,
            f"Entry {name!r} holds values that are not finite (NaN or infinity), or too large to "
            "measure; nothing was released. Check the training step for divergence.",
        )
    return square
