"""Spans: stretches of named tensors, and how they are cut up to be worked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sentinel.chunks import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

BLOCK = 1 << 19  # values that one thread takes at a time: some milliseconds of work

LARGE = 1 << 12  # values of a span from which a copy of it costs more than a few calls


class Span(NamedTuple):
    """Values `start` up to `stop` of the tensor `name`, flattened."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """These values of a flattened tensor: itself, or a view (values,)."""
        whole = self.stop - self.start == flat.numel()
        return flat if whole else flat[self.start : self.stop]


def blocks(sizes: Mapping[str, int]) -> list[list[Span]]:
    """Cut tensors of so many values into blocks of `BLOCK` (the last one may hold fewer), in order.

    A large tensor is spread over several blocks; a block may hold many small ones. The cut depends
    on names and sizes alone, so that what is drawn for a block is the same on any machine.
    """
    cut: list[list[Span]] = []
    room = 0
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not room:
                cut.append([])
                room = BLOCK
            stop = min(size, start + room)
            cut[-1].append(Span(name, start, stop))
            room -= stop - start
            start = stop
    return cut


def runs(spans: Iterable[Span], kind: Callable[[str], object]) -> Iterator[list[Span]]:
    """Cut spans into what is handled by one call: `CHUNK` values at most, in order.

    A large span is cut into chunks of its own, so that it need not be copied to be read; small
    neighbours stay together where their tensors are of one kind.
    """
    run: list[Span] = []
    room, last = CHUNK, None
    for span in spans:
        this, size = kind(span.name), span.size
        if run and (size > room or this != last):
            yield run
            run, room = [], CHUNK
        if size > CHUNK:
            starts = range(span.start, span.stop, CHUNK)
            yield from ([Span(span.name, at, min(at + CHUNK, span.stop))] for at in starts)
        else:
            run.append(span)
            room, last = room - size, this
    if run:
        yield run


def size_of(spans: Iterable[Span]) -> int:
    """How many values spans have together."""
    return sum([stop - start for _, start, stop in spans])


def apart(spans: Sequence[Span]) -> bool:
    """Whether spans are better handled one by one: large ones, as copies cost more than calls."""
    return len(spans) > 1 and size_of(spans) >= LARGE * len(spans)


def joined(tensors: Mapping[str, torch.Tensor], spans: Sequence[Span]) -> torch.Tensor:
    """The values of spans one after the other (values,): a view of a single one, else a copy.

    The tensors are flattened: of small ones, views cost more than the values.
    """
    parts = [span.of(tensors[span.name]) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parted(values: torch.Tensor, spans: Sequence[Span]) -> Sequence[torch.Tensor]:
    """Of values that were joined, those of each span, as views."""
    if len(spans) == 1:
        return (values,)
    return torch.split(values, [stop - start for _, start, stop in spans])
