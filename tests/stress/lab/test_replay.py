"""A search with restarts is begun only on models that can be replayed, and where it fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.stress.lab.deadline import Deadline, OutOfTimeError
from sentinel.stress.lab.exchange import Site, raw
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.lab.replay import require_time, unreplayable
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.stress.passive.relaxation import Relaxation


def test_plain_nets_and_attention_can_be_replayed(table, texts) -> None:
    assert unreplayable(table) is None
    assert unreplayable(texts) is None


def test_torchs_own_attention_can_be_replayed() -> None:
    """Its fast kernels have no second derivative, and are not used."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Embedding(9, 8), layer, nn.Flatten(), nn.Linear(32, 2))
    tokens = torch.randint(9, (120, 4), generator=torch.Generator().manual_seed(0))
    given = (tokens, tokens[:, 0] % 2)
    assert unreplayable(subject_of(net, given, torch.Generator().manual_seed(0), "own")) is None


def test_a_net_that_draws_random_numbers_cannot(table) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(), nn.Linear(4, 1))
    data = {"train": table.train, "held_out": table.held_out}
    subject = subject_of(net, data, torch.Generator().manual_seed(0), "random")
    assert "several guesses at once" in unreplayable(subject)


def test_a_search_that_does_not_fit_is_not_begun(table) -> None:
    site = Site(table, torch.Generator().manual_seed(0))
    update = site.update(Setting(records=2), SERVERS[HONEST])
    training = site.case(update, raw(update)).training
    search = Relaxation(restarts=2, iterations=100)
    require_time(training, update.behind.inputs, search, Deadline.after(600.0))
    with pytest.raises(OutOfTimeError):
        require_time(training, update.behind.inputs, search, Deadline.after(0.0))
