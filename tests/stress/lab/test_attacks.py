"""Each adapter reads what is in raw updates, scores chance as chance, and says its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import Deadline, OutOfTimeError
from sentinel.stress.lab.exchange import Site, raw
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST, Setting

if TYPE_CHECKING:
    from sentinel.stress.lab.finding import Finding
    from sentinel.stress.lab.subject import Subject


def attacked(subject, name, setting, *, seconds=120.0) -> Finding:
    site = Site(subject, torch.Generator().manual_seed(0))
    update = site.update(setting, SERVERS[HONEST])
    attack = ATTACKS[name]
    assert attack.misfit(subject, setting) is None
    generator = torch.Generator().manual_seed(1)
    case = site.case(update, raw(update))
    return attack.run(case, update.behind, generator, Deadline.after(seconds))


@pytest.fixture
def classes() -> Subject:
    """300 rows of four classes, and a perceptron with an output for each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator)
    labels = torch.arange(300) % 4
    rows[torch.arange(300), labels] += 3.0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = {"train": (rows[:150], labels[:150]), "public": (rows[150:], labels[150:])}
    return subject_of(net, data, generator, "classes")


def test_the_label_of_a_lone_record_is_read(classes) -> None:
    found = attacked(classes, "labels", Setting(records=1))
    assert found.main.values == (1.0,)
    assert found.main.chances[0] in {0.0, 1.0}


def test_labels_of_a_batch_are_counted_better_than_by_their_proportions(classes) -> None:
    found = attacked(classes, "labels", Setting(records=8))
    assert found.main.mean > 0.85
    assert found.main.mean >= found.main.chance


def test_members_of_a_raw_update_are_told_from_others(classes) -> None:
    found = attacked(classes, "membership", Setting(records=16))
    assert found.main.leaks(0.99)
    assert len(found.main.values) == len(found.main.chances) == 16
    assert sum(found.main.values) + sum(found.main.chances) == 16


def test_rows_of_a_raw_update_are_read_exactly_and_held_out_ones_are_not(table) -> None:
    found = attacked(table, "rows", Setting(records=1))
    assert found.tallies[1].mean == 1.0
    assert found.tallies[1].chance < 0.05
    shown = found.worst
    assert torch.allclose(shown.guess, shown.truth, atol=0.05)


def test_a_picture_attack_without_time_is_not_run_in_a_crippled_form(images) -> None:
    with pytest.raises(OutOfTimeError):
        attacked(images, "pictures", Setting(records=1), seconds=0.0)


@pytest.mark.parametrize(
    ("name", "records", "expected"),
    [
        ("pictures", 1, "no pictures"),
        ("membership", 2, "at least 8"),
        ("membership", 999, "too few"),
        ("labels", 1, "one output"),
    ],
)
def test_what_does_not_fit_is_said(table, name, records, expected) -> None:
    assert expected in ATTACKS[name].misfit(table, Setting(records=records))


def test_a_net_that_mixes_a_batch_has_no_members_to_tell(classes) -> None:
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
    records = {"train": classes.train, "held_out": classes.held_out}
    subject = subject_of(net, records, torch.Generator().manual_seed(0), "mixed")
    assert "BatchNorm" in ATTACKS["membership"].misfit(subject, Setting(records=16))
    assert "two fully connected" in ATTACKS["rows"].misfit(subject, Setting())
