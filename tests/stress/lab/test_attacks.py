"""Each adapter reads what is in raw updates, scores chance as chance, and says its limits."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.policy.store import parse_policy
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.attacks.columns import _luckiest, _table
from sentinel.stress.lab.attacks.membership import PLANTED
from sentinel.stress.lab.attacks.pictures import yardstick
from sentinel.stress.lab.attacks.rows import guesses_at_rows
from sentinel.stress.lab.deadline import Deadline, OutOfTimeError
from sentinel.stress.lab.exchange import GuardedDoor, Site, raw
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.lab.servers import SERVERS, trains
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.stress.passive.columns import Column, Table
from sentinel.stress.passive.fedavg import Simulation
from sentinel.stress.passive.inversion import Matching
from sentinel.stress.passive.relaxation import Relaxation
from sentinel.stress.passive.tabular import EXACT, nearest
from sentinel.stress.servers.seer import seer_secret

if TYPE_CHECKING:
    from sentinel.stress.lab.finding import Finding
    from sentinel.stress.lab.subject import Subject


def attacked(subject, name, setting, *, seconds=600.0, seed=0) -> Finding:
    site = Site(subject, torch.Generator().manual_seed(seed))
    update = site.update(setting, SERVERS[setting.server])
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


def test_a_server_with_a_secret_reads_by_it_what_nobody_else_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 13, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(13, 192), nn.ReLU(), nn.Linear(192, 1))
    data = {
        "train": (rows[:300], (rows[:300, 0] > 0).float()),
        "public": (rows[300:], (rows[300:, 0] > 0).float()),
    }
    subject = subject_of(net, data, generator, "secret")
    site = Site(subject, torch.Generator().manual_seed(1))
    update = site.update(Setting("seer", records=32), SERVERS["seer"])
    case = site.case(update, raw(update))

    def read(secret: torch.Tensor | None) -> int:
        guesses = guesses_at_rows(dataclasses.replace(case, secret=secret))
        return int((nearest(guesses, update.behind.inputs) < EXACT).sum())

    other = seer_secret(192, torch.Generator().manual_seed(2))
    assert read(case.secret) >= 3 * max(1, read(None), read(other))
    assert trains("seer") is False


def test_planted_records_are_seen_in_raw_updates_of_an_honest_server_alone(classes) -> None:
    found = attacked(classes, "membership", Setting(records=32))
    assert found.control is not None
    assert found.control.leaks(0.95)
    assert len(found.control.values) == len(found.control.chances) == 32 // PLANTED
    crafted = attacked(classes, "membership", Setting("fishing-class", records=16))
    assert crafted.control is None


def test_a_bound_on_single_values_does_not_end_the_attack_on_members(classes, tmp_path) -> None:
    text = 'schema = 1\nname = "bound"\n[[rule]]\nid = "all"\nmax_norm = 5.0\nmax_abs = 0.01\n'
    door = GuardedDoor(parse_policy(text.encode(), "bound.toml"), tmp_path, alone=True)
    site = Site(classes, torch.Generator().manual_seed(0))
    update = site.update(Setting(records=16), SERVERS[HONEST])
    case = site.case(update, door.send(update, site.model, 16))
    generator = torch.Generator().manual_seed(1)
    found = ATTACKS["membership"].run(case, update.behind, generator, Deadline.after(600.0))
    assert found.main.leaks(0.95)
    assert found.control is None  # what was released is no place for planted records


@pytest.mark.parametrize("name", ["membership", "labels"])
def test_a_crafted_model_whose_training_diverges_gives_nothing_away(classes, name) -> None:
    """The replay diverges as the site's own training did, and the attack says what it has."""
    steep = dataclasses.replace(classes, rate=1e4)
    found = attacked(steep, name, Setting(records=20, epochs=6))
    assert all(math.isfinite(value) for tally in found.tallies for value in tally.values)
    assert not any(tally.leaks(0.95) for tally in found.tallies)


@pytest.mark.parametrize("name", ["pictures", "untold"])
def test_pictures_under_a_diverging_replay_are_guesses_and_no_error(images, name) -> None:
    """Steps through numbers so large have no slope to go by."""
    steep = dataclasses.replace(images, rate=1e6, batch=4)
    found = attacked(steep, name, Setting(records=8, epochs=2))
    assert all(math.isfinite(value) for tally in found.tallies for value in tally.values)
    assert found.main.gain <= 0.02


