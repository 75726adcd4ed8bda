"""A sketch tells the size of a step of the global model, and what two steps share."""

from __future__ import annotations

import math

import pytest
import torch

from sentinel.adaptive import sketch
from sentinel.adaptive.sketch import WIDTH

EXPECTED = (-1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0)


def sketched(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sketch({"w": tensor}, ["w"]), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 255, 257, 70_000, 1_000_000])
def test_a_sketch_keeps_the_norm(count: int) -> None:
    """Within 5 standard deviations of 9 %, for noise and for a constant."""
    generator = torch.Generator().manual_seed(count)
    for tensor in (torch.randn(count, generator=generator), torch.ones(count)):
        ratio = float(sketched(tensor).norm() ** 2 / tensor.double().norm() ** 2)
        assert ratio == pytest.approx(1.0, abs=5 * math.sqrt(2 / WIDTH))


def test_a_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 100_000, generator=generator)
    shared = one + other
    left, right = sketched(one), sketched(shared)
    truth = float(torch.dot(one, shared) / one.norm() / shared.norm())
    assert float(torch.dot(left, right) / left.norm() / right.norm()) == pytest.approx(
        truth, abs=5 / math.sqrt(WIDTH)
    )


def test_the_sketch_of_a_difference_is_the_difference_of_the_sketches() -> None:
    generator = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 3, 1000, generator=generator, dtype=torch.float64)
    assert torch.allclose(sketched(one - other), sketched(one) - sketched(other), atol=1e-9)


def test_a_sketch_is_the_same_in_every_process() -> None:
    """It is kept on disk; a change of the signs would make every next step look huge."""
    assert sketch({"w": torch.ones(8)}, ["w"])[:8] == EXPECTED
    assert sketch({"v": torch.ones(8)}, ["v"])[:8] != EXPECTED


def test_a_sketch_is_of_the_named_tensors_alone() -> None:
    state = {"a": torch.ones(300), "b": torch.full((5,), 7.0), "c": torch.zeros(0)}
    assert sketch(state, ["b", "a"]) == sketch({**state, "d": torch.ones(9)}, ["a", "b"])
    assert sketch(state, ["a"]) != sketch(state, ["a", "b"])
    assert sketch(state, ["c"]) == (0.0,) * WIDTH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sketch_changes_nothing_and_reads_any_layout(dtype: torch.dtype) -> None:
    tensor = torch.arange(600.0).view(20, 30).to(dtype)
    before = tensor.clone()
    assert torch.equal(sketched(tensor.t()), sketched(tensor.t().contiguous()))
    assert torch.equal(tensor, before)
