"""Differences are read piece by piece, always the same, and never held."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.errors import Withheld
from sentinel.source import Desk, Differences, Held
from sentinel.spans import BLOCK, Span, parted
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Collection

SIZES = {"small": (3, 5), "none": (0, 4), "large": (BLOCK + 70_001,), "one": (), "b": (BLOCK,)}


def states(dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SIZES.items()
    }
    local = {
        name: value + torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in base.items()
    }
    return base, local


def read(source: Held | Differences, name: str) -> torch.Tensor:
    """A tensor, from its runs."""
    return read_together(source, {name})[name]


def read_together(source: Held | Differences, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Tensors, from runs that may hold several of them."""
    found = {name: [torch.zeros(0, dtype=torch.float64)] for name in names}
    for block in source.blocks(names):
        for run, values in source.runs(block, lambda _: None):
            for span, part in zip(run, parted(values, run), strict=True):
                found[span.name].append(part.clone())
    return {name: torch.cat(parts).view(source.shapes[name]) for name, parts in found.items()}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_runs_and_whole_tensors_are_the_difference(dtype: torch.dtype) -> None:
    base, local = states(dtype)
    found = Differences(SIZES, local, base)
    for name in SIZES:
        wide = found.dtype(name)
        expected = local[name].to(wide) - base[name].to(wide)
        assert torch.equal(found[name], expected)
        assert torch.equal(read(found, name), expected.double())
        assert found.squares[name] == pytest.approx(float(expected.double().square().sum()))
        assert read(Held({name: expected}), name).equal(expected.double())
        assert read_together(found, list(SIZES))[name].equal(expected.double())


def test_small_tensors_of_several_dtypes_are_read_together_by_kind() -> None:
    """None of them takes a value of its neighbour's, or is rounded to its neighbour's dtype."""
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float64)
    base = {
        f"{place} {kind}": torch.full((3,), 0.3, dtype=kind) for place, kind in enumerate(kinds)
    }
    local = {name: value + 1.7 + place for place, (name, value) in enumerate(base.items())}
    found = Differences(base, local, base)
    asked = [span for block in found.blocks(base) for span in block]
    together = [[span.name for span in run] for run, _ in found.runs(asked, lambda _: None)]
    names = list(base)
    assert together == [names[:1], names[1:2], names[2:4], names[4:]]
    for name, value in read_together(found, names).items():
        assert torch.equal(value, found[name].double())
    held = Held({name: found[name] for name in names})
    assert all(read_together(held, names)[name].equal(found[name].double()) for name in names)
    apart = [run for run, _ in found.runs(asked, lambda name: name)]
    assert apart == [[span] for span in asked]


def test_a_tensor_with_gaps_or_of_another_layout_is_read_in_the_order_of_its_values() -> None:
    whole = torch.arange(48.0).view(2, 4, 3, 2)
    local = {"last": whole.to(memory_format=torch.channels_last), "gaps": torch.arange(10.0)[::2]}
    base = {"last": torch.zeros(2, 4, 3, 2), "gaps": torch.zeros(5)}
    found = Differences(base, local, base)
    assert torch.equal(found["last"], whole)
    assert torch.equal(read(found, "last"), whole.double())
    assert torch.equal(read(found, "gaps"), local["gaps"].double())


def test_the_cut_is_the_same_whichever_tensors_are_read() -> None:
    """What was measured can be met again where a rule keeps some of the tensors here."""
    base, local = states()
    found = Differences(SIZES, local, base)
    alone = [span for name in SIZES for block in found.blocks({name}) for span in block]
    together = [span for block in found.blocks(SIZES) for span in block]
    assert sorted(alone, key=str) == sorted(together, key=str)


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK + 70_000])
@pytest.mark.parametrize("changed", ["local", "global"])
def test_a_state_that_changes_after_it_was_measured_is_not_read_to_the_end(
    place: int, changed: str
) -> None:
    """Otherwise what is scaled could be larger than the norm that it is scaled by."""
    base, local = states()
    found = Differences(SIZES, local, base)
    (local if changed == "local" else base)["large"][place] += 0.01
    with pytest.raises(Withheld) as caught:
        read(found, "large")
    assert caught.value.reason is Reason.LOCAL_MODEL_CHANGED
    assert torch.equal(read(found, "small"), found["small"].double())


@pytest.mark.parametrize("joined", ["b", "c"])
def test_small_tensors_that_change_after_they_were_measured_are_told_one_by_one(
    joined: str,
) -> None:
    """Also where their sum stays what it was: each has a bound of its own."""
    base = {name: torch.zeros(4) for name in "abcd"}
    local = {name: torch.full((4,), float(place)) for place, name in enumerate("abcd")}
    found = Differences(base, local, base)
    (block,) = found.blocks(base)
    assert [len(run) for run, _ in found.runs(block, lambda _: None)] == [4]
    first, second = local["a"].clone(), local[joined].clone()
    local["a"].copy_(second)
    local[joined].copy_(first)
    with pytest.raises(Withheld) as caught:
        list(found.runs(block, lambda _: None))
    assert caught.value.reason is Reason.LOCAL_MODEL_CHANGED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_what_cannot_be_measured_is_refused_by_name(bad: float) -> None:
    base = {"fine": torch.zeros(2), "w": torch.zeros(BLOCK + 9, dtype=torch.float64)}
    local = {name: value.clone() for name, value in base.items()}
    local["w"][BLOCK + 3] = bad
    with pytest.raises(Withheld, match="'w'") as caught:
        Differences(base, local, base)
    assert caught.value.reason is Reason.NOT_FINITE


