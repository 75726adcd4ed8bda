"""A shadow classifier reads what an update says of a group, and no more than there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.errors import MisuseError
from sentinel.stress.inference.federation import Doors, Site, federate
from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.property import (
    Cohorts,
    _Fit,
    classify,
    lopsided,
    of_classes,
    read,
    simulated,
    told,
)
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("known_noise")
TESTED = 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hospitals(half: int) -> tuple[Records, Tensor]:
    """Every second patient of two hospitals, and which one each is of."""
    parts = [cohorts.load(name) for name in ("cleveland", "hungarian")]
    rows = torch.cat([part.rows[half::2] for part in parts])
    labels = torch.cat([part.labels[half::2] for part in parts])
    sizes = [len(part.labels[half::2]) for part in parts]
    return Records(rows, labels), torch.arange(2).repeat_interleave(torch.tensor(sizes))


def made() -> tuple[Loop, State]:
    model = network(13, 32, seeded())
    return Loop(model, binary_loss, 0.05, epochs=2, batch=16), copied(model.state_dict())


def hospital_told(policy: str | None, home: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Which hospital each of some real releases comes from: read, by labels, and the truth."""
    loop, sent = made()
    known, asked = (
        of_classes(*hospitals(half), size=32, count=count, generator=seeded(half))
        for half, count in ((0, 40), (1, TESTED))
    )
    seen = []
    for number, group in enumerate(asked.groups):
        site = {"one": Site(asked.data.take(group), torch.ones(32, dtype=torch.bool))}
        guards = Doors(site, home, policy).open(f"run-{number}")
        seen += federate(loop, sent, site, guards, rounds=1, order=seeded(number)).seen["one"]
    examples = simulated(loop, sent, known, seeded(9))
    counted = classify(known.label_shares(2), known.answers, asked.label_shares(2), torch.zeros(2))
    return read(examples, known.answers, seen), counted, asked.answers


def test_a_raw_update_says_which_hospital_it_is_from(tmp_path: Path) -> None:
    """Nearly always; the labels' shares alone say it less often."""
    read_, counted, answers = hospital_told(None, tmp_path)
    assert float((read_ == answers).double().mean()) >= 0.9
    assert float((counted == answers).double().mean()) <= 0.85


def test_noise_of_the_shipped_policy_hides_some_of_it(tmp_path: Path) -> None:
    """Read through the guard, less often than raw; how often is the benchmark's to say."""
    read_, _, answers = hospital_told("tabular-ehr", tmp_path)
    assert 0.25 <= float((read_ == answers).double().mean()) <= 0.9


def test_the_classifier_is_ridge_regression() -> None:
    """Reference: the primal normal equations, at the ridge that it chose."""
    generator = seeded()
    examples = torch.randn(30, 5, generator=generator).double()
    answers = (examples[:, 0] + 0.3 * examples[:, 1] > 0).long()
    noise = torch.full((5,), 0.5).double()
    asked = torch.randn(40, 5, generator=generator).double()
    found = classify(examples, answers, asked, noise)
    apart = examples - examples.mean(0)
    targets = F.one_hot(answers).double() - F.one_hot(answers).double().mean(0)
    references = []
    for share in (1e-3, 1e-2, 1e-1, 1.0):
        ridge = 30 * (0.5 + share * apart.square().mean()) * torch.eye(5).double()
        weights = torch.linalg.solve(apart.T @ apart + ridge, apart.T @ targets)
        scores = (asked - examples.mean(0)) @ weights + F.one_hot(answers).double().mean(0)
        references.append(scores.argmax(1))
    assert any(torch.equal(found, one) for one in references)


def test_an_example_left_out_is_told_as_by_a_fit_without_it() -> None:
    """Reference: the fits themselves, the mean kept."""
    generator = seeded(4)
    apart = torch.randn(12, 3, generator=generator).double()
    answers = torch.arange(12) % 2
    fit = _Fit.of(apart, answers, torch.zeros(3).double(), 1.0)
    units, targets = fit.units, F.one_hot(answers).double() - 0.5
    right = 0
    for out in range(12):
        kept = torch.arange(12) != out
        rows = apart[kept] / units
        ridge = 12 * torch.eye(3).double()
        weights = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets[kept])
        right += int(int((apart[out] / units @ weights).argmax()) == int(answers[out]))
    assert fit.left_out == right / 12


def test_values_that_are_all_noise_are_not_listened_to() -> None:
    """One value tells the answer and one is drowned: telling both how noisy they are pays."""
    generator = seeded()
    answers = torch.arange(200) % 2
    examples = torch.stack([answers.double(), answers.double()], 1)
    examples = examples + 0.1 * torch.randn(200, 2, generator=generator).double()
    asked = examples + torch.tensor([0.0, 30.0]) * torch.randn(200, 2, generator=generator)
    knows = classify(examples, answers, asked, torch.tensor([0.0, 900.0]))
    blind = classify(examples, answers, asked, torch.zeros(2))
    assert float((knows == answers).double().mean()) > 0.99
    assert float((blind == answers).double().mean()) < 0.7


def test_groups_have_the_shares_that_were_asked_for() -> None:
    data, _ = hospitals(0)
    groups = lopsided(data, data.labels == 1, size=32, share=0.75, count=6, generator=seeded())
    assert groups.label_shares(2)[:, 1].tolist() == [0.25, 0.75] * 3
    assert groups.answers.tolist() == [0, 1] * 3
    assert all(len(group.unique()) == 32 for group in groups.groups)


def test_illness_is_told_by_the_labels_alone() -> None:
    data, _ = hospitals(0)
    groups = lopsided(data, data.labels == 1, size=32, share=0.75, count=20, generator=seeded())
    shares = groups.label_shares(2)
    assert torch.equal(classify(shares, groups.answers, shares, torch.zeros(2)), groups.answers)


def test_what_was_told_is_summed_up_over_splits() -> None:
    answers = torch.tensor([[0, 1, 0, 1]]).repeat(3, 1)
    by_counts = torch.zeros_like(answers)
    got = told(answers, by_counts, answers)
    assert (got.updates, got.accuracy, got.chance, got.counts) == (12, 1.0, 0.5, 0.5)
    assert got.beyond.low == got.beyond.high == 0.5
    assert got.interval.low == got.interval.high == 1.0


def test_too_few_patients_of_a_kind_are_refused() -> None:
    data, places = hospitals(0)
    with pytest.raises(MisuseError, match="more patients"):
        of_classes(data, places, size=1000, count=2, generator=seeded())
    with pytest.raises(MisuseError, match="more patients"):
        lopsided(data, data.labels == 7, size=8, share=0.5, count=2, generator=seeded())


def test_examples_of_one_class_are_refused() -> None:
    with pytest.raises(MisuseError, match="two classes"):
        classify(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 2), NONE)


def test_a_single_split_has_no_interval() -> None:
    one = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MisuseError, match="two splits"):
        told(one, one, one)


def test_label_shares_count_every_class() -> None:
    data = Records(torch.zeros(4, 1), torch.tensor([0, 2, 2, 1]))
    groups = Cohorts(data, torch.tensor([[0, 1, 2, 3]]), torch.tensor([0]))
    assert groups.label_shares(3).tolist() == [[0.25, 0.25, 0.5]]


NONE = torch.zeros(2)
