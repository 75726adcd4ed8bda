"""Features: what they say of an update, and what they do not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.detection.features import FEATURES, Measured, update_features
from sentinel.detection.survey import FLOOR
from sentinel.errors import Withheld
from sentinel.terms import Reason


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(
    records: int, units: int = 40, inputs: int = 60, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The update of a dense layer: signals [units, records] times records [records, inputs]."""
    generator = seeded(seed)
    signals = torch.randn(units, records, generator=generator)
    rows = torch.randn(records, inputs, generator=generator)
    return {"a.weight": signals @ rows, "a.bias": signals.sum(1)}


def named(entry: Measured) -> dict[str, float]:
    return dict(zip(FEATURES, entry.vector, strict=True))


def test_one_record_is_rank_one_and_explained_by_the_bias() -> None:
    (entry,) = update_features(dense(1), seeded(1))
    found = named(entry)
    assert entry.names == ("a.weight", "a.bias")
    assert found["tail_1"] == FLOOR
    assert found["unexplained"] == FLOOR
    assert found["twins"] == 1.0
    assert found["rank"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("records", [2, 4, 12])
def test_the_tail_beyond_the_number_of_records_is_empty(records: int) -> None:
    found = named(update_features(dense(records), seeded(1))[0])
    assert found["tail_16"] == FLOOR
    assert found["tail_1"] > -2.0
    assert (found["tail_4"] == FLOOR) == (records <= 4)
    assert (found["twins"] == 0.0) == (records > 2)  # in two dimensions some meet by chance


def test_units_that_hold_one_record_are_twins_and_silent_ones_faint() -> None:
    deltas = dense(8)
    signals = torch.zeros(40, 8)
    signals[:10, 0] = torch.arange(1.0, 11.0)  # ten units see the first record alone
    signals[10:20] = torch.randn(10, 8, generator=seeded(2))
    rows = torch.randn(8, 60, generator=seeded(3))
    deltas = {"a.weight": signals @ rows, "a.bias": signals.sum(1)}
    found = named(update_features(deltas, seeded(1))[0])
    assert found["twins"] == 0.5
    assert found["faint_rows"] == 0.5


def test_columns_that_no_record_touched_are_faint() -> None:
    deltas = dense(8)
    deltas["a.weight"][:, :15] = 0.0
    assert named(update_features(deltas, seeded(1))[0])["faint_columns"] == 0.25


@given(exponent=st.floats(-18, 18), records=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_size_does_not_matter(exponent: float, records: int) -> None:
    deltas = dense(records)
    scaled = {name: value.double() * 10.0**exponent for name, value in deltas.items()}
    (one,) = update_features({n: v.double() for n, v in deltas.items()}, seeded(1))
    (other,) = update_features(scaled, seeded(1))
    assert one.vector == pytest.approx(other.vector, abs=1e-3)


@pytest.mark.parametrize("size", [1e-22, 1e22])
def test_sizes_whose_squares_leave_float32_are_measured(size: float) -> None:
    deltas = dense(3)
    (one,) = update_features(deltas, seeded(1))
    (other,) = update_features({n: v * size for n, v in deltas.items()}, seeded(1))
    assert one.vector == pytest.approx(other.vector, abs=0.01)


def test_the_update_is_not_written() -> None:
    deltas = dense(5)
    before = {name: value.clone() for name, value in deltas.items()}
    update_features(deltas, seeded(1))
    assert all(torch.equal(before[name], deltas[name]) for name in deltas)


def test_odd_tensors_are_measured_or_left_out() -> None:
    deltas = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "zeros": torch.zeros(4, 4),
        "vector": torch.randn(9, generator=seeded(0)),
        "row.weight": torch.randn(1, 5, generator=seeded(0)),
        "conv.weight": torch.randn(4, 3, 3, 3, generator=seeded(0)),
        "half": torch.randn(6, 7, generator=seeded(0)).half(),
    }
    found = {entry.names[0]: entry for entry in update_features(deltas, seeded(1))}
    assert set(found) == {"scalar", "vector", "row.weight", "conv.weight", "half"}
    assert all(math.isfinite(value) for entry in found.values() for value in entry.vector)
    assert found["conv.weight"].rank == 4
    assert found["scalar"].rank == 1


def test_a_large_matrix_is_measured_through_a_sample_like_a_small_one() -> None:
    generator = seeded(0)
    signals = torch.randn(2000, 3, generator=generator)
    rows = torch.randn(3, 2000, generator=generator)
    deltas = {"a.weight": signals @ rows, "a.bias": signals.sum(1)}
    found = named(update_features(deltas, seeded(1))[0])
    assert found["tail_4"] == FLOOR
    assert found["faint_rows"] == 0.0


def test_a_bias_that_moved_alone_is_measured_as_a_vector() -> None:
    deltas = {"a.weight": torch.zeros(4, 9), "a.bias": torch.ones(4)}
    (entry,) = update_features(deltas, seeded(1))
    assert entry.names == ("a.weight", "a.bias")
    assert entry.rank == 1


@pytest.mark.parametrize("name", ["a.weight", "a.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_withheld_and_their_entry_named(
    name: str, value: float
) -> None:
    deltas = dense(2)
    deltas[name][3] = value
    with pytest.raises(Withheld, match=name) as raised:
        update_features(deltas, seeded(1))
    assert raised.value.reason is Reason.NOT_FINITE