def test_pictures_are_found_by_the_attacker_that_rebuilt_them_best_and_by_no_other(
    images, monkeypatch
) -> None:
    """One gives another picture of the class; one the true one, with far too much contrast."""
    site = Site(images, torch.Generator().manual_seed(0))
    update = site.update(Setting(records=1), SERVERS[HONEST])
    truth, label = update.behind.inputs, update.behind.labels.long()
    mean = yardstick(images).means[label]
    other = images.held_out.inputs[images.held_out.labels == label][:1]
    harsh = mean + 20.0 * (truth - mean)
    case = site.case(update, raw(update))

    def found(*guesses: torch.Tensor) -> Finding:
        given = iter([(one, False) for one in guesses])
        monkeypatch.setattr("sentinel.stress.lab.attacks.pictures._guesses", lambda *_: given)
        generator, deadline = torch.Generator(), Deadline.after(600.0)
        return ATTACKS["pictures"].run(case, update.behind, generator, deadline)

    assert found(harsh).tallies[1].mean == 1.0
    for order in ((other, harsh), (harsh, other)):
        assert found(*order).main.mean == found(other).main.mean > found(harsh).main.mean
        assert found(*order).tallies[1].mean == 0.0


def test_words_of_a_lone_raw_text_are_named_and_put_in_order(texts) -> None:
    named, placed = attacked(texts, "words", Setting(records=1)).tallies
    assert named.mean == 1.0
    assert named.chance < 0.5
    assert placed.mean >= 0.8 > 2 * placed.chance


def test_of_many_texts_the_words_are_named_and_no_order_is_claimed(texts) -> None:
    found = attacked(texts, "words", Setting(records=16))
    assert len(found.tallies) == 1
    assert found.main.mean == 1.0


def test_genotypes_of_a_lone_person_are_all_read(people, monkeypatch) -> None:
    quick = Relaxation(restarts=1, iterations=10, hardness=())
    monkeypatch.setattr("sentinel.stress.lab.attacks.genotypes.SEARCH", quick)
    right, whole = attacked(people, "genotypes", Setting(records=1)).tallies
    assert right.mean == whole.mean == 1.0
    assert right.chance < 0.8


def test_genotypes_that_were_read_out_are_kept_where_no_time_is_left_to_search(people) -> None:
    found = attacked(people, "genotypes", Setting(records=1), seconds=0.0)
    assert found.cut
    assert found.main.mean == 1.0


def test_words_are_not_named_where_no_time_is_left_to_order_them(texts) -> None:
    with pytest.raises(OutOfTimeError):
        attacked(texts, "words", Setting(records=1), seconds=0.0)


def test_chance_is_given_the_same_choice_of_guesses_as_the_attacker() -> None:
    """Two sets of guesses, each right for other rows: both rows find the one that suits."""
    table = Table((Column.learnt(torch.tensor([[0.0], [1.0]]), 2),) * 2)
    ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    for rows in (ones, zeros):
        assert bool(_luckiest((ones, zeros), rows, table)[1].all())


def test_a_whole_row_is_found_by_search_and_named_columns_are_categories(monkeypatch) -> None:
    """Column 1 takes 12 values, more than are taken for levels unless the loader says so."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(160, 4, generator=generator)
    rows[:, 1] = torch.randint(12, (160,), generator=generator) / 6.0
    data = {"train": (rows, (rows[:, 0] > 0).float()), "categorical": [1]}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    subject = subject_of(net, data, generator, "mixed")
    assert not _table(subject).columns[1].continuous
    assert _table(dataclasses.replace(subject, categorical=())).columns[1].continuous
    quick = Relaxation(restarts=2, iterations=150, step=0.1, hardness=(5.0, 20.0))
    monkeypatch.setattr("sentinel.stress.lab.attacks.columns.SEARCH", quick)
    whole, columns = attacked(subject, "columns", Setting(records=1)).tallies
    assert whole.mean == columns.mean == 1.0
    assert whole.chance < 0.1


def test_a_property_of_most_records_is_told_from_raw_updates() -> None:
    """It moves the mean of a column; labels know nothing of it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 6, generator=generator)
    labels, having = torch.arange(400) % 2, torch.rand(400, generator=generator) < 1 / 2
    rows[having, 0] += 3.0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    nn.init.constant_(net[2].bias[0], 2.0)  # all err in one direction, so that they add up
    data = {"train": (rows, labels), "property": having}
    subject = subject_of(net, data, generator, "flagged")
    setting = Setting(records=32, lopsided=True)
    found = [attacked(subject, "property", setting, seed=seed) for seed in range(16)]
    pooled = sum(found[1:], found[0])
    assert pooled.main.leaks(0.95)
    assert pooled.tallies[1].mean > pooled.tallies[1].chance
    shares = {float(_flags_behind(subject, setting, seed).double().mean()) for seed in range(4)}
    assert shares == {6 / 32, 26 / 32}


