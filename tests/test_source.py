"""Differences are read piece by piece, always the same, and never held."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sentinel.crew import BLOCK
from sentinel.errors import Withheld
from sentinel.source import Differences, Held
from sentinel.terms import Reason

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
    """A tensor, from its pieces."""
    spans = [span for block in source.blocks({name}) for span in block]
    pieces = [piece.clone() for span in spans for piece in source.pieces(span)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *pieces]).view(source.shapes[name])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_pieces_and_whole_tensors_are_the_difference(dtype: torch.dtype) -> None:
    base, local = states(dtype)
    found = Differences(SIZES, local, base)
    for name in SIZES:
        wide = found.dtype(name)
        expected = local[name].to(wide) - base[name].to(wide)
        assert torch.equal(found[name], expected)
        assert torch.equal(read(found, name), expected.double())
        assert found.squares[name] == pytest.approx(float(expected.double().square().sum()))
        assert read(Held({name: expected}), name).equal(expected.double())


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
        for span in spans:
            for piece in found.pieces(span):
                assert float(piece[0]) == 1.0
                most = max(most, held())
    assert most - before < 16 << 20


def held() -> int:
    """Bytes of memory of its own that the process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    figures = dict(line.split(":", 1) for line in lines)
    return int(figures["RssAnon"].split()[0]) * 1024
