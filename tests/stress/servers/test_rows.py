"""Rows are chosen, shaken and scaled in the measure asked for."""

from __future__ import annotations

import torch

from sentinel.stress.servers.rows import (
    Stealth,
    crafted_rows,
    even_column,
    jittered_rows,
    row_factors,
    row_scales,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_share_of_the_rows_is_crafted_in_order_unless_permuted() -> None:
    plain = crafted_rows(100, Stealth(rows=0.25), seeded(1))
    mixed = crafted_rows(100, Stealth(permute=True, rows=0.25), seeded(1))
    assert len(plain) == 25
    assert (plain.diff() > 0).all()
    assert not torch.equal(plain, mixed)
    assert torch.equal(plain, mixed.sort().values)
    assert len(crafted_rows(100, Stealth(rows=0.0), seeded(1))) == 2  # a pair, at least


def test_jitter_is_relative_to_each_row_s_own_size() -> None:
    rows = torch.ones(2, 4000) * torch.tensor([[1.0], [100.0]])
    noise = jittered_rows(rows, 0.1, seeded(1)) - rows
    assert torch.allclose(noise.std(1), torch.tensor([0.1, 10.0]), rtol=0.1)


def test_scales_lie_in_their_spread_and_half_of_the_factors_are_turned() -> None:
    scales = row_scales(4000, 1.0, seeded(1)).log()
    assert scales.abs().max() <= 1.0
    assert scales.abs().mean() > 0.4
    factors = row_factors(4000, Stealth(flip=0.5), seeded(1))
    assert 0.45 < (factors < 0).float().mean() < 0.55


def test_an_even_column_before_a_softmax_alternates() -> None:
    """Its gradients sum to zero over the classes, so an equal column would read nothing."""
    assert even_column(4, is_last=True).tolist() == [1, -1, 1, -1]
    assert even_column(4, is_last=False).tolist() == [1, 1, 1, 1]
    assert even_column(1, is_last=True).tolist() == [1]
