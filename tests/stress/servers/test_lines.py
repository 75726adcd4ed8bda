"""Lines have the published shapes, and cuts are quantiles along them."""

from __future__ import annotations

import pytest
import torch

from sentinel.stress.servers.lines import Direction, apart, cuts_at, line_of, middles


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_line_gives_the_mean_and_the_others_have_length_one() -> None:
    row = torch.randn(20, generator=seeded(1))
    assert torch.isclose(line_of(Direction.MEAN, 20, seeded(2)) @ row, row.mean())
    for direction in (Direction.GAUSSIAN, Direction.COSINE):
        assert float(line_of(direction, 20, seeded(2)).norm()) == pytest.approx(1.0)
    assert float(line_of(Direction.COSINE, 20, seeded(2)).sum()) == pytest.approx(0.0, abs=1e-5)


def test_cuts_split_a_sample_evenly_and_without_one_a_standard_normal() -> None:
    line = line_of(Direction.GAUSSIAN, 20, seeded(2))
    rows = torch.randn(20_000, 20, generator=seeded(3))
    for inputs in (rows, None):
        passed = (rows @ line > cuts_at(middles(10), line, inputs)[:, None]).float().mean(1)
        assert torch.allclose(passed, 1 - middles(10), atol=0.02)


def test_levels_for_a_cohort_lie_one_record_apart_around_the_middle() -> None:
    levels = apart(10, 200)
    assert torch.allclose(levels.diff(), torch.full((9,), 1 / 200), atol=1e-6)
    assert float(levels.mean()) == pytest.approx(0.5)
    assert torch.equal(apart(10, 10), middles(10))
