"""Clipping keeps its bound, also after rounding, and is right at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentinel.chunks import CHUNK, chunks, sum_of_squares
from sentinel.mechanism import (
    Recipe,
    SystemEntropy,
    clip_factor,
    grid_step,
    rounding_reach,
    treat_all,
)
from sentinel.source import Held


def clip_to(max_norm: float, tensors: list[torch.Tensor]) -> float:
    """Scale float32 tensors in place to one joint norm; the factor."""
    factor = clip_factor([sum_of_squares(tensor) for tensor in tensors], max_norm)
    for tensor in tensors:
        tensor.mul_(factor)
    return factor


def treated(tensor: torch.Tensor, recipe: Recipe, entropy: object = None) -> torch.Tensor:
    """What a recipe makes of a copy."""
    made, _ = treat_all(Held({"t": tensor}), {"t": recipe}, entropy or SystemEntropy())
    return made["t"]


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=50),
    max_norm=st.floats(1e-6, 1e6),
)
def test_the_clipped_float32_values_obey_the_bound(values: list[float], max_norm: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    clip_to(max_norm, [tensor])
    assert math.sqrt(sum_of_squares(tensor)) <= max_norm


@pytest.mark.parametrize(("value", "max_norm"), [(3e38, 6.6e-7), (3e38, 1e-12), (1e30, 1.0)])
def test_a_factor_below_the_range_of_float32_keeps_the_bound(value: float, max_norm: float) -> None:
    tensor = torch.tensor([value, -value])
    clip_to(max_norm, [tensor])
    assert math.sqrt(sum_of_squares(tensor)) <= max_norm


def test_an_update_under_the_bound_is_left_as_it_is() -> None:
    tensor = torch.tensor([0.3, 0.4])
    assert clip_to(1.0, [tensor]) == 1.0
    assert torch.equal(tensor, torch.tensor([0.3, 0.4]))


def test_several_tensors_are_bounded_together() -> None:
    tensors = [torch.full((3,), 10.0), torch.tensor(10.0)]
    clip_to(1.0, tensors)
    assert math.sqrt(sum(map(sum_of_squares, tensors))) == pytest.approx(1.0, rel=1e-5)
    assert tensors[0][0] == tensors[1]


def test_edges_of_the_factor() -> None:
    assert clip_factor([0.0], 1.0) == 1.0
    assert clip_factor([], 1.0) == 1.0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            clip_factor([bad], 1.0)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="greater than 0"):
            clip_factor([1.0], bad)


def test_max_abs_bounds_each_coordinate() -> None:
    tensor = torch.tensor([-5.0, 0.5, 5.0], dtype=torch.float64)
    for bound in (1.0, 0.1, 0.3, 0.7):
        assert float(treated(tensor, Recipe(max_abs=bound)).abs().max()) <= bound
    assert treated(tensor, Recipe(max_abs=1.0)).tolist() == [-1.0, 0.5, 1.0]
    assert torch.equal(treated(tensor, Recipe()), tensor)


@given(max_norm=st.floats(1e-9, 1e9), coordinates=st.integers(1, 10**9))
def test_the_grid_is_a_power_of_two_and_moves_the_vector_little(
    max_norm: float, coordinates: int
) -> None:
    step = grid_step(max_norm, coordinates)
    assert math.frexp(step)[0] == 0.5
    reach = rounding_reach(step, coordinates)
    assert reach <= 2.0**-12 * max_norm < 2.0001 * reach


def test_the_mask_keeps_its_share_whatever_the_values(fixed_entropy) -> None:
    size, large = (
        treated(tensor, Recipe(keep=0.25), fixed_entropy(9))
        for tensor in (torch.ones(100_000), torch.linspace(-1e6, 1e6, 100_000))
    )
    assert (size != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(size != 0, large != 0)  # same bits, other data: the same mask
    assert set(size.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Recipe(keep=share)


def test_sums_of_squares_are_accumulated_in_float64_over_chunks() -> None:
    tensor = torch.full((3 * CHUNK + 1,), 0.1)
    assert sum(piece.numel() for piece in chunks(tensor)) == tensor.numel()
    assert sum_of_squares(tensor) == pytest.approx(
        tensor.numel() * float(tensor[0]) ** 2, rel=1e-10
    )
    assert sum_of_squares(torch.zeros(0)) == 0.0
    assert not math.isfinite(sum_of_squares(torch.tensor([math.nan])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bounded_sum_of_squares_reads_the_values_and_leaves_them(dtype: torch.dtype) -> None:
    tensor = torch.tensor([-5.0, 0.5, 2.0], dtype=dtype)
    assert sum_of_squares(tensor, 1.0) == 2.25
    assert tensor.tolist() == [-5.0, 0.5, 2.0]
