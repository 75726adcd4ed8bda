"""The shipped records are the published ones, and their preparation tells nothing about them."""

from __future__ import annotations

import hashlib
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentinel.demo import cohorts

DIGESTS = {
    "cleveland": "a8a74af09afc967d70c5564d46f2211aedddb00e0498ff1ebf91b0de03b729aa",
    "hungarian": "753e06f36272bcd2b7d8366f3414682e7b5c1d731c4a7957d1a4da67c822633b",
    "switzerland": "eff77adf92b1cb7c01de5e4a8051734b8d368463d16ce591ca51fca79191f6e2",
    "va": "3b4d4e3eb2d460196afcf21778b62e63dde0986fcfdb52004fce2620cc8e7f58",
}
SIZES = {"cleveland": (303, 139), "hungarian": (294, 106), "switzerland": (123, 115)}
SIZES["va"] = (200, 149)


@pytest.mark.parametrize("site", cohorts.SITES)
def test_the_shipped_file_is_the_published_one(site: str) -> None:
    data = resources.files("sentinel.demo").joinpath("data", f"{site}.csv").read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGESTS[site]
    cohort = cohorts.load(site)
    assert (len(cohort), int(cohort.labels.sum())) == SIZES[site]


def test_the_attribution_names_authors_licence_and_source() -> None:
    text = resources.files("sentinel.demo").joinpath("data", "ATTRIBUTION.md").read_text("utf-8")
    for needed in ("Janosi", "Steinbrunn", "Pfisterer", "Detrano", "CC BY 4.0", "10.24432/C52P4X"):
        assert needed in text


def test_a_row_is_the_record_by_public_constants_and_zero_where_it_is_missing() -> None:
    """First patient of Hungary: chol 132 is there; slope, ca and thal are missing."""
    row = cohorts.load("hungarian").rows[0]
    expected = [-2.7, 1.0, -0.5, 0.0, -1.76, -1.0, 1.0, 1.8, -1.0, -1.0, 0.0, 0.0, 0.0]
    assert torch.allclose(row, torch.tensor(expected))


def test_a_cholesterol_of_zero_is_missing_too() -> None:
    """Switzerland wrote 0 for every patient's; taken as a value it would be 4 spreads off."""
    column = [feature.name for feature in cohorts.FEATURES].index("chol")
    assert torch.equal(cohorts.load("switzerland").rows[:, column], torch.zeros(123))


@pytest.mark.parametrize("site", cohorts.SITES)
def test_rows_are_finite_and_of_the_size_of_standard_ones(site: str) -> None:
    rows = cohorts.load(site).rows
    assert rows.isfinite().all()
    assert rows.abs().max() < 10
    assert 0.3 < rows.square().mean().sqrt() < 1.5


def test_a_row_goes_back_to_the_record_s_units() -> None:
    found = cohorts.record(cohorts.load("cleveland").rows[0])
    expected = {"age": 63, "sex": 1, "cp": 1, "trestbps": 145, "chol": 233, "thal": 6}
    assert {name: round(found[name], 3) for name in expected} == expected


@given(site=st.sampled_from(cohorts.SITES), seed=st.integers(0, 2**32), share=st.floats(0.01, 0.99))
def test_every_split_has_both_classes_in_both_parts_and_nobody_twice(
    site: str, seed: int, share: float
) -> None:
    cohort = cohorts.load(site)
    parts = cohorts.split(cohort, share, torch.Generator().manual_seed(seed))
    assert sum(len(part) for part in parts) == len(cohort)
    for part in parts:
        assert part.labels.unique().tolist() == [0.0, 1.0]
    both = torch.cat([part.rows for part in parts])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, cohort.rows.tolist()))


def test_a_split_follows_its_seed() -> None:
    cohort = cohorts.load("va")
    first, again, other = (
        cohorts.split(cohort, 0.7, torch.Generator().manual_seed(seed))[0].rows
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
