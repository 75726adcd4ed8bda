"""Genotypes are recovered from a raw gradient, and not from what the shipped policy lets out."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel import Guard
from sentinel.demo.hearts import network
from sentinel.errors import MisuseError
from sentinel.interval import difference
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.passive import tabular
from sentinel.stress.passive.genotypes import Concordance, Panel, agreements, called, concordance
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.relaxation import Relaxation, relax
from sentinel.stress.passive.released import let_out

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("known_noise", "one_thread")
VARIANTS = 40
QUICK = Relaxation(restarts=2, iterations=120, hardness=(10.0,))


class _Round:
    """Synthetic people, and a small net that learns a trait from them."""

    def __init__(self, people: int, seed: int, *, logistic: bool = False) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.panel = Panel.drawn(VARIANTS, 0.7, self.draw)
        self.people = self.panel.people(people, self.draw)
        self.others = self.panel.people(people, self.draw)
        labels = (self.people[:, :10].sum(1) > self.people[:, 10:20].sum(1)).float()
        model: nn.Module = network(VARIANTS, 64, self.draw)
        if logistic:
            model = nn.Linear(VARIANTS, 1)
            nn.init.normal_(model.weight, 0.0, 0.1, generator=self.draw)
            nn.init.zeros_(model.bias)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        whole = (torch.arange(people),)
        self.training = LocalTraining(model, start, labels, whole, 0.05, loss=binary_loss)

    @property
    def raw(self) -> Seen:
        return Seen(self.training.update(self.people, differentiable=False))

    def read_out(self, seen: Seen) -> Concordance:
        sent = {name: value.double() for name, value in self.training.global_state.items()}
        parts = seen.values.double().split([value.numel() for value in sent.values()])
        received = {
            name: value + part.view_as(value)
            for (name, value), part in zip(sent.items(), parts, strict=True)
        }
        treatment = tabular.Sanitizer(seen.noise_std / seen.keep)
        guesses = called(tabular.guess_rows(tabular.view(sent, received, "0", "2"), treatment))
        return concordance(guesses, self.people, self.others, self.panel)

    def relaxed(self, seen: Seen) -> Concordance:
        found = relax(self.training, seen, self.panel.table(), QUICK, self.draw).best
        return concordance(found, self.people, self.others, self.panel)


def test_synthetic_people_are_in_hardy_weinberg_equilibrium_with_linkage() -> None:
    draw = torch.Generator().manual_seed(0)
    panel = Panel.drawn(20, 0.8, draw)
    people = panel.people(20_000, draw)
    seen = torch.stack([(people == level).float().mean(0) for level in range(3)], -1)
    assert torch.allclose(seen, panel.shares(), atol=0.015)
    together = torch.corrcoef(people.T)
    assert float(together.diagonal(1).mean()) > 0.4
    assert float(together.diagonal(10).abs().mean()) < 0.1


def test_the_read_out_calls_most_genotypes_of_eight_people() -> None:
    found = _Round(8, 0).read_out(_Round(8, 0).raw) + _Round(8, 1).read_out(_Round(8, 1).raw)
    assert found.calls.share >= 0.85
    assert found.gain > 0.25
    assert found.people.share >= 0.5
    assert found.calls.share > found.others.share + 0.2


def test_the_relaxation_reads_one_person_whole_also_through_noise() -> None:
    one = _Round(1, 3)
    assert one.relaxed(one.raw).calls.share == 1.0
    raw = one.raw.values
    std = 0.5 * float(raw.norm()) / math.sqrt(raw.numel())
    seen = Seen(raw + std * torch.randn(raw.shape, generator=one.draw), noise_std=std)
    assert one.relaxed(seen).gain > 0.15


def test_a_logistic_model_gives_one_person_away_and_hides_many_in_their_sum() -> None:
    """Its gradient is one weighted sum of genotypes, whatever the batch."""
    alone, many = _Round(1, 4, logistic=True), _Round(32, 4, logistic=True)
    weight, bias = alone.raw.values[:-1], alone.raw.values[-1:]
    read = called((weight / bias)[None])
    assert concordance(read, alone.people, alone.others, alone.panel).calls.share == 1.0
    crowd = many.relaxed(many.raw)
    apart = difference(crowd.calls, crowd.by_frequency)
    assert apart.low < 0.10
    assert crowd.people.hits == 0


def test_the_shipped_policy_leaves_no_more_than_the_frequencies(tmp_path: Path) -> None:
    """The guesses fit the people behind the update no better than as many others."""
    one = _Round(64, 5)
    guard = Guard("genomics", tmp_path, unsafe_skip_inspection=True, alerts=io.StringIO())
    seen = let_out(guard, 1, one.training, one.people, patients=64)
    assert seen.noise_std > 0.0
    for found in (one.read_out(seen), one.relaxed(seen)):
        assert found.people.hits == 0
        assert abs(found.calls.share - found.others.share) < 0.05
        assert difference(found.calls, found.others).low <= 0.0
        assert found.gain < 0.05


def test_no_guess_at_all_is_the_frequencies() -> None:
    one = _Round(4, 6)
    none = torch.empty(0, VARIANTS)
    found = concordance(none, one.people, one.others, one.panel)
    assert found.calls == found.by_frequency
    assert found.gain == 0.0


def test_calls_are_whole_numbers_of_alleles() -> None:
    assert called(torch.tensor([[-3.0, 0.4, 0.6, 1.7, 9.0]])).tolist() == [[0, 0, 1, 2, 2]]


def test_fewer_others_than_people_are_refused() -> None:
    one = _Round(4, 6)
    with pytest.raises(MisuseError, match="at least as many others"):
        concordance(one.people, one.people, one.others[:3], one.panel)


def test_a_panel_is_learnt_from_reference_people() -> None:
    draw = torch.Generator().manual_seed(0)
    panel = Panel.drawn(20, 0.5, draw)
    learnt = Panel.learnt(panel.people(5000, draw))
    assert torch.allclose(learnt.frequencies, panel.frequencies, atol=0.03)
    assert float(Panel.learnt(torch.zeros(4, 3)).frequencies.min()) > 0.0


def test_agreements_stand_for_each_person_under_the_guess_that_suits_best() -> None:
    panel = Panel(torch.tensor([0.1, 0.1, 0.1]), 0.0)
    people = torch.tensor([[0.0, 0.0, 2.0], [1.0, 2.0, 1.0]])
    assert agreements(people[1:], people, panel).tolist() == [2, 3]  # the first by frequency
