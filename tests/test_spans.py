"""Spans: every value is in one block and one run, and large tensors are not copied to be read."""

from __future__ import annotations

import torch

from sentinel.chunks import CHUNK
from sentinel.spans import BLOCK, Span, blocks, joined, parted, runs


def test_blocks_cover_every_value_once_and_hold_no_more_than_their_room() -> None:
    sizes = {"a": 3, "none": 0, "large": 2 * BLOCK + 5, "b": BLOCK - 8, "c": 7}
    cut = blocks(sizes)
    assert all(sum(span.stop - span.start for span in block) <= BLOCK for block in cut)
    for name, size in sizes.items():
        places = [at for block in cut for s in block if s.name == name for at in (s.start, s.stop)]
        assert places == sorted(places)
        assert sum(s.stop - s.start for block in cut for s in block if s.name == name) == size


def test_runs_hold_every_value_once_in_order_and_no_more_than_a_chunk() -> None:
    spans = [Span("a", 0, 3), Span("b", 5, CHUNK + 9), Span("c", 0, CHUNK - 2), Span("d", 0, 1)]
    spans += [Span("large", 7, 2 * CHUNK + 8), Span("e", 0, 2), Span("f", 0, CHUNK)]
    cut = list(runs(spans, lambda _: None))
    assert all(sum(span.size for span in run) <= CHUNK for run in cut)
    values = [(s.name, at) for run in cut for s in run for at in (s.start, s.stop)]
    assert values == [
        ("a", 0), ("a", 3),
        ("b", 5), ("b", 5 + CHUNK), ("b", 5 + CHUNK), ("b", CHUNK + 9),
        ("c", 0), ("c", CHUNK - 2), ("d", 0), ("d", 1),
        ("large", 7), ("large", 7 + CHUNK), ("large", 7 + CHUNK), ("large", 7 + 2 * CHUNK),
        ("large", 7 + 2 * CHUNK), ("large", 2 * CHUNK + 8),
        ("e", 0), ("e", 2), ("f", 0), ("f", CHUNK),
    ]  # fmt: skip
    assert [[span.name for span in run] for run in cut].count(["c", "d"]) == 1


def test_tensors_of_another_kind_are_in_another_run() -> None:
    spans = [Span(name, 0, 2) for name in "aabbab"]
    assert [len(run) for run in runs(spans, str)] == [2, 2, 1, 1]


def test_a_span_alone_is_read_where_it_lies_and_several_are_parted_as_they_were_joined() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor([7.0]), "none": torch.zeros(0)}
    alone = [Span("a", 1, 4)]
    assert joined(tensors, alone).data_ptr() == tensors["a"][1:].data_ptr()
    several = [*alone, Span("b", 0, 1), Span("a", 4, 6)]
    values = joined(tensors, several)
    assert values.tolist() == [1.0, 2.0, 3.0, 7.0, 4.0, 5.0]
    assert [part.tolist() for part in parted(values, several)] == [
        [1.0, 2.0, 3.0],
        [7.0],
        [4.0, 5.0],
    ]
