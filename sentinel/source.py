"""Source: many named tensors that are read piece by piece, so that none has to be held whole.

`Held` are tensors in memory. `Differences` are `local - global` of two states, computed anew at
each reading: a raw update is as large as the model and as telling as the patients behind it, and
there is never a copy of it. What lies in a file that the system maps into memory may so be larger
than the memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sentinel.chunks import CHUNK
from sentinel.crew import share_out
from sentinel.errors import Withheld
from sentinel.spans import Span, apart, blocks, joined, parted, runs, size_of
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

_Kind = tuple[torch.dtype, torch.device, torch.device]  # of a difference, and both its devices

_SAME = 2.0**-40  # two sums of the same squares, in whatever order; the clip leaves more room


class Source(Mapping[str, torch.Tensor], ABC):
    """Named tensors, all floating; iterating gives the names, in a fixed order.

    Attributes:
        shapes: the shape of each, without reading it.
    """

    shapes: dict[str, torch.Size]

    @functools.cached_property
    def sizes(self) -> Mapping[str, int]:
        """How many values each tensor has."""
        return {name: shape.numel() for name, shape in self.shapes.items()}

    @functools.cached_property
    def _cut(self) -> list[list[Span]]:
        return blocks(self.sizes)

    def blocks(self, names: Container[str]) -> list[list[Span]]:
        """Blocks of work on some of the tensors; cut the same way whichever they are."""
        cut = ([span for span in spans if span.name in names] for spans in self._cut)
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
    def runs(
        self, spans: Iterable[Span], alike: Callable[[str], object]
    ) -> Iterator[tuple[list[Span], torch.Tensor]]:
        """The values of spans, in order: the spans of a run, and its values (values,); read only.

        The spans are of one block, one for each tensor. A run has up to `CHUNK` values, of one
        dtype and device, and of tensors for which `alike` gives the same. It is valid until the
        next is asked for. Threads may read different spans at once.
        """


class Held(Source):
    """Tensors in memory: contiguous, any floating dtype.

    Guarantees:
        What is read are the values of the tensors as they are; nothing is written to them.

    Edges:
        `runs` of one tensor alone:             a view of its values
        `runs` of a 0-d tensor:                 one value
        `runs` of a tensor without a flat view: RuntimeError
        `device` or `dtype`:                    the tensor's own
        an empty tensor:                        in no block of work
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

    def runs(
        self, spans: Iterable[Span], alike: Callable[[str], object]
    ) -> Iterator[tuple[list[Span], torch.Tensor]]:
        """The values of spans: views, or small ones copied side by side."""
        for run in runs(spans, lambda name: (self.dtype(name), self.device(name), alike(name))):
            yield run, joined({span.name: self.tensors[span.name].view(-1) for span in run}, run)


