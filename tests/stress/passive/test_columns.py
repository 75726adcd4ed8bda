"""Columns are learnt from reference rows, and right guesses are counted beside chance."""

from __future__ import annotations

import pytest
import torch

from sentinel.demo import cohorts
from sentinel.errors import MisuseError
from sentinel.stress.passive.columns import TOLERANCE, Table, recovery

ROWS = cohorts.load("cleveland").rows


def test_the_heart_table_has_eight_categories_and_five_continuous_columns() -> None:
    columns = Table.learnt(ROWS).columns
    names = [feature.name for feature in cohorts.FEATURES]
    continuous = {name for name, column in zip(names, columns, strict=True) if column.continuous}
    assert continuous == {"age", "trestbps", "chol", "thalach", "oldpeak"}
    sex = columns[names.index("sex")]
    assert sex.levels[:, 0].tolist() == [-1.0, 1.0]
    assert float(sex.shares.sum()) == pytest.approx(1.0)


def test_a_one_hot_column_is_one_category() -> None:
    codes = torch.eye(3)[torch.tensor([0, 1, 2, 1, 1])]
    age = torch.linspace(-1, 1, 5)[:, None]
    table = Table.learnt(torch.cat([age, codes], 1), widths=[1, 3], most_levels=3)
    assert table.latents == 1 + 3
    assert table.guess[1:].tolist() == [0.0, 1.0, 0.0]
    soft = table.soften(torch.zeros(1, 4))
    assert soft[0, 1:].tolist() == pytest.approx([1 / 3] * 3)
    assert table.snapped(torch.tensor([[0.3, 0.9, 0.2, 0.1]]))[0, 1:].tolist() == [1.0, 0.0, 0.0]


def test_softened_rows_of_certain_logits_are_the_rows() -> None:
    table = Table.learnt(ROWS)
    row, latent = ROWS[0], []
    for column, value in zip(table.columns, table.split(row), strict=True):
        if column.continuous:
            latent.append((value - column.mean) / column.spread)
        else:
            latent.append(-1e3 * (column.levels[:, 0] - value).abs())
    assert torch.allclose(table.soften(torch.cat(latent)), row, atol=1e-5)


def test_the_mean_of_a_normal_column_is_right_for_a_quarter() -> None:
    values = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    right = (values.abs() <= TOLERANCE).float().mean()
    assert float(right) == pytest.approx(0.25, abs=0.01)
    column = Table.learnt(values).columns[0]
    assert float(column.right(column.guess, values).float().mean()) >= 0.24


def test_true_rows_in_any_order_are_all_recovered_and_other_patients_are_not() -> None:
    table = Table.learnt(ROWS)
    found = recovery(ROWS[:8].flip(0), ROWS[:8], ROWS[100:180], table)
    assert (found.rows.hits, found.rows.trials) == (8, 8)
    assert found.accuracy == 1.0
    assert (found.others.hits, found.others.trials) == (0, 80)
    assert found.by_marginals.hits == 0
    assert 0.3 < found.accuracy_by_marginals < 0.7
    assert found.over_others.low > 0.0
    assert (found + found).rows.trials == 16


def test_guesses_by_the_marginals_are_no_better_than_the_marginals() -> None:
    table = Table.learnt(ROWS[100:])
    found = recovery(table.guess.expand(8, -1), ROWS[:8], ROWS[100:180], table)
    assert found.rows == found.by_marginals
    assert found.columns == found.columns_by_marginals
    assert found.over_marginals.low < 0.0


def test_a_mean_over_columns_overstates_what_was_recovered() -> None:
    """Other patients' own rows get half of the columns right, and hardly a whole row."""
    table = Table.learnt(ROWS)
    found = recovery(ROWS[100:132], ROWS[:32], ROWS[200:], table)
    assert found.accuracy > 0.5
    assert found.rows.hits == 0


def test_a_column_may_take_all_features() -> None:
    assert len(Table.learnt(ROWS, [13]).columns) == 1


@pytest.mark.parametrize("widths", [[1] * 12, [2] * 7])
def test_widths_that_do_not_add_up_are_refused(widths: list[int]) -> None:
    with pytest.raises(MisuseError, match="widths add up"):
        Table.learnt(ROWS, widths)


def test_one_row_is_too_few_to_learn_from() -> None:
    with pytest.raises(MisuseError, match="at least two rows"):
        Table.learnt(ROWS[:1])


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MisuseError, match="one guess for each row"):
        recovery(ROWS[:3], ROWS[:4], ROWS[10:], Table.learnt(ROWS))
    with pytest.raises(MisuseError, match="at least as many"):
        recovery(ROWS[:4], ROWS[:4], ROWS[10:13], Table.learnt(ROWS))