def _flags_behind(subject, setting, seed) -> torch.Tensor:
    site = Site(subject, torch.Generator().manual_seed(seed))
    return site.update(setting, SERVERS[HONEST]).behind.flags


def test_pictures_of_three_channels_come_back_from_a_raw_update(coloured) -> None:
    found = attacked(coloured(), "pictures", Setting(records=1))
    assert found.worst.guess.shape == (3, 12, 12)
    assert found.main.mean > 0.95
    assert found.tallies[1].mean == 1.0


def test_a_picture_comes_back_to_a_server_that_is_not_told_its_label(coloured) -> None:
    found = attacked(coloured(), "untold", Setting(records=1))
    assert found.main.mean > 0.95
    assert found.main.gain > 0.02


@pytest.mark.parametrize("known", [True, False])
def test_after_local_epochs_an_untold_server_counts_labels_and_draws_batches(
    images, known, monkeypatch
) -> None:
    """With a public prior, and without any."""
    blind = Simulation(Matching(iterations=10, total_variation=3.0, smoothing=1.5))
    monkeypatch.setattr("sentinel.stress.lab.attacks.untold.BLIND", blind)
    subject = images if known else dataclasses.replace(images, public=None)
    found = attacked(subject, "untold", Setting(records=8, epochs=2))
    assert len(found.main.values) == 8
    assert found.main.mean <= attacked(subject, "pictures", Setting(records=8)).main.mean + 0.05


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
        ("untold", 1, "no pictures"),
        ("words", 1, "no texts"),
        ("genotypes", 1, "no genotypes"),
        ("columns", 64, "more than 32 rows"),
        ("property", 32, "names the property"),
    ],
)
def test_what_does_not_fit_is_said(table, name, records, expected) -> None:
    assert expected in ATTACKS[name].misfit(table, Setting(records=records))


class Recurrent(nn.Module):
    """Reads a row as a sequence."""

    def __init__(self) -> None:
        """One layer that reads, one that answers."""
        super().__init__()
        self.reader, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Answers for each row."""
        return self.head(self.reader(rows[:, :, None])[0][:, -1])


@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3)), Recurrent()], ids=["dropout", "lstm"]
)
def test_a_net_without_gradients_of_single_records_does_not_fit_and_is_no_error(
    classes, net
) -> None:
    records = {"train": classes.train, "held_out": classes.held_out}
    subject = subject_of(net, records, torch.Generator().manual_seed(0), "odd")
    assert "dropout" in ATTACKS["membership"].misfit(subject, Setting(records=16))
    assert ATTACKS["membership"].misfit(classes, Setting(records=16)) is None
    still = subject_of(
        nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3)).eval(),
        records,
        torch.Generator().manual_seed(0),
        "still",
    )
    assert ATTACKS["membership"].misfit(still, Setting(records=16)) is None


def test_a_net_that_mixes_a_batch_has_no_members_to_tell(classes) -> None:
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
    records = {"train": classes.train, "held_out": classes.held_out}
    subject = subject_of(net, records, torch.Generator().manual_seed(0), "mixed")
    assert "BatchNorm" in ATTACKS["membership"].misfit(subject, Setting(records=16))
    assert "BatchNorm" in ATTACKS["property"].misfit(subject, Setting(records=16, lopsided=True))
    assert "two fully connected" in ATTACKS["rows"].misfit(subject, Setting())