class Differences(Source):
    """`local - global`, in float32, or in float64 where one of the two is.

    Attributes:
        squares: sum of squares of each, accumulated in float64.

    Guarantees:
        A span that is read by `runs` is the one that was measured: where its sum of squares is
        another (by more than 2^-40 of itself), the states were changed since, and the reading ends
        in `Withheld`. So nothing can grow between the norm and what is scaled by it.

    Edges:
        NaN, Inf, or squares beyond float64:     NOT_FINITE, naming the entry
        `runs` of a state that was changed:      Withheld (LOCAL_MODEL_CHANGED) after the last one
        `runs` of a 0-d tensor:                  one value
        `runs` of an empty tensor:               none; its sum is 0
        `dtype` of float16 or bfloat16:          float32
        `dtype` where one of the two is float64: float64
        `write` into what was used before:       every value is written anew
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
        self._local = {name: _flat(local_state[name]) for name in names}
        self._base = {name: _flat(global_state[name]) for name in self._local}
        self._kinds = {name: _kind(new, self._base[name]) for name, new in self._local.items()}
        self.shapes = {name: local_state[name].shape for name in self._local}
        self._known: dict[Span, float] = {}
        self.squares = self._measured()

    def __getitem__(self, name: str) -> torch.Tensor:
        """Compute one difference: contiguous, in memory of its own."""
        dtype, device, _ = self._kinds[name]
        whole = torch.empty(self.shapes[name], dtype=dtype, device=device)
        self.write([name], whole.view(-1))
        return whole

    def write(self, names: Iterable[str], out: torch.Tensor) -> None:
        """Write differences one after the other into `out` (values,), of their dtype and device."""
        start = 0
        whole = (Span(name, 0, self.sizes[name]) for name in names)
        for run in runs(whole, self._kinds.__getitem__):
            stop = start + size_of(run)
            self._subtract(run, out[start:stop])
            start = stop

    def device(self, name: str) -> torch.device:
        """The device of the local state."""
        return self._kinds[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """float64 where one of the states is, else float32."""
        return self._kinds[name][0]

    def runs(
        self, spans: Iterable[Span], alike: Callable[[str], object]
    ) -> Iterator[tuple[list[Span], torch.Tensor]]:
        """The values of spans, float64.

        Raises:
            Withheld: LOCAL_MODEL_CHANGED, once the last of them was read.
        """
        asked, found = list(spans), _Squares()
        for run, wide in self._computed(asked, alike):
            found.add(run, wide)
            yield run, wide
        squares = found.by_name()
        same = (math.isclose(squares[s.name], self._known[s], rel_tol=_SAME) for s in asked)
        if not all(same):
            raise Withheld(
                Reason.LOCAL_MODEL_CHANGED,
                "The model was changed while its update was being released; nothing was released. "
                "Release once training has stopped, in every thread.",
            )

    def _computed(
        self, spans: Sequence[Span], alike: Callable[[str], object]
    ) -> Iterator[tuple[list[Span], torch.Tensor]]:
        most = min(CHUNK, size_of(spans))
        rooms: dict[_Kind, tuple[torch.Tensor, torch.Tensor]] = {}
        for run in runs(spans, lambda name: (self._kinds[name], alike(name))):
            kind, size = self._kinds[run[0].name], size_of(run)
            if kind not in rooms:
                dtype, device, _ = kind
                narrow = torch.empty(most, dtype=dtype, device=device)
                rooms[kind] = narrow, torch.empty(most, dtype=torch.float64, device=device)
            narrow, wide = rooms[kind]
            yield run, wide[:size].copy_(self._subtract(run, narrow[:size]))

    def _subtract(self, run: Sequence[Span], out: torch.Tensor) -> torch.Tensor:
        if apart(run):
            for span, part in zip(run, parted(out, run), strict=True):
                self._subtract([span], part)
            return out
        new, old = joined(self._local, run), joined(self._base, run)
        return torch.sub(new.to(out.dtype), old.to(out.device, out.dtype), out=out)

    def _measured(self) -> dict[str, float]:
        def measure(spans: list[Span]) -> dict[str, float]:
            found = _Squares()
            for run, wide in self._computed(spans, lambda _: None):
                found.add(run, wide)
            return found.by_name()

        cut = self.blocks(self.shapes)
        parts: dict[str, list[float]] = {name: [] for name in self.shapes}
        for spans, found in zip(cut, share_out(cut, lambda: measure), strict=True):
            for span in spans:
                self._known[span] = found[span.name]
                parts[span.name].append(found[span.name])
        return {name: _finite_sum(name, squares) for name, squares in parts.items()}


class _Squares:
    """Sums of squares of the tensors of one block, which are told when all were read.

    Asking a GPU for each of them would wait for it each time.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: list[torch.Tensor] = []

    def add(self, run: Sequence[Span], wide: torch.Tensor) -> None:
        """Take the values of a run, float64."""
        self._names += [span.name for span in run]
        self._sums += [torch.dot(part, part) for part in parted(wide, run)]

    def by_name(self) -> dict[str, float]:
        """The sum of all values that were taken, of each tensor."""
        found = dict.fromkeys(self._names, 0.0)
        sums = (together.tolist() for together in map(torch.stack, _by_device(self._sums)))
        for name, square in zip(self._names, itertools.chain.from_iterable(sums), strict=True):
            found[name] += square
        return found


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
            name: place.view(source.shapes[name])
            for kind, alike in kinds.items()
            for name, place in zip(alike, self._laid(kind, alike, source), strict=True)
        }

    def _laid(
        self, kind: tuple[torch.dtype, torch.device], names: list[str], source: Differences
    ) -> tuple[torch.Tensor, ...]:
        sizes = [source.sizes[name] for name in names]
        room = self._rooms.get(kind)
        if room is None or room.numel() < sum(sizes):
            dtype, device = kind
            room = self._rooms[kind] = torch.empty(sum(sizes), dtype=dtype, device=device)
        source.write(names, room[: sum(sizes)])
        return torch.split(room[: sum(sizes)], sizes)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values, row by row (values,)."""
    return tensor.detach().contiguous().view(-1)


def _kind(local: torch.Tensor, base: torch.Tensor) -> _Kind:
    wide = torch.float64 if torch.float64 in (local.dtype, base.dtype) else torch.float32
    return wide, local.device, base.device


def _by_device(sums: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one device."""
    return (list(alike) for _, alike in itertools.groupby(sums, lambda found: found.device))


def _finite_sum(name: str, parts: list[float]) -> float:
    square = sum(parts)  # infinite where it is too large; `fsum` would raise
    if not math.isfinite(square):
        raise Withheld(
            Reason.NOT_FINITE,
            f"Entry {name!r} holds values that are not finite (NaN or infinity), or too large to "
            "measure; nothing was released. Check the training step for divergence.",
        )
    return square