def test_reading_holds_a_piece_at_a_time() -> None:
    """Measured by what the process holds: 64 MiB of differences, read twice, cost a few."""
    base = {str(i): torch.zeros(1 << 20) for i in range(16)}
    local = {name: value + 1 for name, value in base.items()}
    Differences(base, local, base)  # threads and kernels are there
    before = held()
    found = Differences(base, local, base)
    most = held()
    for spans in found.blocks(base):
        for _, values in found.runs(spans, lambda _: None):
            assert float(values[0]) == 1.0
            most = max(most, held())
    assert most - before < 16 << 20


def held() -> int:
    """Bytes of memory of its own that the process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    figures = dict(line.split(":", 1) for line in lines)
    return int(figures["RssAnon"].split()[0]) * 1024


def test_held_tensors_are_read_where_they_lie() -> None:
    tensors = {"one": torch.tensor(3.0), "none": torch.zeros(0, 4), "w": torch.ones(5)}
    source = Held(tensors)
    assert all(source[name] is tensors[name] for name in source)
    spans = [span for block in source.blocks(tensors) for span in block]
    assert {span.name for span in spans} == {"one", "w"}
    for span in spans:
        ((_, piece),) = source.runs([span], lambda _: None)
        assert piece.data_ptr() == tensors[span.name].data_ptr()
        assert piece.numel() == tensors[span.name].numel()
        kind = (source.dtype(span.name), source.device(span.name))
        assert kind == (torch.float32, torch.device("cpu"))


def test_held_tensors_that_have_no_flat_view_are_not_read() -> None:
    source = Held({"w": torch.ones(2, 3).t()})
    with pytest.raises(RuntimeError, match="view"):
        list(source.runs([Span("w", 0, 6)], lambda _: None))


def test_differences_have_the_wider_of_two_dtypes_and_the_device_of_the_local_state() -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for ours in kinds:
        for theirs in kinds:
            base, local = {"w": torch.zeros(2, dtype=ours)}, {"w": torch.ones(2, dtype=theirs)}
            found = Differences(base, local, base)
            wide = torch.float64 if torch.float64 in (ours, theirs) else torch.float32
            assert found.dtype("w") == found["w"].dtype == wide
            assert found.device("w") == local["w"].device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("at", ["cpu", "cuda"])
def test_differences_are_where_the_local_state_is(at: str) -> None:
    base, local = states()
    expected = Differences(SIZES, local, base)
    other = "cuda" if at == "cpu" else "cpu"
    found = Differences(
        SIZES,
        {name: value.to(at) for name, value in local.items()},
        {name: value.to(other) for name, value in base.items()},
    )
    for name in SIZES:
        assert found.device(name).type == found[name].device.type == at
        assert torch.equal(found[name].cpu(), expected[name])


def test_a_difference_is_written_over_all_that_was_there() -> None:
    base, local = states()
    found = Differences(SIZES, local, base)
    for name in SIZES:
        whole = torch.full(found.shapes[name], math.nan, dtype=found.dtype(name))
        found.write([name], whole.view(-1))
        assert torch.equal(whole, found[name])


def test_a_desk_has_one_room_for_each_kind_that_grows_to_the_most() -> None:
    base, local = states()
    wide = {f"wide {name}": value.double() for name, value in local.items()}
    base |= {name: torch.zeros_like(value) for name, value in wide.items()}
    found = Differences(base, local | wide, base)
    desk = Desk(found)
    rooms = []
    for names in (["small"], ["one", "none"], ["b", "wide small"], list(base), ["small"]):
        laid = desk.lay(names)
        assert laid.keys() == set(names)
        for name, value in laid.items():
            assert value.shape == found.shapes[name]
            assert torch.equal(value, found[name])
        rooms.append({kind: place.numel() for kind, place in desk._rooms.items()})
    most = sum(value.numel() for value in local.values())
    assert rooms[0] == rooms[1] == {(torch.float32, torch.device("cpu")): 15}
    assert list(rooms[2].values()) == [BLOCK, 15]
    assert list(rooms[3].values()) == list(rooms[4].values()) == [most, most]


def test_what_was_laid_out_before_is_gone() -> None:
    base, local = states()
    desk = Desk(Differences(SIZES, local, base))
    first = desk.lay(["small"])["small"]
    second = desk.lay(["one"])["one"]
    assert second.data_ptr() == first.data_ptr()
    assert first.view(-1)[0] == second


def test_tensors_in_memory_are_laid_out_as_they_are() -> None:
    held = {"w": torch.ones(3)}
    for source in (held, Held(held)):
        assert Desk(source).lay(["w"])["w"].data_ptr() == held["w"].data_ptr()
