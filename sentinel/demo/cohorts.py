"""The four hospitals of Fed-Heart-Disease: their patients as rows a model can take.

Everything that turns a record into a row is a public constant, the same at every hospital: round
figures for adults, not statistics of these patients. So preparation tells the server nothing, and
a row can be compared between hospitals. What is missing becomes 0, the constant's own middle.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

SITES = ("cleveland", "hungarian", "switzerland", "va")
MISSING = -9.0


@dataclass(frozen=True, slots=True)
class Feature:
    """One column: row value = (record value - middle) / spread.

    Attributes:
        name: as the repository of the data calls it.
        middle: in the column's unit.
        spread: in the column's unit.
        zero_is_missing: a living patient cannot have 0 here; two hospitals wrote it for missing.
    """

    name: str
    middle: float
    spread: float
    zero_is_missing: bool = False


FEATURES = (
    Feature("age", 55.0, 10.0),  # years
    Feature("sex", 0.5, 0.5),  # 0 or 1
    Feature("cp", 2.5, 1.0),  # chest pain, type 1 to 4
    Feature("trestbps", 130.0, 20.0, zero_is_missing=True),  # resting blood pressure, mm Hg
    Feature("chol", 220.0, 50.0, zero_is_missing=True),  # serum cholesterol, mg/dl
    Feature("fbs", 0.5, 0.5),  # fasting blood sugar over 120 mg/dl, 0 or 1
    Feature("restecg", 1.0, 1.0),  # resting electrocardiogram, 0 to 2
    Feature("thalach", 140.0, 25.0),  # highest heart rate, beats per minute
    Feature("exang", 0.5, 0.5),  # angina under exercise, 0 or 1
    Feature("oldpeak", 1.0, 1.0),  # ST depression, mm
    Feature("slope", 2.0, 1.0),  # of the ST segment, 1 to 3
    Feature("ca", 1.0, 1.0),  # vessels coloured, 0 to 3
    Feature("thal", 5.0, 2.0),  # 3, 6 or 7
)


@dataclass(frozen=True, slots=True)
class Cohort:
    """The patients of one hospital.

    Attributes:
        rows: [patients, 13] float32.
        labels: [patients] float32; 1 is heart disease.
    """

    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many patients."""
        return len(self.labels)

    def take(self, chosen: Tensor) -> Cohort:
        """Return the patients with these indices."""
        return Cohort(self.rows[chosen], self.labels[chosen])


@functools.cache
def load(site: str) -> Cohort:
    """Return all patients of one of SITES, from the data shipped with the package."""
    text = resources.files("sentinel.demo").joinpath("data", f"{site}.csv").read_text("utf-8")
    lines = list(csv.reader(text.splitlines()))[1:]
    table = torch.tensor([[float(cell) for cell in line] for line in lines])
    return Cohort(_prepared(table[:, : len(FEATURES)]), (table[:, len(FEATURES)] > 0).float())


def split(cohort: Cohort, share: float, generator: torch.Generator) -> tuple[Cohort, Cohort]:
    """Split at random into training and held-out patients, each class by itself.

    Args:
        cohort: with at least two patients of each class.
        share: of the patients that go to training, above 0 and below 1.
        generator: draws the split.

    Returns:
        Training and held-out patients; both hold both classes.
    """
    parts: list[list[Tensor]] = [[], []]
    for label in (0.0, 1.0):
        members = torch.nonzero(cohort.labels == label)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(1, round(share * len(members))), len(members) - 1)
        parts[0].append(members[:cut])
        parts[1].append(members[cut:])
    train, held_out = (cohort.take(torch.cat(part)) for part in parts)
    return train, held_out


def record(row: Tensor) -> dict[str, float]:
    """Turn a row, or a guess at one, back into the columns' units: [13] to name -> value."""
    return {
        feature.name: float(value) * feature.spread + feature.middle
        for feature, value in zip(FEATURES, row, strict=True)
    }


def _prepared(values: Tensor) -> Tensor:
    """Return standardised rows, 0 where a value is missing, [patients, 13]."""
    middles = torch.tensor([feature.middle for feature in FEATURES])
    spreads = torch.tensor([feature.spread for feature in FEATURES])
    empty_zero = torch.tensor([feature.zero_is_missing for feature in FEATURES])
    missing = (values == MISSING) | ((values == 0.0) & empty_zero)
    return torch.where(missing, 0.0, (values - middles) / spreads)
