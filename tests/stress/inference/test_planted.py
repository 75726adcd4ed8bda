"""Planted records are odd in the way they say."""

from __future__ import annotations

import torch

from sentinel.demo import cohorts
from sentinel.stress.inference.planted import mislabelled, outlying
from sentinel.stress.records import Records


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def hearts() -> Records:
    cohort = cohorts.load("cleveland")
    return Records(cohort.rows, cohort.labels)


def test_outlying_records_lie_at_the_ends_of_every_column_and_unlike_any_patient() -> None:
    data = hearts()
    odd = outlying(data, 20, seeded())
    ends = torch.stack([data.inputs.amin(0), data.inputs.amax(0)])
    assert bool(((odd.inputs == ends[0]) | (odd.inputs == ends[1])).all())
    assert float(odd.inputs.norm(dim=1).min()) > float(data.inputs.norm(dim=1).median())
    assert set(odd.labels.tolist()) == {0.0, 1.0}


def test_mislabelled_records_are_real_ones_with_the_other_label() -> None:
    data = hearts()
    wrong = mislabelled(data, 20, seeded())
    for row, label in zip(wrong.inputs, wrong.labels, strict=True):
        same = (data.inputs == row).all(1)
        assert bool((data.labels[same] == 1 - label).all())
        assert bool(same.any())
